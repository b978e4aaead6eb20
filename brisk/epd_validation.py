"""How near a student's end points are to exact ones, while it is distilled, and those of plain solvers of as many calls."""

import torch
from tqdm import tqdm

from brisk import epd_distill, epd_run, epd_sampling, solvers


def open_validation(count, batch, num_steps, denoiser, prompts, direction_of, levels, accelerator):
    """A function: `epd_sampling.Sampler` -> root mean squared distance of its end points to those of a long Heun run.

    Each process has a part of the latents; all get the same number. Args: `count` latents, `batch` of them at once; `num_steps`
    of the Heun run between the ends of `levels`; `prompts` as for `epd_run.draw`; `direction_of(given, count)`: a direction.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    first, end = count * rank // processes, count * (rank + 1) // processes
    noise, given = epd_run.draw(count, denoiser, prompts, "validation")
    parts = []
    for at in tqdm(range(first, end, batch), desc="Reference", unit="batch", disable=not accelerator.is_main_process, leave=False):
        stop = min(at + batch, end)
        direction = direction_of(None if given is None else given[at:stop], stop - at)
        x = noise[at:stop] if denoiser.flow else levels[0] * noise[at:stop]
        parts.append((direction, x, epd_distill.reference_states(direction, x, levels[-1], levels[0], num_steps)))

    def error(sampler):
        total = torch.zeros((), device=denoiser.device)
        with torch.no_grad():
            for direction, x, reference in parts:
                total += epd_distill.squared_distance(solvers.last(epd_sampling.states(sampler, direction, x)), reference)
        return (accelerator.reduce(total, "sum").item() / count) ** 0.5

    return error


def measure_start(denoiser, untrained, para_nfe, error_of):
    """{what: error} of the student's `untrained` sampler, and of solvers of as many network calls in turn, each on the better of
    the model's customary and polynomial levels."""
    afs = untrained.options.afs
    found, points = {"untrained": error_of(untrained)}, para_nfe + 1 + afs  # of solvers each interval is one call
    plain = solvers.SolverOptions(afs=afs, flow=denoiser.flow, max_order=4)
    for name in ("ddim", "ipndm"):
        runs = [epd_sampling.of_solver(name, denoiser, points, kind, options=plain)
                for kind in (("flowmatch",) if denoiser.flow else (None, "polynomial"))]  # fmt: skip
        found[name] = min(map(error_of, runs))
    return found
