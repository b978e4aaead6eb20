"""The benchmarks: every row does the training script's step, and the figures are written."""

import copy
import functools
import json
import sys

import pytest
import torch
from conftest import BKSDM, ROOT, SLAM, remembered_plans
from PIL import Image

from brisk import tiny

sys.path.append(str(ROOT / "scripts"))  # the benchmarks import each other as scripts do
import bench_latency  # noqa: E402
import bench_step  # noqa: E402
import bench_step_methods  # noqa: E402

TEACHER = ROOT / "assets/tiny-teacher"
SCRIPTS = {"slam": SLAM, "bksdm": BKSDM}


@pytest.fixture(scope="module", params=["slam", "bksdm"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def teacher():
    """The built-in teacher and the plan of bk_small."""
    parts = bench_step_methods.make_parts("tiny")
    return parts, bench_step_methods.make_plan(parts, "bk_small")


@pytest.fixture(scope="module")
def losses(teacher):
    """A function: (method, setting) -> the losses of two steps on two images."""
    parts, plan = teacher

    @functools.cache
    def take(method, setting):
        row = bench_step_methods.METHODS[method](
            setting, copy.deepcopy(parts), plan, 2, torch.float32, torch.device("cpu")
        )
        return [row.step(number).item() for number in range(2)]

    return take


def named(method):
    return {setting.name: setting for setting in bench_step.rows(compiled=True, method=method)}


def test_every_row_with_online_encoders_takes_the_same_steps(method, losses):
    plain, *others = [setting for setting in named(method).values() if not setting.cached]
    wanted = losses(method, plain)
    assert len(set(wanted)) == 2 and len(others) == 5
    for setting in others:
        found = losses(method, setting)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=0, msg=setting.name)
        # AdamW's first steps turn rounding of near-zero gradients into whole steps
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0, msg=setting.name)


def test_recomputation_does_not_change_the_cached_step(method, losses):
    cached, kept = (named(method)[name] for name in ("+ cached latents and text", "- gradient checkpointing"))
    assert cached.checkpointing and not kept.checkpointing
    torch.testing.assert_close(losses(method, cached), losses(method, kept), rtol=1e-3, atol=1e-6)


def test_rows_take_the_steps_of_the_training_script(method, losses, run_main, tmp_path):
    for number in range(2):  # the benchmark's synthetic batch
        Image.new("RGB", (32, 32), (128, 128, 128)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(tiny.CAPTION)
    run = run_main(f"--pretrained_teacher_model={TEACHER}", f"--train_data_dir={tmp_path}", "--seed=0", "--max_train_steps=2",
                   "--dataloader_num_workers=0", "--unet_time_cond_proj_dim=256" if method == "slam" else "--use_ema",
                   script=SCRIPTS[method], output=tmp_path / "out")  # fmt: skip
    wanted, found = losses(method, named(method)["+ no host sync"]), [row["loss"] for row in run.rows]
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found == pytest.approx(wanted, rel=2e-3)


@pytest.fixture
def noted_losses(monkeypatch):
    """The losses of the steps that the command takes, and random SDXL networks of its in tiny."""
    monkeypatch.setitem(tiny.UNETS, "sdxl", tiny.UNETS["tiny_xl"])
    for name in bench_step_methods.TEXT_ENCODERS["sdxl"]:
        monkeypatch.setitem(tiny.TEXT_ENCODERS, name, tiny.TEXT_ENCODERS["tiny"])
    monkeypatch.setattr(tiny, "make_vae", lambda size, make=tiny.make_vae: make("tiny"))
    noted, finish = [], bench_step_methods.Bench.finish

    def note(bench, loss, *more, **named):
        noted.append(loss.item())
        return finish(bench, loss, *more, **named)

    monkeypatch.setattr(bench_step_methods.Bench, "finish", note)
    return noted


@pytest.mark.parametrize(
    "method, size, precision, tolerance, repeats", [("slam", "sdxl", "bf16", 0.2, 2), ("bksdm", "tiny", "no", 1e-5, 1)]
)
def test_step_command_prints_the_table_and_writes_the_ratios(
    method, size, precision, tolerance, repeats, noted_losses, tmp_path, capsys
):
    output = tmp_path / "b.json"
    with remembered_plans():
        bench_step.main(["--method", method, "--size", size, "--mixed_precision", precision, "--batch_size", "1", "--steps", "1",
                         "--warmup", "0", "--repeats", str(repeats), "--output", str(output)])  # fmt: skip
    report, shown, rows = json.loads(output.read_text()), capsys.readouterr().out, bench_step.rows(False, method)
    assert [report[name] for name in ("method", "size", "mixed_precision")] == [method, size, precision]
    assert report["preset"] == ("bk_small" if method == "bksdm" else None)
    assert [row["row"] for row in report["rows"]] == [row.name for row in rows]
    assert report["rows"][0]["ratio_to_plain"] == 1 and "matrix products reach" in shown
    for row in report["rows"]:
        assert shown.count(row["row"] + " ") == 1 and len(row["taken_seconds"]) == repeats and row["seconds_per_step"] > 0
        share = row["flops_per_second"] / report["matmul_flops_per_second"]
        assert row["share_of_floor"] == pytest.approx(share) and row["peak_gib"] is None
    online = [loss for loss, row in zip(noted_losses, rows * repeats, strict=True) if not row.cached]
    assert online == pytest.approx([online[0]] * 6 * repeats, rel=tolerance)


def test_floor_counts_the_forwards_of_both_networks(teacher):
    parts, plan = teacher
    large, small = (bench_step_methods.forward_macs(parts, config) for config in (None, plan.config))
    assert 0 < small < large
    assert bench_step_methods.Bksdm.macs_per_image(parts, plan) == large + 3 * small
    assert bench_step_methods.Slam.macs_per_image(parts, None) == 6 * large


def test_latency_command_prints_the_table_and_writes_every_model(tmp_path, capsys):
    output = tmp_path / "l.json"
    bench_latency.main(["--size", "tiny", "--steps", "2", "--warmup", "0", "--repeats", "2", "--output", str(output)])
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["model"] for row in report["models"]] == ["teacher", "bk_base", "bk_small", "bk_tiny"]
    assert report["models"][0]["ratio_to_first"] == 1 and report["steps"] == 2
    for bigger, row in zip(report["models"], report["models"][1:], strict=False):
        assert bigger["parameters"] > row["parameters"] and bigger["gmacs"] > row["gmacs"]
    for row in report["models"]:
        assert row["model"] in shown and len(row["seconds"]) == 2
        assert 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]


@pytest.mark.parametrize(
    "main, flags, sentence",
    [
        (bench_step.main, ["--method", "bksdm", "--preset", "bk_tiny"], "4 weights of the student cannot come from"),
        (bench_step.main, ["--method", "bksdm", "--preset", "small_sd_xl"], "does not fit a teacher"),
        (bench_step.main, ["--output", "/no/such/b.json"], "in a folder that does not exist"),
        (bench_latency.main, ["--output", "/no/such/l.json"], "in a folder that does not exist"),
        (bench_latency.main, ["--presets", "bk_smal"], "'bk_smal' is none of bk_base"),
        (bench_latency.main, ["--presets", "small_sd_xl"], "does not fit a teacher"),
    ],
)
def test_bad_input_is_one_sentence(main, flags, sentence):
    with pytest.raises(bench_step.options.UserError, match=sentence) as error:
        main(flags)
    assert "\n" not in str(error.value)
