"""Gloo processes of a script on the CPU, started rank by rank, and code that notes what each of two draws."""

import contextlib
import json
import subprocess

from conftest import environment, free_port

from brisk import checkpoint

COMMON = '''
import hashlib, json, os, signal
import SCRIPT as script
from brisk import optim, runlog

rank, notes = int(os.environ["RANK"]), {}
main, update, flush = script.main, optim.EMA.update, runlog.RunLog.flush


def digest(tensors):
    tensors = [optim.whole(tensor.detach()) for tensor in tensors]
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def note(**values):
    for name, value in values.items():
        notes.setdefault(name, []).append(value)


def noting_update(self, parameters, decay):
    parameters = list(parameters)
    note(weights=digest(parameters))
    return update(self, parameters, decay)


def stopping_flush(self, step, *rest, **named):
    if step == int(os.environ.get("STOP_AT", 0)) and rank == 1:  # one process is told to stop, both must
        os.kill(os.getpid(), signal.SIGTERM)
    return flush(self, step, *rest, **named)


def noting_main(argv=None):
    try:
        main(argv)
    finally:
        with open(f"{os.environ['NOTES_TO']}/{rank}.json", "w") as file:
            json.dump(notes, file)


script.main, optim.EMA.update, runlog.RunLog.flush = noting_main, noting_update, stopping_flush
'''
SHARED_DRAWS = '''
import torch
from brisk import seeding

generator = seeding.generator


def halved(draw, shape_at):
    """What a process of twice the batch draws, of which each rank takes its half."""
    def drawn(*given, generator=None, **named):
        given = list(given)
        if generator is None:
            return draw(*given, generator=generator, **named)
        if isinstance(given[shape_at], int):
            given[shape_at:] = [given[shape_at:]]
        shape = given[shape_at]
        given[shape_at] = (2 * shape[0], *shape[1:])
        return draw(*given, generator=generator, **named)[rank * shape[0] : (rank + 1) * shape[0]]

    return drawn


torch.rand, torch.randn, torch.randint = halved(torch.rand, 0), halved(torch.randn, 0), halved(torch.randint, 1)
seeding.generator = lambda seed, process, *key, **named: generator(seed, 0, *key, **named)
'''


def noting(script, own):
    """The code of a rank of `script` that notes weights, and what its `own` code calls `note` with; it heeds STOP_AT."""
    return COMMON.replace("SCRIPT", script) + own


def notes_of(folder):
    """What the two ranks noted."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def run_ranks(warm, folder, program, flags, world=2, **variables):
    """Run the file `program` on `world` ranks, each started by hand so that its exit code is seen -> (exit codes, stderrs).

    None is a fork of this process, whose threads would be missing. What they print goes to stdout-<rank> and stderr-<rank> in
    `folder`, which is made.
    """
    folder.mkdir(exist_ok=True)
    variables |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"ACCELERATE_USE_CPU": "true"}
    ranks = []
    for rank in range(world):
        own = environment(**variables, RANK=str(rank), LOCAL_RANK=str(rank))
        with open(folder / f"stdout-{rank}", "w") as out, open(folder / f"stderr-{rank}", "w") as error:
            ranks.append(subprocess.Popen([warm.python, program, *flags], env=own, stdout=out, stderr=error))
    try:
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):  # of one that hangs, what it printed tells where
                rank.wait(240)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks], [(folder / f"stderr-{rank}").read_text() for rank in range(world)]


def driver(folder, code):
    """The path of a program that runs `code` and then the script that it imports as `script`; `folder` is made."""
    folder.mkdir(exist_ok=True)
    path = folder / "driver.py"
    path.write_text(f"{code}\nfrom brisk import options\n\noptions.run(script.main)\n")
    return path


def run_driver(warm, folder, flags, code, world=2, **variables):
    """`run_ranks` of `code` and then the script that it imports as `script` (see `driver`); notes go to `folder`."""
    return run_ranks(warm, folder, driver(folder, code), flags, world, NOTES_TO=str(folder), **variables)


def pairs_of(warm, base_flags, code, **own):
    """A function: (folder of notes, flags, code=, STOP_AT=) -> exit codes and stderrs of both ranks.

    They write to the folder `out` beside the notes. Args: `own`: script, and family of the models, as `base_flags` takes them.
    """

    def run(folder, flags, code=code, **variables):
        return run_driver(warm, folder, base_flags(f"--output_dir={folder.parent / 'out'}", *flags, **own), code, **variables)

    return run


def unbroken(pair, folder, flags):
    """(output, notes by rank) of a run to its end below `folder`. Args: `pair`: see `pairs_of`."""
    codes, errors = pair(folder / "notes", flags)
    assert codes == [0, 0], errors
    return folder / "out", notes_of(folder / "notes")


def assert_stops_and_goes_on(pair, folder, flags, noted, names):
    """Told to stop by a signal to one rank at step 3, both do; resumed, they note what an unbroken run did: `noted` of `names`."""
    flags = (*flags, "--resume_from_checkpoint=latest")
    codes, errors = pair(folder / "first", flags, STOP_AT="3")
    assert codes == [143, 143], errors
    assert max(checkpoint.step_of(path) for path in (folder / "out").glob("checkpoint-*")) == 3
    codes, errors = pair(folder / "second", flags)
    assert codes == [0, 0], errors
    for rank in (0, 1):
        halves = [notes_of(folder / name)[rank] for name in ("first", "second")]
        for name in names:
            assert halves[0][name] + halves[1][name] == noted[rank][name], name
