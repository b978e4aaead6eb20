"""scripts/demo_epd_rl.sh from beginning to end, with few steps and few samples; what the report says of known figures."""

import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from random_predictor import make_predictor

from brisk import predictor_files

sys.path.append(str(ROOT / "scripts"))  # the reports import each other as scripts do
SPEC = importlib.util.spec_from_file_location("report_epd_rl", ROOT / "scripts/report_epd_rl.py")
report_epd_rl = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report_epd_rl)


def test_demo_leaves_tuned_predictors_and_a_report_of_before_and_after(tmp_path, run_shell):
    out = tmp_path / "demo"
    small = {"DEMO_OUT": str(out), "DEMO_REPORT": "--images_per_caption 1 --reference_steps 8",
             "DEMO_START": "--max_train_steps 1 --batch 2 --M 1 --eval_samples 2 --eval_steps 4"}  # fmt: skip
    sizes = ("reward.batch_size=8", "ppo.rollout_batch_size=8", "ppo.rloo_k=4", "ppo.minibatch_size=4")
    tiny = ["--max_train_steps=2", "--eval_samples=4", "--eval_every=1", *(f"--override={size}" for size in sizes)]
    run_shell("demo_epd_rl.sh", *tiny, **small)
    report = json.loads((out / "report.json").read_text())
    tuned = ["tuned, kl_coef 0.2", "tuned, kl_coef 0"]
    names = ["long run", "DDIM", "UniPC", "UniPC, guidance 2", "untrained", "distilled", *tuned]
    rows = {name: report[name]["4"] for name in names[1:]}
    assert {name: row["total_calls"] for name, row in rows.items()} == {
        "DDIM": 4, "UniPC": 4, "UniPC, guidance 2": 8, "untrained": 6, "distilled": 6, **dict.fromkeys(tuned, 6),
    }  # fmt: skip
    assert report["long run"]["8"]["end_error"] == 0 and rows["distilled"]["change"]["reward"] == [0, 0]
    assert all(0 <= row["reward"] <= 1 and row["end_error"] > 0 for row in rows.values())
    assert report["images"] == report["held_out_captions"] == 112
    assert len(report["conclusions"]) == 2 and all("KL to the start" in sentence for sentence in report["conclusions"])
    assert {name: len(course) for name, course in report["courses"].items()} == dict.fromkeys(tuned, 3)
    for name in ("report.png", "table.png"):
        assert Image.open(out / name).width > 900
    assert "what was maximised" in (out / "report.html").read_text()
    assert predictor_files.load(out / "near").document["stage"] == "rl"


def drawn(reward, error=0.0):
    """Images of which only scores matter; features that hold the reward."""
    features = torch.stack([reward, torch.arange(len(reward)) % 7.0], 1)
    return report_epd_rl.Drawn(None, reward, (reward > 0.5).float(), features, torch.full_like(reward, error))


@pytest.mark.quick
def test_differences_are_of_pairs_and_captions_are_what_is_drawn_anew():
    hard = torch.linspace(0, 0.8, 20)  # how well each caption fares, much more uneven than the gain
    before = hard.repeat(5)
    rows = report_epd_rl.measure({"distilled": drawn(before), "tuned": drawn(before + 0.1, 4.0)}, 20, ([0.5, 3.0], torch.eye(2)))
    row = rows["tuned"]
    assert row["gain"] == pytest.approx(0.1, abs=1e-6) and row["spread"]["gain"] < 1e-6
    assert row["spread"]["reward"] == pytest.approx(hard.std().item() / 20**0.5, rel=0.15)
    assert row["end_error"] == 2 and row["change"]["end_error"][0] == 2
    assert row["change"]["all"] == [pytest.approx((before + 0.1 > 0.5).float().mean() - (before > 0.5).float().mean()),
                                    pytest.approx(0, abs=0.2)]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("gain", "words"), [(0.03, "a gain"), (-0.03, "a loss"), (0.015, "no proof of a gain")])
def test_verdict_follows_the_figures(gain, words):
    start = {"reward": 0.9, "all": 0.9, "frechet": 4.0, "end_error": 1.0}
    change = {"reward": [gain, 0.01], "all": [0.05, 0.01], "frechet": [1.5, 0.5], "end_error": [2.0, 0.1]}
    row = {"reward": 0.9 + gain, "all": 0.95, "frechet": 5.5, "end_error": 3.0, "change": change, "kl": 1.7}
    said = report_epd_rl.conclusion("tuned", row, start, 560, 112)
    assert f"{gain:+.4f} ± 0.0100: " in said and words in said
    assert "Fréchet distance 4 -> 5.5 (+1.5 ± 0.5)" in said and "1.7 nats" in said


@pytest.mark.quick
def test_a_folder_that_is_no_tuned_run_is_refused(tmp_path):
    with pytest.raises(report_epd_rl.options.UserError, match=f"--run {tmp_path} is no folder of a finished run"):
        report_epd_rl.read_run(tmp_path)


@pytest.mark.quick
def test_untrained_tables_are_evenly_spread_without_factors():
    found = report_epd_rl.untrained(make_predictor(num_steps=3)).tables
    assert torch.allclose(found.r.float(), torch.tensor([[1 / 3, 2 / 3]] * 2)) and (found.weight == 0.5).all()
    assert (found.scale_dir == 1).all() and (found.scale_time == 1).all()
