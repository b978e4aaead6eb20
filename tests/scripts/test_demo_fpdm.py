"""scripts/demo_fpdm.sh from beginning to end, with few steps and few samples."""

import json

import numpy as np


def test_demo_leaves_two_pipelines_and_a_report_at_equal_budgets(tmp_path, run_shell):
    out = tmp_path / "demo"
    small = {"DEMO_OUT": str(out),
             "DEMO_REPORT": "--samples 50 --seeds 1 --budgets 2 --iterations 2 --cold_iterations 26"}  # fmt: skip
    done = run_shell("demo_fpdm.sh", "--max_train_steps", "2", "--log_every", "1", **small)
    assert "DiT: 100%" in done.stderr.replace("\r", "\n") and "FPDM: 100%" in (out / "fpdm.log").read_text()
    labels = np.load(out / "latents/labels.npy")
    assert [len(list((out / f"images/{digit}").iterdir())) for digit in range(10)] == np.bincount(labels).tolist()
    report = json.loads((out / "report.json").read_text())
    dit, fpdm = (report["training"][name]["2"] for name in ("DiT", "FPDM"))
    assert fpdm["parameters"] < 0.2 * dit["parameters"] and fpdm["activations_mib"] < dit["activations_mib"]
    assert report["sampling"].keys() == {"DiT", "FPDM, 2 iterations", "FPDM, 2 iterations, reuse", "FPDM, 26 iterations"}
    (base,) = report["sampling"]["DiT"].values()
    for name, by_steps in report["sampling"].items():
        ((steps, row),) = by_steps.items()
        assert 0 <= row["digit"] <= 1 and row["frechet"] > 0 and row["network_calls"] == int(steps)
        assert row["budget"] == 2 and row["gmacs_per_image"] <= base["gmacs_per_image"]
        assert row["blocks"] == 56 if name == "DiT" else row["blocks"] < 56
    assert all((out / name).is_file() for name in ("report.png", "report.html", "samples_dit.png", "samples_fpdm.png"))
    assert "activations mib" in (out / "report.html").read_text() and "gmacs per image" in (out / "report.html").read_text()
    pipeline = json.loads((out / "runs/fpdm/model_index.json").read_text())
    assert pipeline["_class_name"] == "DiTPipeline" and pipeline["id2label"]["7"] == "7"
