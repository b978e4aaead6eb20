"""Killed, stopped and damaged runs: the same command goes on from the last complete checkpoint, bit for bit."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import read_rows
from safetensors.torch import load_file

from brisk import checkpoint, options, runlog

STEPS = 10
FLAGS = (f"--max_train_steps={STEPS}", "--checkpointing_steps=2", "--resume_from_checkpoint=latest",
         "--lr_scheduler=cosine", "--lr_warmup_steps=3", "--learning_rate=0.01", "--random_flip")  # fmt: skip
SETUPS = {
    "no workers": (),
    "two workers": ("--dataloader_num_workers=2",),
    "two workers, accumulation": ("--dataloader_num_workers=2", "--gradient_accumulation_steps=2"),
}


@pytest.fixture(scope="module")
def unbroken(run_main):
    """A function: flags -> the run that nobody interrupted (made once per set of flags)."""
    runs = {}

    def get(*flags):
        if flags not in runs:
            runs[flags] = run_main(*FLAGS, *flags)
        return runs[flags]

    return get


def weights(output):
    """The final tensors of the online and target U-Nets (LoRA: of the adapters), as bytes by file and name."""
    files = [output / f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "unet_target")]
    files = [path for path in (*files, output / "pytorch_lora_weights.safetensors") if path.is_file()]
    assert files, "no model was written"
    return {(path.name, path.parent.name * (path.parent != output), name): tensor.numpy().tobytes()
            for path in files for name, tensor in load_file(path).items()}  # fmt: skip


def assert_same_run(output, expected):
    """Same final weights bit for bit, each step logged once, with the same numbers."""
    assert weights(output) == weights(expected.output)
    rows = read_rows(output)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected.rows, strict=True):
        assert [row[name] for name in ("loss", "lr", "grad_norm", "images")] == [
            wanted[name] for name in ("loss", "lr", "grad_norm", "images")
        ]


def wait_until(happened, process):
    """Poll until `happened()`; False if the process ends before. A process that hangs is killed."""
    end = time.monotonic() + 240
    while not happened():
        if process.poll() is not None:
            return False
        if time.monotonic() > end:
            process.kill()
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("setup", SETUPS)
def test_killed_at_random_moments_it_ends_like_an_unbroken_run(setup, unbroken, fork_script, tmp_path):
    output, chance, flags = tmp_path / "out", random.Random(setup), SETUPS[setup]
    moments = [
        lambda: len(read_lines(output)) >= 3,
        lambda: any(output.glob(".checkpoint-*.tmp")) and len(read_lines(output)) >= 5,
        lambda: (output / "checkpoint-8").is_dir(),
    ]
    kills = 0
    for moment in moments:
        process = fork_script(f"--output_dir={output}", *FLAGS, *flags)
        if wait_until(moment, process):
            time.sleep(chance.random() * 0.05)
            process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    last = fork_script(f"--output_dir={output}", *FLAGS, *flags)
    assert last.wait() == 0, last.err()
    assert_same_run(output, unbroken(*flags))
    assert not list(output.glob(".checkpoint-*"))


def read_lines(output):
    """Complete lines of metrics.jsonl so far."""
    path = output / "metrics.jsonl"
    return path.read_text().split("\n")[:-1] if path.is_file() else []


POINTS = {
    "while files of a checkpoint are written": (checkpoint, "write_atomically", lambda p, *_: "6.tmp/rank" in str(p)),
    "before the rename": (checkpoint.os, "rename", lambda old, new: str(new).endswith("checkpoint-6")),
    "between rename and marker": (checkpoint, "write_atomically", lambda p, *_: "checkpoint-6/trainer" in str(p)),
    "in the middle of pruning": (checkpoint.shutil, "rmtree", lambda p, *_, **__: str(p).endswith("checkpoint-4")),
    "while a metrics row is due": (runlog, "_short", lambda value: value == 7),
    "while the model is exported": (checkpoint, "_sync", lambda p: (p / "unet_target").exists() and p.name == "out"),
}


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_critical_point_it_ends_like_an_unbroken_run(point, unbroken, run_main, fork_script, tmp_path):
    output = tmp_path / "out"
    flags = (*FLAGS, "--checkpoints_total_limit=1")
    module, name, when = POINTS[point]

    def arm():
        original = getattr(module, name)

        def deadly(*args, **named):
            if when(*args):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **named)

        setattr(module, name, deadly)

    process = fork_script(f"--output_dir={output}", *flags, prepare=arm)
    assert process.wait() == -signal.SIGKILL, "the run was not killed where it should be"
    assert any(checkpoint.damage(folder) is None for folder in output.glob("checkpoint-*")), "no checkpoint was left"
    run = run_main(*flags, output=output)
    assert "Resuming from" in run.log
    assert_same_run(output, unbroken())
    assert [folder.name for folder in output.glob("*checkpoint-*")] == [f"checkpoint-{STEPS}"]


@pytest.mark.parametrize(("setup", "number", "code"), (
    ("no workers", signal.SIGINT, 130), ("no workers", signal.SIGTERM, 143), ("two workers", signal.SIGINT, 130),
    ("two workers, accumulation", signal.SIGTERM, 143),
))  # fmt: skip
def test_stop_signal_saves_and_exits_with_its_code_and_the_run_goes_on(
    number, code, setup, unbroken, run_main, signal_at, monkeypatch, tmp_path
):
    output, flags = tmp_path / "out", SETUPS[setup]
    with monkeypatch.context():
        signal_at(number, 5)
        with pytest.raises(SystemExit) as stopped:
            run_main(*FLAGS, *flags, output=output)
    assert stopped.value.code == code
    assert f"Stopped by signal {int(number)} after step 5" in run_main.log()
    assert checkpoint.damage(output / "checkpoint-5") is None
    assert not (output / "unet").exists(), "a stopped run must not look finished"
    monkeypatch.undo()
    run_main(*FLAGS, *flags, output=output)
    assert_same_run(output, unbroken(*flags))


def test_sigterm_to_the_whole_group_with_loader_workers_saves_and_exits_143(fork_script, tmp_path):
    output, flags = tmp_path / "out", SETUPS["two workers"]
    endless = ("--max_train_steps=100000", "--lr_scheduler=constant")
    process = fork_script(f"--output_dir={output}", *FLAGS, *flags, *endless)
    assert wait_until(lambda: len(read_lines(output)) >= 3, process), process.err()
    process.kill(signal.SIGTERM)
    assert process.wait() == 143, process.err()
    assert "Traceback" not in process.err()
    last = read_rows(output)[-1]["step"]
    assert checkpoint.damage(output / f"checkpoint-{last}") is None, process.err()


def test_truncated_newest_checkpoint_is_skipped_with_a_message(run_main, unbroken, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    files = {"checkpoint-10": "unet/diffusion_pytorch_model.safetensors", "checkpoint-8": "trainer_state.json"}
    for folder, name in files.items():
        path = output / folder / name
        path.write_bytes(path.read_bytes()[:-3])
    (output / "checkpoint-6" / "optimizer.bin").unlink()
    run = run_main(*FLAGS, output=output)
    for folder in ("checkpoint-10", "checkpoint-8", "checkpoint-6"):
        assert f"Skipping {output / folder}: " in run.log
    assert f"Resuming from {output / 'checkpoint-4'}: step 4" in run.log
    assert_same_run(output, unbroken())


def test_latest_with_nothing_there_starts_afresh_and_says_so(unbroken):
    assert "No usable checkpoint" in unbroken().log and "starting a new run" in unbroken().log


def test_a_finished_run_is_exported_again_unchanged(run_main, unbroken, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    shutil.rmtree(output / "unet")
    run_main(*FLAGS, output=output)
    assert_same_run(output, unbroken())


@pytest.mark.parametrize("flags", (
    ("--use_lora", "--lora_ema", "--lora_dropout=0.3"),
    ("--mixed_precision=bf16", "--ema_decay=0.999", "--gradient_checkpointing", "--channels_last"),
    ("--use_8bit_adam", "--subpath_param=snr", "--loss_type=huber"),
), ids=" ".join)  # fmt: skip
def test_every_kind_of_state_survives_a_stop(flags, run_main, unbroken, signal_at, monkeypatch, tmp_path):
    expected = unbroken(*flags)
    with monkeypatch.context():
        signal_at(signal.SIGTERM, 5)
        with pytest.raises(SystemExit):
            run_main(*FLAGS, *flags, output=tmp_path / "out")
    monkeypatch.undo()
    run_main(*FLAGS, *flags, output=tmp_path / "out")
    assert_same_run(tmp_path / "out", expected)


def test_fresh_data_after_a_resume_keeps_the_weights_but_draws_other_samples(run_main, unbroken, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(unbroken().output, output)
    for name in ("checkpoint-10", "checkpoint-8", "checkpoint-6"):
        shutil.rmtree(output / name)
    run = run_main(*FLAGS, "--data_resume=fresh", output=output)
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in run.rows[:4]] == [row["loss"] for row in unbroken().rows[:4]]
    assert run.rows[5]["loss"] != unbroken().rows[5]["loss"]


def test_checkpoint_can_lie_outside_the_output_folder(run_main, unbroken, tmp_path):
    source = unbroken().output / "checkpoint-6"
    run = run_main(*FLAGS[:2], *FLAGS[3:], f"--resume_from_checkpoint={source}", output=tmp_path / "out")
    assert weights(run.output) == weights(unbroken().output)
    assert [row["step"] for row in run.rows] == [7, 8, 9, 10]


@pytest.mark.parametrize(("flags", "words"), (
    (("--resume_from_checkpoint={}/checkpoint-7",), ("neither a folder",)),
    (("--resume_from_checkpoint={}/unet",), ("cannot be used", "not finished")),
    (("--resume_from_checkpoint={}/checkpoint-6", "--num_ddim_timesteps=10"), ("num_ddim_timesteps", "50", "10")),
    (("--resume_from_checkpoint={}/checkpoint-6", "--use_lora"), ("use_lora",)),
    (("--resume_from_checkpoint={}/checkpoint-6", "--prediction_type=sample"), ("prediction_type", "sample")),
    (("--resume_from_checkpoint={}/checkpoint-6", "--unet_time_cond_proj_dim=8"), ("checkpoint-6", "cond_proj.weight", "flags")),
))  # fmt: skip
def test_checkpoint_that_does_not_fit_is_one_clear_sentence(flags, words, run_main, unbroken, tmp_path):
    given = [flag.format(unbroken().output) for flag in flags]
    with pytest.raises(options.UserError) as error:
        run_main(*FLAGS, *given, output=tmp_path / "out")
    assert error.value.args and all(word in str(error.value) for word in words)


def test_recorded_seed_is_used_again_when_none_is_given(run_main, monkeypatch, tmp_path):
    import train_splam_distill_sd_wds as script

    parse_args = script.parse_args

    def without_seed(argv):
        args, given = parse_args(argv)
        args.seed = None
        return args, given

    monkeypatch.setattr(script, "parse_args", without_seed)
    seeds = []
    for steps in (4, 6):
        run = run_main(*FLAGS, f"--max_train_steps={steps}", output=tmp_path / "out")
        seeds.append(json.loads((run.output / "run_manifest.json").read_text())["seed"])
    assert seeds[0] == seeds[1]
    other = run_main("--max_train_steps=1")
    assert json.loads((other.output / "run_manifest.json").read_text())["seed"] != seeds[0]


def test_other_adapters_than_the_checkpoints_are_refused(run_main, unbroken, tmp_path):
    source = unbroken("--use_lora").output / "checkpoint-6"
    for flag in ("--lora_rank=8", "--lora_target_modules=to_q,to_k", "--lora_ema"):
        with pytest.raises(options.UserError, match="checkpoint-6 do not fit this run"):
            run_main(*FLAGS, "--use_lora", flag, f"--resume_from_checkpoint={source}", output=tmp_path / "out")


def test_options_that_differ_from_the_checkpoints_are_logged(run_main, unbroken, tmp_path):
    source = unbroken().output / "checkpoint-6"
    flags = (*FLAGS[:2], *FLAGS[3:], f"--resume_from_checkpoint={source}")
    same = run_main(*flags, output=tmp_path / "same")
    assert "Resuming from" in same.log and "the checkpoint had" not in same.log
    run = run_main(*flags, "--learning_rate=0.5", "--loss_type=huber", "--log_every=2", output=tmp_path / "changed")
    assert "--loss_type is huber, the checkpoint had l2." in run.log
    assert "--learning_rate is 0.5, the checkpoint had 0.01; the checkpoint's optimizer keeps it." in run.log
    assert run.log.count("the checkpoint had") == 2, "how often it logs may change"
    assert [row["step"] for row in run.rows] == [8, 10]
    assert [row["lr"] for row in run.rows] == [same.rows[1]["lr"], same.rows[3]["lr"]], "it does keep it"
    assert run.rows[0]["loss"] != same.rows[1]["loss"]


def test_checkpoint_that_does_not_know_its_options_is_gone_on_from(run_main, unbroken, tmp_path):
    source = tmp_path / "checkpoint-6"
    shutil.copytree(unbroken().output / "checkpoint-6", source)
    state = json.loads((source / "trainer_state.json").read_text())
    assert state.pop("options")["learning_rate"] == 0.01
    (source / "trainer_state.json").write_text(json.dumps(state))
    run = run_main(*FLAGS[:2], *FLAGS[3:], f"--resume_from_checkpoint={source}", "--loss_type=huber", output=tmp_path / "out")
    assert [row["step"] for row in run.rows] == [7, 8, 9, 10] and "the checkpoint had" not in run.log
