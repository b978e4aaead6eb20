"""evaluate.py on the built-in protocol: the report's form, its page, and bad input."""

import json
import re

import pytest
from conftest import ROOT

import evaluate
from brisk.options import UserError

FIGURES = {"digit", "foreground", "background", "all", "frechet", "seconds_per_image", "network_calls"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    evaluate.main(["--model", f"student={ROOT / 'assets/tiny-teacher'}", "--output_dir", str(folder), "--samples", "50",
                   "--seeds", "2", "--teacher_steps", "20,2", "--model_steps", "2"])  # fmt: skip
    return folder, json.loads((folder / "report.json").read_text())


def test_report_has_a_measurement_per_model_and_step(report):
    _, figures = report
    assert list(figures["teacher"]) == ["20", "2"] and list(figures["student"]) == ["2"]
    for row in (*figures["teacher"].values(), *figures["student"].values()):
        assert row.keys() >= FIGURES and row["spread"].keys() == {"digit", "foreground", "background", "all", "frechet"}
        assert all(0 <= row[name] <= 1 for name in ("digit", "foreground", "background", "all"))
        assert row["all"] <= min(row["digit"], row["foreground"], row["background"])
    assert figures["seeds"] == 2 and figures["environment"]["packages"]["torch"]


def test_guidance_costs_two_network_calls_a_step(report):
    _, figures = report
    assert figures["teacher"]["20"]["network_calls"] == 40 and figures["teacher"]["2"]["network_calls"] == 4
    assert figures["student"]["2"]["network_calls"] == 2


def test_teacher_at_20_steps_draws_what_is_asked(report):
    _, figures = report
    assert figures["teacher"]["20"]["all"] > 0.9


def test_page_needs_no_network(report):
    folder, _ = report
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and not re.search(r"(src|href)=\"(https?:)?//", page)
    assert (folder / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(("flags", "message"), [
    (["--model", "x=nowhere"], "x: 'nowhere' is not a pipeline folder"),
    (["--model", "x"], "x: '' is not a pipeline folder"),
    (["--teacher_steps", "4,zero"], "--teacher_steps is '4,zero'"),
    (["--oracle", "nowhere"], "--oracle: nowhere holds no oracle"),
    (["--samples", "3"], "out of range"),
])  # fmt: skip
def test_bad_input_is_one_sentence(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--output_dir", str(tmp_path), *flags])
