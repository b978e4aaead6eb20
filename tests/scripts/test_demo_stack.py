"""scripts/demo_stack.sh from beginning to end, with few steps and few samples."""

import json
import re

MODELS = ("teacher", "bksdm", "slam", "epd", "bksdm+slam", "bksdm+epd")


def test_demo_leaves_the_parts_the_stacks_and_a_report_of_all(tmp_path, run_shell):
    out = tmp_path / "demo"
    small = {"DEMO_OUT": str(out), "DEMO_EPD": "--batch 2 --M 1 --eval_samples 2 --eval_steps 4",
             "DEMO_EVALUATE": "--samples 50 --seeds 1 --batch_size 10 --latency_repeats 1"}  # fmt: skip
    done = run_shell("demo_stack.sh", "--max_train_steps", "3", "--log_every", "1", **small)
    assert re.findall(r"^== (\d/\d)", done.stdout, re.MULTILINE) == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    report = json.loads((out / "report.json").read_text())
    rows = {name: report[name] for name in MODELS}
    assert {name: set(row) for name, row in rows.items()} == {
        "teacher": {"25", "5", "4", "2", "1"}, "bksdm": {"25", "5", "4", "2", "1"}, "slam": {"4", "2", "1"}, "epd": {"5"},
        "bksdm+slam": {"4", "2", "1"}, "bksdm+epd": {"5"},
    }  # fmt: skip
    last = {name: row["5" if "epd" in name else "4"] for name, row in rows.items()}
    sizes = {name: row["parameters"] for name, row in last.items()}
    assert sizes["bksdm"] == sizes["bksdm+epd"] < 0.6 * sizes["teacher"] and sizes["epd"] == sizes["teacher"]
    assert sizes["bksdm+slam"] - sizes["bksdm"] == sizes["slam"] - sizes["teacher"] > 0  # the embedding of gamma
    assert {name: row["nfe"] for name, row in last.items()} == {name: 5 if "epd" in name else 4 for name in MODELS}
    total = {"slam": 4, "bksdm+slam": 4, "teacher": 8, "bksdm": 8, "epd": 16, "bksdm+epd": 16}  # of EPD 8 guided pairs
    assert {name: row["total_nfe"] for name, row in last.items()} == total
    assert all(row["seconds_alone"] > 0 and 0 <= row["all"] <= 1 for row in last.values())
    for name in ("report.png", "report.html", "model_index.json", "student/model_index.json", "slam/model_index.json",
                 "epd/export/predictor.json", "student_epd/export/predictor.json"):  # fmt: skip
        assert (out / name).is_file(), name

    from brisk import predictor_files

    model = predictor_files.load(out / "student_epd").model
    assert model["backend_config"]["model_name_or_path"] == str(out / "student") and model["guidance_rate"] == 2
