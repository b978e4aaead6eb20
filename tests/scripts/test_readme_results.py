"""Tables of results in the README and in docs/: written from reports, to the last digit, and never stale."""

import json
import re
import sys

import pytest
from conftest import ROOT

from brisk.options import UserError

sys.path.append(str(ROOT / "scripts"))
import readme_results as results  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENVIRONMENT = {"commit": "0123456789abcdef", "cpu_cores": 2, "device": "AMD EPYC", "packages": {"torch": "2.13.0+cpu"}}
MARKED = "Before.\n\n<!-- results: quickstart -->\nold figures\n<!-- end of results -->\n\nAfter.\n"
QUICKSTART = {
    "teacher": {
        "50": {"digit": 0.99833, "foreground": 1.0, "background": 1.0, "all": 0.99833, "frechet": 3.6849, "scheduler": "DDIM",
               "seconds_per_image": 0.04504, "spread": {"digit": 0.00289, "frechet": 0.0812}},
        "1": {"digit": 0.5, "foreground": 0.25, "background": 0.75, "all": 0.125, "frechet": 27.1449, "scheduler": "dpmpp",
              "seconds_per_image": 0.0021, "spread": {}},
        "2": {"all": 0.5},
    },
    "student": {"1": {"digit": 0.98, "foreground": 0.99, "background": 0.992, "all": 0.963, "frechet": 5.63, "scheduler": "LCM"}},
    "other": {"1": {"digit": 0.0}},
    "record": {"samples": 200, "seeds": 3},
    "environment": ENVIRONMENT,
}  # fmt: skip
FPDM = {
    "sampling": {"DiT": {"5": {"gmacs_per_image": 0.1234, "digit": 0.9, "frechet": 4.0, "seconds_per_image": 0.5, "budget": 5},
                         "10": {"gmacs_per_image": 0.2468, "digit": 0.95, "frechet": 3.0, "seconds_per_image": 1, "budget": 10}}},
    "samples_per_seed": 100, "seeds": 3, "environment": ENVIRONMENT,
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in place of the repository: a README with the quickstart's table, two reports in docs/reports."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "docs/reports")
    (tmp_path / "docs/reports").mkdir(parents=True)
    (tmp_path / "docs/reports/quickstart.json").write_text(json.dumps(QUICKSTART))
    (tmp_path / "docs/reports/demo_fpdm.json").write_text(json.dumps(FPDM))
    (tmp_path / "README.md").write_text(MARKED)
    return tmp_path


def call(*flags):
    """The exit code of the script."""
    with pytest.raises(SystemExit) as ended:
        results.main(list(flags))
    return ended.value.code


def test_table_has_rows_of_its_models_with_spreads_milliseconds_and_the_teachers_scheduler(place):
    header, rule, *rows = results.render("quickstart").split("\n\n")[0].splitlines()
    assert header == "| model | calls | digit | foreground | background | all three | Fréchet | ms per image |"
    assert rule == "|" + " --- |" * 8
    assert rows == [
        "| teacher (DDIM) | 50 | 0.998 ± 0.003 | 1.000 | 1.000 | 0.998 | 3.68 ± 0.08 | 45.0 |",
        "| teacher (dpmpp) | 1 | 0.500 | 0.250 | 0.750 | 0.125 | 27.14 | 2.1 |",
        "| teacher | 2 |  |  |  | 0.500 |  |  |",
        "| **SLAM student** | 1 | 0.980 | 0.990 | 0.992 | 0.963 | 5.63 |  |",
    ]


def test_line_below_says_where_figures_come_from(place):
    line = results.render("quickstart").split("\n\n")[1]
    assert line.startswith("`bash scripts/quickstart.sh`, commit 0123456, 2 cores, AMD EPYC, torch 2.13.0+cpu; 600 images")
    assert "in 3 sets" in line
    assert "300 images per row in 3 sets" in results.render("fpdm")  # of reports that are not evaluate.py's


def test_only_rows_of_the_budget_are_shown_and_figures_may_be_below_a_key(place):
    _, _, *rows = results.render("fpdm").split("\n\n")[0].splitlines()
    assert rows == ["| DiT | 5 | 0.123 | 0.900 | 4.00 |"]


def test_pages_are_written_once_and_nothing_else_in_them_changes(place, capsys):
    assert call() == 0 and "Written: README.md" in capsys.readouterr().out
    text = (place / "README.md").read_text()
    assert "old figures" not in text and results.render("quickstart") in text
    assert text.startswith("Before.\n\n<!-- results: quickstart -->\n\n| model")
    assert text.endswith("them.\n\n<!-- end of results -->\n\nAfter.\n")
    assert call() == 0 and "Written: nothing" in capsys.readouterr().out
    assert (place / "README.md").read_text() == text


def test_check_fails_on_a_stale_page_and_changes_nothing(place, capsys):
    assert call("--check") == 1 and "README.md" in capsys.readouterr().out
    assert (place / "README.md").read_text() == MARKED
    call()
    assert call("--check") == 0
    (place / "docs/reports/quickstart.json").write_text(json.dumps(QUICKSTART).replace("0.963", "0.964"))
    assert call("--check") == 1


def test_reports_are_taken_by_name(place, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(QUICKSTART).replace("0.963", "0.111"))
    assert call("--add", f"quickstart={tmp_path / 'report.json'}") == 0
    assert "0.111" in (place / "README.md").read_text()
    for wrong in (f"nonsense={tmp_path / 'report.json'}", "quickstart=nowhere.json", "quickstart"):
        with pytest.raises(UserError, match="is not NAME=FILE with NAME one of quickstart, demo_bksdm"):
            results.main(["--add", wrong])


def test_unknown_tables_and_missing_reports_are_said(place):
    with pytest.raises(UserError, match="no table called nonsense"):
        results.render("nonsense")
    with pytest.raises(UserError, match="demo_stack.json cannot be read .* run bash scripts/demo_stack.sh"):
        results.render("stack")


def test_every_table_has_its_place_in_the_readme_and_no_other_is_marked():
    named = {path.name: [name for _, name, _ in results.MARKED.findall(path.read_text())] for path in PAGES}
    assert sorted(named["README.md"]) == sorted(results.TABLES)
    assert named["bksdm.md"] == ["bksdm"]
    for path in PAGES:
        text = path.read_text()
        assert set(named[path.name]) <= set(results.TABLES)
        assert len(re.findall("<!-- results: ", text)) == len(re.findall("<!-- end of results -->", text)) == len(named[path.name])


def test_tables_of_this_repository_are_what_its_reports_say(capsys):
    missing = [f"docs/reports/{table.report}.json" for table in results.TABLES.values()
               if not (results.FOLDER / f"{table.report}.json").is_file()]  # fmt: skip
    assert not missing, f"reports of the demos are not there: {', '.join(missing)}; give them to scripts/readme_results.py --add"
    assert call("--check") == 0, capsys.readouterr().out
