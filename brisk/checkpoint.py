"""Checkpoints that survive being killed: temporary name, fsync, rename, completeness marker, prune; stop signals."""

import itertools
import json
import os
import re
import shutil
import signal
from pathlib import Path

import torch

from brisk.options import UserError

MARKER = "trainer_state.json"


def _sync(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path, text):
    """Write `text` to `path` so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def step_of(folder):
    """The step in the name of a checkpoint folder, or None."""
    match = re.fullmatch(r"checkpoint-(\d+)", Path(folder).name)
    return int(match.group(1)) if match else None


def damage(folder):
    """Why `folder` cannot be resumed from, in a few words, or None if it is complete."""
    folder = Path(folder)
    try:
        files = dict(json.loads((folder / MARKER).read_text())["files"])
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def find_checkpoint(output_dir, wanted, say, flag="--resume_from_checkpoint"):
    """The folder to resume from, or None to start afresh.

    Args: `wanted` is the value of `flag`; `say` takes messages about skipped folders.
    Raises UserError where a checkpoint given by path cannot be used.
    """
    if not wanted:
        return None
    if wanted != "latest":
        for folder in (Path(wanted), Path(output_dir) / wanted):
            if folder.is_dir():
                reason = damage(folder)
                if reason:
                    raise UserError(f"{flag} {wanted} cannot be used: {reason}.")
                return folder
        raise UserError(f"{flag} {wanted} is neither a folder nor one inside {output_dir}.")
    folders = sorted((f for f in Path(output_dir).glob("checkpoint-*") if step_of(f) is not None), key=step_of)
    for folder in reversed(folders):
        reason = damage(folder)
        if reason is None:
            return folder
        say(f"Skipping {folder}: {reason}.")
    say(f"No usable checkpoint in {output_dir}: starting a new run.")
    return None


def set_aside_earlier(output_dir, resume, say, results=()):
    """Move another run's checkpoints and metrics into `earlier-N`, where neither pruning nor `latest` meets them.

    Args: `resume`: the checkpoint that this run goes on from, or None; `say` takes a message; `results`: patterns of files and
    folders to be moved along.
    """
    output_dir = Path(output_dir)
    if resume and Path(resume).resolve().parent == output_dir.resolve():
        return
    found = sorted((f for f in output_dir.glob("checkpoint-*") if step_of(f) is not None), key=step_of)
    if not found:
        return
    target = next(path for n in itertools.count(1) if not (path := output_dir / f"earlier-{n}").exists())
    target.mkdir()
    for path in [*found, output_dir / "metrics.jsonl", *(path for pattern in results for path in output_dir.glob(pattern))]:
        if path.exists():
            path.rename(target / path.name)
    say(f"{output_dir} held {', '.join(folder.name for folder in found)} of another run: moved to {target}. To go on with that "
        "run, move them back and give --resume_from_checkpoint=latest.")  # fmt: skip


def read_state(folder):
    """What `save_checkpoint` was given as `state`."""
    return json.loads((Path(folder) / MARKER).read_text())


def check_same(state, **settings):
    """ValueError if a checkpoint's `state` was trained with other `settings` than this run's."""
    for name, value in settings.items():
        if name in state and state[name] != value:
            raise ValueError(f"the checkpoint was trained with {name} {state[name]}, this run has {value}.")


def read_rank_state(folder, rank):
    """What rank `rank` gave to `save_checkpoint` as `rank_state`; rank 0's if there was no such rank, None without any."""
    paths = (Path(folder) / f"rank_state_{number}.json" for number in (rank, 0))
    return next((json.loads(path.read_text()) for path in paths if path.is_file()), None)


def use_network_hooks(accelerator, save, load, arguments):
    """Let `save(folder, **arguments)` and `load` store the networks in place of accelerate's own files.

    `save` is called on every rank; both get the checkpoint folder as a Path.
    """

    def save_hook(models, weights, folder):
        save(Path(folder), **arguments)
        weights.clear()

    def load_hook(models, folder):
        load(Path(folder), **arguments)
        models.clear()

    accelerator.register_save_state_pre_hook(save_hook)
    accelerator.register_load_state_pre_hook(load_hook)


def _all_ranks_fine(accelerator, problem):
    if accelerator.num_processes == 1:
        return problem is None
    from accelerate.utils import gather_object

    return not any(gather_object([problem is not None]))


def save_checkpoint(accelerator, output_dir, step, state, rank_state, total_limit=None):
    """Save everything accelerate knows of, from every rank, as `output_dir`/checkpoint-`step`.

    Args: `state` (same on all ranks, goes into the marker), `rank_state` (this rank's, e.g. its data position).
    Returns None, or a sentence saying why nothing was saved; what was there before is untouched in that case.
    """
    output_dir = Path(output_dir)
    final, temporary = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.tmp"
    problem = None
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        accelerator.save_state(str(temporary), safe_serialization=True)
        write_atomically(temporary / f"rank_state_{accelerator.process_index}.json", json.dumps(rank_state))
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
        problem = error
    fine = _all_ranks_fine(accelerator, problem)
    if accelerator.is_main_process:
        try:
            if fine:
                _publish(temporary, final, {**state, "step": step})
        except OSError as error:
            problem = error
        if problem or not fine:
            shutil.rmtree(temporary, ignore_errors=True)
        elif total_limit:
            _prune(output_dir, total_limit, final)
    if not _all_ranks_fine(accelerator, problem):
        reason = " ".join(str(problem or "another process failed").split())
        return f"checkpoint-{step} could not be saved in {output_dir}: {reason}; earlier checkpoints are kept."
    return None


def _publish(temporary, final, state):
    files = {
        str(path.relative_to(temporary)): path.stat().st_size for path in sorted(temporary.rglob("*")) if path.is_file()
    }
    for path in [*temporary.rglob("*"), temporary]:
        _sync(path)
    # a folder of this name can only be a damaged one that was skipped, or one that this run repeats
    shutil.rmtree(final, ignore_errors=True)
    os.rename(temporary, final)
    _sync(final.parent)
    write_atomically(final / MARKER, json.dumps({**state, "files": files}, indent=1))


def _prune(output_dir, limit, saved):
    """Delete all complete checkpoints but `saved` and the `limit` - 1 newest others, and the broken ones older than it."""
    folders = sorted((f for f in output_dir.glob("checkpoint-*") if step_of(f) is not None), key=step_of)
    complete = [folder for folder in folders if damage(folder) is None and folder != saved] + [saved]
    broken = [folder for folder in folders if folder not in complete and step_of(folder) < step_of(saved)]
    for folder in broken + complete[:-limit]:
        # without its marker it counts as unfinished from here on, even if the deletion is cut short
        (folder / MARKER).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


class StopSignal:
    """Remembers SIGTERM / SIGINT, so that the loop can finish its step, save and exit 128 + signal."""

    def __init__(self, accelerator):
        self.received = 0
        self.group = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)
        if accelerator.num_processes > 1:
            # host-side agreement over gloo: asking costs no device synchronisation
            self.group = torch.distributed.new_group(backend="gloo")
            accelerator.wait_for_everyone()  # one that left now would break the start of the others' group

    def _remember(self, number, frame):
        if self.received == number:  # asked twice: the user means now
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number

    def agreed(self):
        """The signal that any rank has received, the same answer on all ranks; 0 if none."""
        if self.group is None:
            return self.received
        flag = torch.tensor([self.received])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=self.group)
        return int(flag)
