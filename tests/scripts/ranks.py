"""Two gloo processes of a training script on the CPU: code that notes what each rank draws, started rank by rank."""

import functools
import json
import os

from conftest import free_port

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


def run_pair(fork_script, folder, flags, code, **variables):
    """Start both ranks by hand, so that each one's exit code is seen -> (exit codes, stderrs)."""
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"ACCELERATE_USE_CPU": "true", "NOTES_TO": str(folder)}

    def become(rank):
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
        exec(compile(code, "driver", "exec"), {"__name__": "driver"})

    pair = [fork_script(*flags, whole=True, prepare=functools.partial(become, rank)) for rank in (0, 1)]
    return [process.wait() for process in pair], [process.err() for process in pair]
