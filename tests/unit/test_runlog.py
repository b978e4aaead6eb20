"""Metrics rows, their means and their fate over a resume; trackers; the manifest."""

import importlib.util
import json
import logging
import sys
import types

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from brisk import runlog
from brisk.options import UserError

pytestmark = pytest.mark.quick


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_launch_is_refused_when_every_process_has_started():
    waits = []
    accelerator = types.SimpleNamespace(wait_for_everyone=lambda: waits.append(1), distributed_type="FSDP", num_processes=1)
    with pytest.raises(UserError, match="FSDP shards the parameters"):
        runlog.check_processes(accelerator, needs_whole_tensors=True)
    assert waits == [1]


def write(folder, *lines):
    (folder / "metrics.jsonl").write_text("".join(lines))


def test_rows_hold_the_means_over_micro_steps(accelerator, tmp_path):
    log = runlog.RunLog(accelerator, tmp_path, 2, images_per_step=8)
    for step in (1, 2):
        for micro in (0.0, 1.0, 5.0):
            log.add(loss=torch.tensor(step + micro, requires_grad=True))
        log.add(grad_norm=torch.tensor(float(step), dtype=torch.float64))
        assert log.due(step) == (step == 2)
    row = log.flush(2, lr=1e-4, skipped_steps=0, skipped_samples=None)
    assert row["loss"] == pytest.approx((1 + 2 + 6 + 2 + 3 + 7) / 6) and row["grad_norm"] == 1.5
    assert row["step"] == 2 and row["images"] == 16 and row["lr"] == 1e-4 and row["skipped_steps"] == 0
    assert "skipped_samples" not in row
    assert {"images_per_second", "data_wait_share", "peak_memory_gib"} <= set(row) and 0 <= row["data_wait_share"] <= 1
    log.add(loss=torch.tensor(7.0))
    assert log.flush(4)["loss"] == 7.0, "the next interval starts from zero"
    assert rows(tmp_path)[0] == row and [r["step"] for r in rows(tmp_path)] == [2, 4]


def test_adding_terms_reads_nothing_from_the_device(accelerator, tmp_path):
    log = runlog.RunLog(accelerator, tmp_path, 2, 1)
    log.add(loss=torch.empty((), device="meta"))  # reading a meta tensor is an error
    log.add(loss=torch.empty((), device="meta"))


def test_rows_after_the_step_resumed_from_are_dropped(accelerator, tmp_path):
    write(tmp_path, *(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (2, 4, 6, 8)))
    log = runlog.RunLog(accelerator, tmp_path, 2, 1, first_step=5)
    log.add(loss=torch.tensor(2.0))
    log.flush(6)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6] and rows(tmp_path)[-1]["loss"] == 2.0


def test_a_new_run_starts_a_new_file(accelerator, tmp_path):
    write(tmp_path, '{"step": 2}\n')
    runlog.RunLog(accelerator, tmp_path, 2, 1)
    assert rows(tmp_path) == []


@pytest.mark.parametrize("last", ['{"step": 4, "lo', '{"loss": 1}\n', "\n", "\0\0\0", "4\n", "null\n", '"step"\n'])
def test_a_broken_line_is_tolerated(accelerator, tmp_path, last):
    write(tmp_path, '{"step": 2, "loss": NaN}\n', last)
    log = runlog.RunLog(accelerator, tmp_path, 2, 1, first_step=4)
    log.flush(6)
    assert [row["step"] for row in rows(tmp_path)] == [2, 6]


def test_waiting_for_data_is_measured(accelerator, tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 10.0])  # start; a batch from 1 to 3; flush at 10
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    log = runlog.RunLog(accelerator, tmp_path, 1, images_per_step=20)
    assert log.next_batch(iter(["batch"])) == "batch"
    row = log.flush(1)
    assert row["data_wait_share"] == pytest.approx(0.2) and row["images_per_second"] == pytest.approx(2.0)


def test_pauses_do_not_count_as_training_time(accelerator, tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 10.0])
    monkeypatch.setattr(runlog.time, "perf_counter", lambda: next(clock))
    log = runlog.RunLog(accelerator, tmp_path, 1, images_per_step=20)
    log.pause(5.0)
    assert log.flush(2)["images_per_second"] == pytest.approx(2 * 20 / 5.0)


def test_trackers(monkeypatch):
    assert runlog.check_trackers("none") is None
    with pytest.raises(UserError, match="mlflow is not one of"):
        runlog.check_trackers("mlflow")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    assert runlog.check_trackers("tensorboard") == ["tensorboard"]
    assert runlog.check_trackers("all") == ["tensorboard", "comet_ml"]
    with pytest.raises(UserError, match="pip install wandb"):
        runlog.check_trackers("wandb")


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        runlog.open_output(0, tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        runlog.open_output(0, tmp_path / "file/below")
    assert runlog.open_output(0, tmp_path / "a/b").is_dir() and list((tmp_path / "a/b").iterdir()) == []


def test_log_lines_hold_no_secret_and_only_the_main_process_speaks(capsys):
    log = runlog.setup_logging(types.SimpleNamespace(is_main_process=True))
    log.warning("cannot open https://h/?token=s3cr3tvalue with Bearer hf_abcdefGHIJ1234567890")
    printed = capsys.readouterr().err
    assert "cannot open" in printed and "s3cr3t" not in printed and "hf_abc" not in printed
    log = runlog.setup_logging(types.SimpleNamespace(is_main_process=False))
    log.info("not me")
    log.error("but this")
    assert capsys.readouterr().err.count("\n") == 1
    assert log is logging.getLogger("brisk") and len(log.handlers) == 1


def test_manifest_and_options_are_written(tmp_path):
    runlog.write_manifest(tmp_path, {"b": 1, "a": "x"}, {"global_batch": 8})
    assert yaml.safe_load((tmp_path / "train_config.yaml").read_text()) == {"a": "x", "b": 1}
    manifest = json.loads((tmp_path / "run_manifest.json").read_text())
    assert manifest["global_batch"] == 8 and manifest["packages"]["torch"] == torch.__version__
    assert {"python", "platform", "commit", "device", "cpu_cores"} <= set(manifest)


def test_images_reach_tensorboard_as_nhwc_and_wandb_with_captions(monkeypatch):
    from PIL import Image

    sent = {}
    writer = types.SimpleNamespace(
        add_images=lambda tag, stack, step, dataformats: sent.update(tb=(tag, stack, step, dataformats))
    )
    trackers = [
        types.SimpleNamespace(name="tensorboard", writer=writer),
        types.SimpleNamespace(name="wandb", log=lambda values, step: sent.update(wandb=(values, step))),
    ]
    fake = types.SimpleNamespace(Image=lambda image, caption: (image.size, caption))
    monkeypatch.setitem(__import__("sys").modules, "wandb", fake)
    images = [Image.new("RGB", (4, 6), (255, 0, 0))] * 2
    runlog.log_images(types.SimpleNamespace(trackers=trackers), "v", images, ["a", "b"], 7)
    tag, stack, step, dataformats = sent["tb"]
    assert (tag, stack.shape, str(stack.dtype), step, dataformats) == ("v", (2, 6, 4, 3), "uint8", 7, "NHWC")
    assert sent["wandb"] == ({"v": [((4, 6), "a"), ((4, 6), "b")]}, 7)


def test_no_tracker_file_holds_the_hub_token_of_the_command_line(tmp_path, monkeypatch):
    """wandb stores the command line with every run."""
    pytest.importorskip("wandb")
    token = "plain-token-without-prefix"
    monkeypatch.setattr(runlog.sys, "argv", ["train.py", f"--hub_token={token}", "--seed=1"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    accelerator = Accelerator(cpu=True, log_with=["wandb", "tensorboard"], project_dir=str(tmp_path))
    try:
        runlog.start_trackers(accelerator, "brisk-test", {"learning_rate": 0.25}, tmp_path / "logs")
        accelerator.log({"loss": 1.0}, step=1)
        accelerator.end_training()
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and any("tfevents" in path.name for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []
    assert runlog.sys.argv[1] == f"--hub_token={token}", "it is put back"


def test_a_tracker_that_does_not_start_is_one_sentence(tmp_path):
    def refuse(*args, **settings):
        raise RuntimeError("no API key\nconfigured")

    accelerator = types.SimpleNamespace(log_with=["wandb"], init_trackers=refuse)
    given = list(sys.argv)
    with pytest.raises(UserError, match="--report_to: the tracker does not start: no API key configured"):
        runlog.start_trackers(accelerator, "project", {}, tmp_path / "logs")
    assert sys.argv == given
