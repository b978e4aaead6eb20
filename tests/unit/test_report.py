"""Reports: the text table, CSV, JSON, the page that needs no network, figures of which some are missing."""

import csv
import json
import math
import re

import pytest
from PIL import Image

from brisk import report

pytestmark = pytest.mark.quick

FIGURES = {
    "teacher": {
        "4": {"all": 0.51234, "frechet": 13.3, "nfe": 4, "total_nfe": 8, "seconds_alone": 0.05, "gmacs_per_image": 16935.4,
              "parameters": 859520964, "scheduler": "DDIM", "spread": {"all": 0.0123, "frechet": 0.8}},
        "50": {"all": 0.9, "frechet": 3.25, "nfe": 50, "total_nfe": 100, "seconds_alone": 0.6, "gmacs_per_image": 0.0021,
               "parameters": 859520964, "scheduler": "DDIM", "spread": {"all": 0.002, "frechet": 0.1}},
    },
    "real <images> & co": {"images": {"all": 1 / 3, "frechet": 1e-7, "images": 5000, "unreadable": 0}},
}  # fmt: skip
FACTS = {"protocol": "builtin", "record": {"note": "<script>alert(1)</script>"}, "environment": {}}
NOTES = ["What was <measured>.", "The second & last note."]


def write(folder, figures=FIGURES, samples=(), captions=(), title="brisk: a <title>", facts=FACTS):
    table = report.write_report(folder, title, figures, facts, NOTES, dict(samples), list(captions))
    return table, (folder / "report.html").read_text()


def squares(count, colour="red"):
    return [Image.new("RGB", (32, 32), colour) for _ in range(count)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of a report, its text table, its page)."""
    folder = tmp_path_factory.mktemp("report")
    return folder, *write(folder, samples={("teacher", "4"): squares(2)}, captions=["a <b>bold</b> caption", "b"])


def columns_of_text(table):
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return lines[0], lines[1:]


def test_text_table_has_a_line_per_measurement_in_aligned_columns():
    lines = report.text_table(FIGURES).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    head, body = columns_of_text(report.text_table(FIGURES))
    assert head == ["model", "nfe", "all", "frechet", "total_nfe", "seconds_alone", "gmacs_per_image", "parameters", "images",
                    "scheduler"]  # fmt: skip
    assert body[0] == ["teacher", "4", "0.512 ± 0.012", "13.30 ± 0.80", "8", "0.05", "16,935", "859,520,964", "DDIM"]
    assert body[2] == ["real <images> & co", "images", "0.333", "1e-07", "5,000"]


def test_second_column_is_steps_where_no_measurement_counts_network_calls():
    head, _ = columns_of_text(report.text_table({"DiT": {"10": {"digit": 0.5}}}))
    assert head == ["model", "steps", "digit"]


def test_counted_network_calls_show_where_they_are_not_those_asked_for():
    head, body = columns_of_text(report.text_table({"a": {"4": {"all": 0.5, "nfe": 5}}}))
    assert head == ["model", "nfe", "all", "nfe"] and body == [["a", "4", "0.5", "5"]]


def test_measures_of_other_code_show_where_they_have_a_spread():
    figures = {"a": {"4": {"all": 0.5, "my_reward": 2.25, "seconds_alone_min": 0.1, "nfe": 4, "spread": {"my_reward": 0.5}}}}
    head, body = columns_of_text(report.text_table(figures))
    assert head == ["model", "nfe", "all", "my_reward"] and body[0][-1] == "2.25 ± 0.50"


@pytest.mark.parametrize(("value", "spread", "text"), [
    (0.91234, 0.0123, "0.912 ± 0.012"), (0.91234, 0.00123, "0.9123 ± 0.0012"), (12.345, 2.34, "12.3 ± 2.3"),
    (1234.5, 56.7, "1234 ± 57"), (0.5, 5e-17, "0.50000 ± 0.00000"), (0.5, 0, "0.500 ± 0.000"), (0, 0, "0.000 ± 0.000"),
    (1.23e-5, 1.1e-6, "0.0000123 ± 0.0000011"), (0.25, math.nan, "0.25"), (math.inf, 1.0, "inf"), (-0.2, 0.05, "-0.200 ± 0.050"),
    (31234.5, 812.0, "31234 ± 812"),
])  # fmt: skip
def test_spread_has_two_digits_and_its_value_as_many_decimals(value, spread, text):
    _, body = columns_of_text(report.text_table({"a": {"4": {"clip": value, "spread": {"clip": spread}}}}))
    assert body == [["a", "4", text]]


def test_csv_holds_every_value_in_full(tmp_path):
    figures = {**FIGURES, 'a "quoted", name': {"2": {"all": 0.1 + 0.2, "own": 7, "change": {"all": 1}, "kid": None, "nfe": 2}}}
    report.write_csv(tmp_path / "report.csv", figures)
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["model"], line["nfe"]) for line in lines] == [
        ("teacher", "4"), ("teacher", "50"), ("real <images> & co", ""), ('a "quoted", name', "2")]  # fmt: skip
    for line, (_, _, row) in zip(lines, report.rows_of(figures), strict=True):
        for name in ("all", "frechet", "gmacs_per_image", "parameters", "own"):
            assert (float(line[name]) if line[name] else None) == row.get(name)
        for name, spread in row.get("spread", {}).items():
            assert float(line[f"{name}_spread"]) == spread
    assert lines[3]["scheduler"] == lines[2]["all_spread"] == "" and not {"change", "spread", "kid"} & set(lines[0])


def test_json_has_figures_and_facts_side_by_side(written):
    folder, table, _ = written
    assert json.loads((folder / "report.json").read_text()) == {**FIGURES, **FACTS}
    assert table == report.text_table(FIGURES, narrow=True) and "images" not in table.splitlines()[0].split()[2:]
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.json", "report.csv", "report.html", "report.png", "frontier.png"}


@pytest.mark.parametrize("wrong", [{"figures": {"record": {"4": {"all": 0.5}}}}, {"facts": {"teacher": 1}}])
def test_names_of_facts_and_models_are_apart(tmp_path, wrong):
    with pytest.raises(ValueError, match="report.RESERVED"):
        write(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_page_escapes_everything(written):
    page = written[-1]
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("brisk: a &lt;title&gt;") == 2 and "<title>brisk: a <" not in page
    assert "real &lt;images&gt; &amp; co" in page and "<li>a &lt;b&gt;bold&lt;/b&gt; caption</li>" in page
    assert "<p>What was &lt;measured&gt;.</p>" in page and "second &amp; last" in page


def test_page_is_in_order_and_needs_no_network(written):
    page = written[-1]
    places = [page.index(part) for part in ("<h1>", "What was", "<table>", "data:image/png", "<ol>", "The second", "How it was")]
    assert places == sorted(places)
    assert not re.search(r"(src|href|url)\s*[=(](?!\"data:image/png)|http|@import|<link|<script", page)


def test_best_value_of_a_column_is_bold(written):
    page = written[-1]
    bold = re.findall(r"<b>(.*?)</b>", page)
    # agreement the most, all else the least; parameters are all the same, images and unreadable are no measures
    assert bold == ["8", "0.05", "0.9000", "0.0021", "1e-07"] and "<b>0.9000</b> <small>±0.0020</small>" in page
    assert "<th>all ↑</th>" in page and "<th>frechet ↓</th>" in page and "<th>images</th>" in page


def test_nothing_is_bold_in_one_row_and_ties_all_are(tmp_path):
    row = {"all": 0.5, "nfe": 4}
    _, page = write(tmp_path, {"a": {"4": row}})
    assert "<b>" not in page
    _, page = write(tmp_path, {"a": {"4": row}, "b": {"4": row}, "c": {"4": {"all": 0.25, "nfe": 4}}})
    assert re.findall(r"<b>(.*?)</b>", page) == ["0.5", "0.5"]


@pytest.mark.parametrize("figures", [
    {"a": {"4": {"all": 0.5, "nfe": 4, "seconds_alone": 0.1}}}, {"a": {"images": {"fid": 3.5, "images": 9}}},
    {"a": {"4": {"all": 0.5}}}, {"a": {"4": {"fid": 2.0, "nfe": 4}, "8": {"clip": 0.3, "nfe": 8}}},
    {"a": {"4": {"psnr_to_teacher": math.inf, "clip": math.nan, "kid": None, "all": 0.5, "nfe": 4}}},
    {"a": {"4": {"kid": -0.001, "imagereward": -1.5, "nfe": 4, "spread": {"kid": 0.002}}}},
    {"$x^$": {"4": {"all": 0.0, "frechet": 0.0, "nfe": 4}}, "_b": {"4": {"all": 0.0, "frechet": 1.0, "nfe": 4}}},
])  # fmt: skip
def test_any_row_makes_a_report(tmp_path, figures):
    write(tmp_path, figures)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"report.json", "report.csv", "report.html", "report.png", "frontier.png"}


def test_cost_alone_makes_a_report_and_leaves_no_picture_of_other_figures(tmp_path):
    write(tmp_path)
    assert (tmp_path / "frontier.png").exists()
    _, page = write(tmp_path, {"a": {"4": {"nfe": 4, "seconds_alone": 0.1}}})
    assert "<img" not in page and not list(tmp_path.glob("*.png"))
    _, page = write(tmp_path, {"a": {"4": {"nfe": 4}}}, samples={("a", "4"): squares(2), ("a", "8"): []})
    assert page.count("<img") == 1 and [path.name for path in tmp_path.glob("*.png")] == ["report.png"]


def test_page_adds_the_frontier_where_the_picture_does_not_show_every_measure(tmp_path):
    row = {"all": 0.5, "frechet": 2.0, "clip": 0.3, "hps": 0.2, "nfe": 4}
    samples = {("a", "4"): squares(2)}
    assert write(tmp_path, {"a": {"4": row}}, samples=samples)[1].count("<img") == 2
    assert write(tmp_path, {"a": {"4": {"all": 0.5, "nfe": 4}}}, samples=samples)[1].count("<img") == 1


def test_page_of_a_demo_holds_its_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "report.png")
    report.write_page(tmp_path, "title", [FIGURES, {"b": {"2": {"digit": 0.5}}}], {"seeds": 3}, ["one", "two"])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<table>") == 2 and page.count("<img") == 1 and "<th>steps</th>" in page
