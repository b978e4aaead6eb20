"""The step benchmark: every row does the same step, and the figures are written."""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("bench_step", ROOT / "scripts/bench_step.py")
bench_step = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench_step)


@pytest.fixture(scope="module")
def networks():
    return bench_step.make_networks("tiny")


def losses(setting, networks):
    row = bench_step.Bench(setting, "tiny", 2, torch.float32, torch.device("cpu"), networks)
    return [row.step(number).item() for number in range(3)]


def test_every_row_with_online_encoders_takes_the_same_steps(networks):
    plain, *others = [setting for setting in bench_step.rows(compiled=False) if not setting.cached]
    wanted = losses(plain, networks)
    assert len(set(wanted)) == 3 and len(others) == 5
    for setting in others:
        found = losses(setting, networks)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0, msg=setting.name)
        # AdamW's first steps turn rounding of near-zero gradients into whole steps
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0, msg=setting.name)


def test_recomputation_does_not_change_the_cached_step(networks):
    cached, kept = bench_step.rows(compiled=False)[-2:]
    assert cached.checkpointing and not kept.checkpointing
    torch.testing.assert_close(losses(cached, networks), losses(kept, networks), rtol=1e-4, atol=1e-6)


def test_command_prints_the_table_and_writes_the_ratios(tmp_path, capsys):
    bench_step.main(
        ["--size", "tiny", "--batch_size", "2", "--steps", "1", "--warmup", "0", "--output", str(tmp_path / "b.json")]
    )
    report = json.loads((tmp_path / "b.json").read_text())
    assert [row["row"] for row in report["rows"]] == [setting.name for setting in bench_step.rows(compiled=False)]
    assert report["rows"][0]["ratio_to_plain"] == 1 and all(row["seconds_per_step"] > 0 for row in report["rows"])
    assert "images/s" in capsys.readouterr().out
