"""Stopped and killed EPD runs go on bit for bit, the best table included; other students are refused."""

import functools
import json
import shutil
import signal

import pytest
import torch
from conftest import EPD, read_rows
from inprocess import assert_equal
from safetensors.torch import load_file
from test_bksdm_resume import read_lines, wait_until

from brisk import checkpoint, epd, predictor_files
from brisk.options import UserError

STEPS = 6
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--eval_every=3", "--coslr", "--learning_rate=0.3")
SETUPS = {
    "joint": ("--update_mode=joint",),
    "per_step, average": ("--update_mode=per_step", "--ema_decay=0.7", "--num_steps=4"),
    "plug-in, micro-batches": ("--sampler_stu=ipndm", "--batch_gpu=4", "--num_steps=4"),
    "slow": ("--update_mode=joint", "--M=7", "--teacher_substeps=2", "--batch_gpu=2"),
    "detach, normal start": ("--update_mode=detach", "--init=normal", "--eval_every=1"),
}  # fmt: skip
LOGGED = ("step", "images", "loss", "lr", "grad_norm", "interval/0", "interval/1", "table/r/1.1", "table/scale_time/0.1")


@pytest.fixture(scope="module")
def unbroken(run_epd):
    """A function: setup -> the run that nobody interrupted (each made once)."""
    return functools.cache(lambda setup="joint": run_epd(*FLAGS, *SETUPS[setup]))


def tables(output):
    """Every tensor of the last checkpoint, and the raw tables that were exported and shown last."""
    found = load_file(output / f"checkpoint-{STEPS}/tables.safetensors")
    for name, path in (("export", output / "export/predictor.json"), ("snapshot", output / "predictor-000000.json")):
        found |= dict(zip((f"{name}.{field}" for field in epd.Tables._fields), predictor_files.read(path).raw, strict=False))
    return found


def assert_same_run(output, expected):
    """Same tables, moments and averages bit for bit, each step logged once with the same numbers, the same validations."""
    assert_equal(tables(output), tables(expected.output))
    found, wanted = ([[row[name] for name in LOGGED] for row in rows] for rows in (read_rows(output), expected.rows))
    assert found == wanted
    assert [row["step"] for row in read_rows(output)] == list(range(1, STEPS + 1))
    assert (output / "report.json").read_text() == (expected.output / "report.json").read_text()


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("step", [3, 4])  # at 3 the validation comes after the checkpoint
def test_stopped_by_sigterm_it_saves_exits_143_and_goes_on_bit_for_bit(step, setup, run_epd, unbroken, signal_at, monkeypatch,
                                                                       tmp_path):  # fmt: skip
    output, flags = tmp_path / "out", (*FLAGS, *SETUPS[setup], "--resume=latest")
    signal_at(signal.SIGTERM, step)
    with pytest.raises(SystemExit) as stopped:
        run_epd(*flags, output=output)
    assert stopped.value.code == 143 and f"Stopped by signal 15 after step {step}" in run_epd.log()
    assert checkpoint.damage(output / f"checkpoint-{step}") is None
    assert not (output / "report.json").exists(), "a stopped run must not look finished"
    monkeypatch.undo()
    run = run_epd(*flags, output=output)
    assert f"Resuming from {output / f'checkpoint-{step}'}: step {step} of {STEPS}" in run.log
    assert_same_run(output, unbroken(setup))


def test_setups_train_differently(unbroken):
    """Guards the comparisons above: a flag that did nothing would resume exactly too."""
    assert len({tuple(row["loss"] for row in unbroken(setup).rows) for setup in SETUPS}) == len(SETUPS)
    assert len({row["lr"] for row in unbroken().rows}) == STEPS
    found = tables(unbroken("per_step, average").output)
    assert not torch.equal(found["raw.r"], found["average.r"])


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(unbroken, fork_script, tmp_path):
    output, flags = tmp_path / "out", (*FLAGS, *SETUPS["slow"], "--resume=latest")
    expected, kills = unbroken("slow"), 0
    for moment in (lambda: len(read_lines(output)) >= 1,
                   lambda: any(output.glob(".checkpoint-4.tmp/*")) or (output / "checkpoint-4").exists()):  # fmt: skip
        process = fork_script(f"--output_dir={output}", *flags, script=EPD)
        if wait_until(moment, process):
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = fork_script(f"--output_dir={output}", *flags, script=EPD)
    assert last.wait() == 0, last.err()
    assert_same_run(output, expected)
    assert not list(output.glob(".checkpoint-*"))


def test_damaged_checkpoint_is_skipped_and_an_older_one_used(unbroken, run_epd, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    (output / f"checkpoint-{STEPS}/tables.safetensors").write_bytes(b"")
    run = run_epd(*FLAGS, *SETUPS["joint"], "--resume=latest", output=output)
    assert f"Skipping {output / f'checkpoint-{STEPS}'}: " in run.log and f"Resuming from {output / 'checkpoint-4'}" in run.log
    assert_same_run(output, unbroken())


def test_a_finished_run_goes_on_to_more_steps_and_keeps_its_best_table(unbroken, run_epd, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    run = run_epd(*FLAGS, *SETUPS["joint"], "--resume=latest", "--max_train_steps=9", "--eval_every=0", output=output)
    assert [row["step"] for row in run.rows] == list(range(1, 10))
    before, after = (json.loads((each / "report.json").read_text()) for each in (unbroken().output, output))
    assert after["start"] == before["start"]
    assert after["best"] == {"step": 3, "error": before["history"][0][1]}, "the validation of step 6 came after its checkpoint"


def test_the_newest_run_of_the_same_settings_goes_on_and_others_get_a_number_of_their_own(run_epd, tmp_path):
    def train(*flags):
        run_epd("--nosubdir=False", "--eval_every=0", "--checkpointing_steps=1", *flags, output=tmp_path)
        return sorted(path.name[:5] for path in tmp_path.iterdir())

    assert train() == ["00001"]
    assert train() == ["00001", "00002"], "without --resume it is a new run"
    assert train("--num_steps=4") == ["00001", "00002", "00003"]
    assert train("--resume=latest", "--max_train_steps=3") == ["00001", "00002", "00003"]
    (second,) = tmp_path.glob("00002-*")
    assert [row["step"] for row in read_rows(second)] == [1, 2, 3] and f"Resuming from {second}/checkpoint-2" in run_epd.log()
    assert train("--resume=latest", "--M=2") == ["00001", "00002", "00003", "00004"]
    assert "No usable checkpoint" in run_epd.log()


@pytest.mark.parametrize(("flag", "sentence"), [
    ("--num_steps=4", "--num_steps is 4, the tables in {} were trained with 3."),
    ("--num_points=3", "--num_points is 3, the tables in {} were trained with 2."),
    ("--sampler_stu=ipndm", "--sampler_stu is ipndm, the tables in {} were trained with epd."),
    ("--schedule_type=logsnr", "--schedule_type is logsnr, the tables in {} were trained with time_uniform."),
    ("--schedule_rho=2", "--schedule_rho is 2.0, the tables in {} were trained with 1.0."),
    ("--afs=False", "--afs is False, the tables in {} were trained with True."),
    ("--scale_time=0.1", "--scale_time is 0.1, the tables in {} were trained with 0.05."),
])  # fmt: skip
def test_checkpoint_of_another_student_is_refused_with_both_values(flag, sentence, unbroken, run_epd, tmp_path):
    source = unbroken().output / "checkpoint-4"
    with pytest.raises(UserError) as refused:
        run_epd(*FLAGS, flag, f"--resume={source}", output=tmp_path / "out")
    assert str(refused.value) == sentence.format(source) and refused.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_changed_options_are_logged_and_old_checkpoints_are_deleted(unbroken, run_epd, tmp_path):
    source = unbroken().output / "checkpoint-2"
    run = run_epd(*FLAGS, *SETUPS["joint"], f"--resume={source}", "--sampler_tea=heun", "--batch=16", "--checkpoints_total_limit=1",
                  output=tmp_path / "out")  # fmt: skip
    assert "--sampler_tea is heun, the checkpoint had dpm." in run.log and "--batch is 16, the checkpoint had 8." in run.log
    assert [row["step"] for row in run.rows] == [3, 4, 5, 6]
    assert [path.name for path in run.output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_another_run_in_the_same_folder_is_set_aside(unbroken, run_epd, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    run = run_epd(*FLAGS, "--max_train_steps=2", output=output)
    assert "of another run: moved to" in run.log and (output / "earlier-1/checkpoint-6").is_dir()
    assert [row["step"] for row in run.rows] == [1, 2]
