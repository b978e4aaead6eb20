"""Stopped and killed runs of train_epd_rl.py go on bit for bit, evaluations and the best table included."""

import functools
import json
import shutil
import signal

import pytest
from conftest import read_rows
from epd_rl_runs import SCRIPT, flags, run, start_file
from inprocess import assert_equal
from safetensors.torch import load_file
from test_bksdm_resume import read_lines, wait_until

from brisk import checkpoint, predictor_files
from brisk.options import UserError

STEPS = 6
FLAGS = (f"--max_steps={STEPS}", "logging.save_interval=2", "--eval_every=3")
SETUPS = {
    "plain": (), "published grouping": ("--rloo_group=mixed", "--share_latents=False", "ppo.ppo_epochs=2"),
    "frozen factors": ("ppo.train_scale_dir=false", "ppo.train_scale_time=false", "--eval_every=1"),
    "slow": ("ppo.rollout_batch_size=64", "ppo.ppo_epochs=4", "--eval_every=2"),
}  # fmt: skip
TIMES = ("elapsed_sec", "steps_per_sec", "images_per_second", "data_wait_share", "peak_memory_gib")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return start_file(tmp_path_factory.mktemp("start"), scale=0.2)


@pytest.fixture(scope="module")
def unbroken(start, tmp_path_factory):
    """A function: setup -> the run that nobody interrupted (each made once)."""
    return functools.cache(lambda setup="plain": run(tmp_path_factory.mktemp("unbroken") / "out", start, *FLAGS, *SETUPS[setup]))


def assert_same_run(output, expected):
    """Same policy, moments and best table bit for bit, each update logged once with the same numbers, the same evaluations."""
    place = f"checkpoint-{STEPS}/policy.safetensors"
    assert_equal(load_file(output / place), load_file(expected.output / place))
    found, wanted = ([{name: value for name, value in row.items() if name not in TIMES} for row in rows]
                     for rows in (read_rows(output), expected.rows))  # fmt: skip
    assert found == wanted and [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert (output / "report.json").read_text() == (expected.output / "report.json").read_text()
    for name in ("export/predictor.json", "predictor-000006.json"):
        tables = [dict(enumerate(predictor_files.read(each / name).raw[:4])) for each in (output, expected.output)]
        assert_equal(*tables)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("step", [3, 4])  # at 3 the evaluation comes after the checkpoint
def test_stopped_by_sigterm_it_saves_exits_143_and_goes_on_bit_for_bit(step, setup, start, unbroken, signal_at, monkeypatch,
                                                                       tmp_path, capsys):  # fmt: skip
    output, more = tmp_path / "out", (*FLAGS, *SETUPS[setup], "--resume=latest")
    signal_at(signal.SIGTERM, step)
    with pytest.raises(SystemExit) as stopped:
        run(output, start, *more)
    assert stopped.value.code == 143 and checkpoint.damage(output / f"checkpoint-{step}") is None
    assert not (output / "export").exists(), "a stopped run must not look finished"
    monkeypatch.undo()
    done = run(output, start, *more)
    assert f"Resuming from {output / f'checkpoint-{step}'}: step {step} of {STEPS}" in done.log
    assert_same_run(output, unbroken(setup))


def test_setups_train_differently(unbroken):
    """Guards the comparisons above: a setting that did nothing would resume exactly too."""
    assert len({tuple(row["loss"] for row in unbroken(setup).rows) for setup in SETUPS}) == len(SETUPS)
    report = json.loads((unbroken().output / "report.json").read_text())
    assert [found["step"] for found in report["history"]] == [0, 3, 6]


def test_killed_at_any_moment_it_ends_like_an_unbroken_run(start, unbroken, fork_script, tmp_path):
    output = tmp_path / "out"
    more = [*flags(start, *FLAGS, *SETUPS["slow"], "--resume=latest"), f"--output_dir={output}"]
    expected, kills = unbroken("slow"), 0
    for moment in (lambda: len(read_lines(output)) >= 1,
                   lambda: any(output.glob(".checkpoint-4.tmp/*")) or (output / "checkpoint-4").exists()):  # fmt: skip
        process = fork_script(*more, whole=True, script=SCRIPT)
        if wait_until(moment, process):
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = fork_script(*more, whole=True, script=SCRIPT)
    assert last.wait() == 0, last.err()
    assert_same_run(output, expected)
    assert not list(output.glob(".checkpoint-*"))


def test_damaged_checkpoint_is_skipped_and_an_older_one_used(start, unbroken, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    (output / f"checkpoint-{STEPS}/policy.safetensors").write_bytes(b"")
    done = run(output, start, *FLAGS, "--resume=latest")
    assert f"Skipping {output / f'checkpoint-{STEPS}'}: " in done.log and f"Resuming from {output / 'checkpoint-4'}" in done.log
    assert_same_run(output, unbroken())


def test_evaluation_may_begin_after_a_resume_and_still_compares_with_the_start(start, unbroken, tmp_path):
    run(tmp_path / "out", start, *FLAGS, "--max_steps=2", "--eval_every=0")
    run(tmp_path / "out", start, *FLAGS, "--resume=latest")
    found, wanted = (json.loads((output / "report.json").read_text()) for output in (tmp_path / "out", unbroken().output))
    assert found == wanted


def test_changed_settings_are_logged(start, unbroken, tmp_path):
    source = unbroken().output / "checkpoint-4"
    done = run(tmp_path / "out", start, *FLAGS, f"--resume={source}", "ppo.learning_rate=0.002", "--rloo_group=mixed")
    assert "ppo.learning_rate is 0.002, the checkpoint had 0.001." in done.log
    assert "--rloo_group is mixed, the checkpoint had prompt." in done.log
    assert [row["step"] for row in done.rows] == [5, 6]


@pytest.mark.parametrize(("setting", "words"), [
    ("ppo.dirichlet_concentration=30", "ppo.dirichlet_concentration is 30.0, the checkpoint had 20.0"),
    ("ppo.train_scale_dir=false", "ppo.train_scale_dir is False, the checkpoint had None"),
    ("ppo.scale_std=0.1", "ppo.scale_std is 0.1, the checkpoint had 0.05"),
])  # fmt: skip
def test_a_policy_that_starts_elsewhere_is_refused(setting, words, start, unbroken, tmp_path):
    with pytest.raises(UserError) as refused:
        run(tmp_path / "out", start, *FLAGS, f"--resume={unbroken().output / 'checkpoint-4'}", setting)
    assert words in str(refused.value) and "starts from other tables or distributions" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_other_tables_are_refused(unbroken, tmp_path):
    other = start_file(tmp_path, scale=0.3)
    with pytest.raises(UserError, match="data.predictor_snapshot is .*, the checkpoint had"):
        run(tmp_path / "out", other, *FLAGS, f"--resume={unbroken().output / 'checkpoint-4'}")


@pytest.mark.parametrize("change, words", [
    ("reward.type=dummy", "reward.type is dummy, the checkpoint"), ("--eval_samples=9", "eval_samples is 9, the checkpoint"),
])  # fmt: skip
def test_evaluations_of_other_things_are_not_compared(change, words, start, tmp_path):
    run(tmp_path / "out", start, "--max_steps=1", "--eval_every=1")
    with pytest.raises(UserError, match=words):
        run(tmp_path / "out", start, "--max_steps=2", "--eval_every=1", change, "--resume=latest")


def test_a_new_run_in_the_same_folder_leaves_no_old_result_to_be_found(start, tmp_path):
    run(tmp_path / "out", start, "--max_steps=1", "--eval_every=1")
    (tmp_path / "out/report.json").write_text("old")
    run(tmp_path / "out", start, "--max_steps=1", "--eval_every=0", "--seed=9")
    assert (tmp_path / "out/earlier-1/report.json").read_text() == "old"
    assert (tmp_path / "out/earlier-1/export/predictor.json").is_file()
