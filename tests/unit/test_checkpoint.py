"""Checkpoints: complete or skipped, never half; failures while saving; pruning; signals."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from brisk import checkpoint
from brisk.checkpoint import MARKER
from brisk.options import UserError

pytestmark = pytest.mark.quick


@pytest.fixture
def accelerator():
    """One on the CPU with a network and an optimizer to save."""
    made = Accelerator(cpu=True)
    network = torch.nn.Linear(3, 3)
    made.network, made.optimizer = made.prepare(network, torch.optim.AdamW(network.parameters()))
    yield made
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def save(accelerator, output, step, limit=None, state=None):
    return checkpoint.save_checkpoint(accelerator, output, step, state or {"seed": 1}, {"batches": step}, limit)


def names(output):
    return sorted(path.name for path in output.iterdir())


def test_a_saved_checkpoint_is_complete_and_readable(accelerator, tmp_path):
    assert save(accelerator, tmp_path, 5) is None
    folder = tmp_path / "checkpoint-5"
    assert names(tmp_path) == ["checkpoint-5"] and checkpoint.damage(folder) is None
    state = checkpoint.read_state(folder)
    assert state["step"] == 5 and state["seed"] == 1
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(state["files"]) == files - {MARKER}
    assert checkpoint.read_rank_state(folder, 0) == {"batches": 5}


def test_a_rank_that_was_not_there_gets_the_first_ones_state(accelerator, tmp_path):
    """The position in a folder is the same for all ranks, so that more processes can go on from it."""
    save(accelerator, tmp_path, 5)
    assert checkpoint.read_rank_state(tmp_path / "checkpoint-5", 3) == {"batches": 5}


def test_training_state_comes_back(accelerator, tmp_path):
    def train():
        accelerator.optimizer.zero_grad()
        accelerator.network(torch.ones(3)).square().sum().backward()
        accelerator.optimizer.step()

    train()
    save(accelerator, tmp_path, 1)
    train()
    expected = [parameter.clone() for parameter in accelerator.network.parameters()]
    accelerator.load_state(str(tmp_path / "checkpoint-1"))
    train()
    assert all(torch.equal(a, b) for a, b in zip(expected, accelerator.network.parameters(), strict=True))


def test_network_hooks_replace_accelerates_own_files(accelerator, tmp_path):
    stored = []

    def save_networks(folder, extra):
        stored.append(extra)
        (folder / "mine").write_text("x")

    def load_networks(folder, extra):
        stored.append((folder / "mine").read_text() + extra)

    checkpoint.use_network_hooks(accelerator, save_networks, load_networks, {"extra": "y"})
    save(accelerator, tmp_path, 1)
    assert "mine" in names(tmp_path / "checkpoint-1") and "model.safetensors" not in names(tmp_path / "checkpoint-1")
    accelerator.load_state(str(tmp_path / "checkpoint-1"))
    assert stored == ["y", "xy"]


def truncate(folder):
    path = next(folder.glob("optimizer*"))
    path.write_bytes(path.read_bytes()[:-1])


def remove(folder):
    next(folder.glob("optimizer*")).unlink()


DAMAGE = {
    "truncated file": (truncate, "bytes instead of"), "missing file": (remove, "is missing"),
    "no marker": (lambda f: (f / MARKER).unlink(), "was not finished"),
    "cut marker": (lambda f: (f / MARKER).write_text((f / MARKER).read_text()[:40]), "is damaged"),
    "empty marker": (lambda f: (f / MARKER).write_text(""), "is damaged"),
    "binary marker": (lambda f: (f / MARKER).write_bytes(b"\xff\xfe\0"), "is damaged"),
    "marker of another kind": (lambda f: (f / MARKER).write_text("[]"), "is damaged"),
    "marker without files": (lambda f: (f / MARKER).write_text('{"step": 2}'), "is damaged"),
    "files of another kind": (lambda f: (f / MARKER).write_text('{"step": 2, "files": [1]}'), "is damaged"),
    "empty folder": (lambda f: [path.unlink() for path in f.iterdir()], "was not finished"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_damaged_checkpoint_is_skipped_with_its_reason(accelerator, tmp_path, kind):
    save(accelerator, tmp_path, 1)
    save(accelerator, tmp_path, 12)
    harm, reason = DAMAGE[kind]
    harm(tmp_path / "checkpoint-12")
    assert reason in checkpoint.damage(tmp_path / "checkpoint-12")
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", said.append) == tmp_path / "checkpoint-1"
    assert len(said) == 1 and "checkpoint-12" in said[0] and reason in said[0]
    with pytest.raises(UserError, match="checkpoint-12 cannot be used"):
        checkpoint.find_checkpoint(tmp_path, "checkpoint-12", said.append)


def test_latest_is_the_largest_step_and_not_the_last_name(accelerator, tmp_path):
    for step in (9, 10, 2):
        save(accelerator, tmp_path, step)
    (tmp_path / "checkpoint-99x").mkdir()
    (tmp_path / ".checkpoint-11.tmp").mkdir()
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", said.append) == tmp_path / "checkpoint-10" and said == []


def test_latest_without_any_starts_a_new_run_with_a_message(tmp_path):
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", said.append) is None
    assert len(said) == 1 and "starting a new run" in said[0]
    assert checkpoint.find_checkpoint(tmp_path, None, said.append) is None and len(said) == 1


def test_explicit_paths_inside_and_outside_the_output_folder(accelerator, tmp_path):
    save(accelerator, tmp_path / "a", 3)
    for wanted in ("checkpoint-3", str(tmp_path / "a/checkpoint-3")):
        found = checkpoint.find_checkpoint(tmp_path / "a", wanted, pytest.fail)
        assert found.resolve() == (tmp_path / "a/checkpoint-3").resolve()
    assert checkpoint.find_checkpoint(tmp_path / "b", str(tmp_path / "a/checkpoint-3"), pytest.fail) is not None
    with pytest.raises(UserError, match="neither a folder nor one inside"):
        checkpoint.find_checkpoint(tmp_path / "b", "checkpoint-3", pytest.fail)


def test_other_settings_than_the_checkpoints_are_refused():
    checkpoint.check_same({"step": 1, "n": 50}, n=50, new="anything")
    with pytest.raises(ValueError, match="trained with n 50, this run has 10"):
        checkpoint.check_same({"n": 50}, n=10)


def test_only_the_newest_complete_ones_and_no_stale_broken_one_are_kept(accelerator, tmp_path):
    for step in (1, 2, 3):
        save(accelerator, tmp_path, step)
    (tmp_path / "checkpoint-2" / MARKER).unlink()
    (tmp_path / "checkpoint-100").mkdir()  # broken and newer than all: perhaps another process is at it
    (tmp_path / "keep-me").mkdir()
    assert save(accelerator, tmp_path, 4, limit=2) is None
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-3", "checkpoint-4", "keep-me"]
    assert save(accelerator, tmp_path, 5, limit=1) is None
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-5", "keep-me"]
    assert save(accelerator, tmp_path, 6) is None
    assert "checkpoint-5" in names(tmp_path), "without a limit nothing is deleted"


def test_the_checkpoint_just_saved_is_never_pruned(accelerator, tmp_path):
    """A run that went on from an older checkpoint, or anew in the same folder, saves lower steps than lie there."""
    for step in (10, 20, 30):
        save(accelerator, tmp_path, step)
    assert save(accelerator, tmp_path, 15, limit=2) is None
    assert checkpoint.damage(tmp_path / "checkpoint-15") is None
    assert len(names(tmp_path)) == 2


def test_saving_again_replaces_a_damaged_folder_and_a_stale_temporary_one(accelerator, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/junk").write_text("x")
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    (tmp_path / ".checkpoint-4.tmp/junk").write_text("x")
    assert save(accelerator, tmp_path, 4) is None
    assert names(tmp_path) == ["checkpoint-4"] and not (tmp_path / "checkpoint-4/junk").exists()


FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error, when=lambda *_: True, real=None):
    def failing(*args, **kwargs):
        if when(*args):
            raise error
        return real(*args, **kwargs)

    return failing


@pytest.mark.parametrize("error", [FULL, RuntimeError("PytorchStreamWriter failed writing file data/0")])
def test_a_full_disk_while_writing_leaves_the_earlier_ones_and_is_said(accelerator, tmp_path, monkeypatch, error):
    save(accelerator, tmp_path, 1)
    monkeypatch.setattr(accelerator, "save_state", fail(error))
    sentence = save(accelerator, tmp_path, 2, limit=1)
    assert "checkpoint-2 could not be saved" in sentence and str(error).split("]")[-1].strip() in sentence
    assert names(tmp_path) == ["checkpoint-1"] and checkpoint.damage(tmp_path / "checkpoint-1") is None
    monkeypatch.undo()
    assert save(accelerator, tmp_path, 3, limit=1) is None, "the next one works again"
    assert names(tmp_path) == ["checkpoint-3"]


@pytest.mark.parametrize("place", ["_publish", "rename", "marker"])
def test_a_failure_while_publishing_leaves_the_earlier_ones_usable(accelerator, tmp_path, monkeypatch, place):
    save(accelerator, tmp_path, 1)
    if place == "_publish":
        monkeypatch.setattr(checkpoint, "_publish", fail(FULL))
    elif place == "rename":
        monkeypatch.setattr(checkpoint.os, "rename", fail(FULL))
    else:
        real = checkpoint.write_atomically
        monkeypatch.setattr(checkpoint, "write_atomically", fail(FULL, lambda path, *_: path.name == MARKER, real))
    sentence = save(accelerator, tmp_path, 2, limit=1)
    assert "No space left on device" in sentence and "earlier checkpoints are kept" in sentence
    said = []
    assert checkpoint.find_checkpoint(tmp_path, "latest", said.append) == tmp_path / "checkpoint-1"
    monkeypatch.undo()
    assert save(accelerator, tmp_path, 3, limit=1) is None
    assert names(tmp_path) == ["checkpoint-3"], "the unfinished one is cleared away"


def test_a_kill_between_rename_and_marker_leaves_no_usable_folder(accelerator, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    save(accelerator, tmp_path, 1)
    real = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", fail(Killed(), lambda path, *_: path.name == MARKER, real))
    with pytest.raises(Killed):
        save(accelerator, tmp_path, 2)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert "not finished" in checkpoint.damage(tmp_path / "checkpoint-2")
    assert checkpoint.find_checkpoint(tmp_path, "latest", lambda m: None) == tmp_path / "checkpoint-1"


def test_a_kill_while_pruning_leaves_no_folder_that_looks_complete(accelerator, tmp_path, monkeypatch):
    save(accelerator, tmp_path, 1)
    real, kept = shutil.rmtree, []
    monkeypatch.setattr(
        checkpoint.shutil, "rmtree", lambda p, **k: kept.append(p) if p.name == "checkpoint-1" else real(p, **k)
    )
    save(accelerator, tmp_path, 2, limit=1)
    assert kept == [tmp_path / "checkpoint-1"] and checkpoint.damage(tmp_path / "checkpoint-1") is not None


def test_a_file_size_limit_is_reported_in_one_sentence(root, tmp_path):
    code = """
import resource, signal, sys
import torch
from accelerate import Accelerator
from brisk import checkpoint
a = Accelerator(cpu=True)
network = a.prepare(torch.nn.Linear(500, 500))
print(checkpoint.save_checkpoint(a, sys.argv[1], 1, {}, {}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
print(checkpoint.save_checkpoint(a, sys.argv[1], 2, {}, {}))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    first, second = done.stdout.strip().splitlines()
    assert first == "None" and second.startswith("checkpoint-2 could not be saved"), done.stderr
    assert names(tmp_path) == ["checkpoint-1"]


def test_atomic_writing_keeps_the_old_text_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    checkpoint.write_atomically(path, "old")
    monkeypatch.setattr(checkpoint.os, "replace", fail(FULL))
    with pytest.raises(OSError):
        checkpoint.write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_is_remembered(accelerator, handlers, number):
    stop = checkpoint.StopSignal(accelerator)
    assert stop.agreed() == 0
    os.kill(os.getpid(), number)
    assert stop.agreed() == number


def test_processes_wait_for_each_other_when_they_have_agreed_to_tell_of_signals(handlers, monkeypatch):
    events = []
    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: events.append(backend))
    checkpoint.StopSignal(types.SimpleNamespace(num_processes=2, wait_for_everyone=lambda: events.append("waited")))
    assert events == ["gloo", "waited"]


def test_a_second_signal_ends_at_once(root):
    code = """
import os, signal, types
from brisk.checkpoint import StopSignal
stop = StopSignal(types.SimpleNamespace(num_processes=1))
os.kill(os.getpid(), signal.SIGTERM)
print(stop.agreed(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "15\n" and done.returncode == -signal.SIGTERM


def test_steps_are_read_from_names():
    names = ("checkpoint-12", "checkpoint-0", "a/checkpoint-7", "checkpoint-", "checkpoint-1x", "xcheckpoint-1")
    assert [checkpoint.step_of(name) for name in names] == [12, 0, 7, None, None, None]


def test_a_new_run_moves_the_checkpoints_of_another_out_of_its_way(tmp_path):
    said, output = [], tmp_path / "out"
    checkpoint.set_aside_earlier(tmp_path / "new", None, pytest.fail)
    for step in (5, 20):
        (output / f"checkpoint-{step}").mkdir(parents=True)
    (output / "metrics.jsonl").write_text("{}")
    checkpoint.set_aside_earlier(output, output / "checkpoint-20", pytest.fail)
    assert names(output) == ["checkpoint-20", "checkpoint-5", "metrics.jsonl"], "the same run goes on"
    checkpoint.set_aside_earlier(output, None, said.append)
    assert names(output) == ["earlier-1"] and names(output / "earlier-1") == ["checkpoint-20", "checkpoint-5", "metrics.jsonl"]
    assert len(said) == 1 and "held checkpoint-5, checkpoint-20 of another run: moved to" in said[0]
    (output / "checkpoint-3").mkdir()
    checkpoint.set_aside_earlier(output, tmp_path / "elsewhere/checkpoint-3", said.append)
    assert names(output) == ["earlier-1", "earlier-2"] and names(output / "earlier-2") == ["checkpoint-3"]
