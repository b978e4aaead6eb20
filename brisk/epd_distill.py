"""Distillation of EPD tables from a teacher's trajectory (arXiv 2507.14797, section 3): objectives, update modes, rates.

Letters: B batch, E values of a sample, S student intervals, M teacher points within each, x student and y teacher states.
"""

import math

import torch

from brisk import epd, solvers
from brisk import sigmas as noise_levels

UPDATE_MODES = ("auto", "per_step", "final_only", "detach", "joint")
FINAL_ONLY_SETS = ("cifar10", "ffhq", "afhqv2", "imagenet64")
GRADIENT_LIMIT = 1e5  # in place of an infinite gradient


def teacher_points(num_steps, inserted):
    """Levels of the teacher's grid: N_T = (M + 1)(N - 1) + 1, every (M + 1)-th of which is the student's."""
    return (inserted + 1) * (num_steps - 1) + 1


def teacher_states(name, direction, x, sigmas, inserted, options=solvers.DEFAULTS, substeps=1):
    """The S states (B, ...) that the student is to reach, y_n = the teacher's state at its (M + 1)(n + 1)-th level.

    Args: `name`, `options`, `substeps` as in `solvers.with_substeps`; `sigmas` (N_T,) the teacher's levels, `inserted` M.
    """
    with torch.no_grad():
        states = solvers.with_substeps(name, direction, x, sigmas, options, substeps)
        return [state for index, state in enumerate(states, 1) if index % (inserted + 1) == 0]


def fresh_rows(raw, scale_dir, scale_time, fix_last_scale_dir=False):
    """Rows for `epd.solve`, each from the raw parameters as they are when its interval comes."""
    for index in range(len(raw.r)):
        yield epd.effective(raw, scale_dir, scale_time, fix_last_scale_dir).row(index)


def objectives(states, targets, batch, feature=None, alpha=10.0):
    """Yield the loss of each interval as its state comes: sum (x - y)^2 / B; with features alpha E mean (F(x) - F(y))^2 last.

    Args: `states`: the generator of `epd.solve`; `targets`: S teacher states; `batch`: B over all processes and micro-batches,
    whose losses then add up; `feature`: x -> (B, F), of the last interval only.
    """
    for index, (x, y) in enumerate(zip(states, targets, strict=True), 1):
        if feature is None or index < len(targets):
            yield (x - y).square().sum() / batch
        else:
            difference = feature(x) - feature(y)
            yield alpha * x[0].numel() * difference.square().sum() / (difference[0].numel() * batch)


def noted(states, targets, norms):
    """The generator `states` of `epd.solve`, which also appends each state's `interval_norm` to its list in `norms`."""
    for x, y, own in zip(states, targets, norms, strict=True):
        own.append(interval_norm(x.detach(), y))
        yield x


def gradients(loss, raw, keep_graph):
    """d loss / d raw as `Tables`, zeros where a table does not matter, no NaN (0) and no infinity (1e5)."""
    if not loss.requires_grad:
        return epd.Tables(*(torch.zeros_like(table) for table in raw))
    found = torch.autograd.grad(loss, raw, retain_graph=keep_graph, allow_unused=True, materialize_grads=True)
    return epd.Tables(*(grad.nan_to_num(0.0, GRADIENT_LIMIT, -GRADIENT_LIMIT) for grad in found))


def updates(chains, raw, mode):
    """Yield (losses, gradients) once per optimiser step that a batch asks for; the caller takes the step before going on.

    `per_step`: after each interval, of its loss alone, through all earlier intervals. `detach`: the same where the states were
    solved with `detach_state`. `final_only`: once, of the last loss. `joint`: once, of the sum of all.
    Args: `chains`: one generator of `objectives` per micro-batch, run in step with each other, or for a single step one after
    the other, so that one graph is alive. The losses are those of the intervals since the last step, 0-dimensional and
    detached, summed over the chains.
    """
    if mode not in UPDATE_MODES[1:]:
        raise ValueError(f"the update mode is '{mode}'; it must be one of {', '.join(UPDATE_MODES[1:])}.")
    if mode in ("final_only", "joint"):
        totals = [_whole_chain(chain, raw, mode) for chain in chains]
        losses, found = zip(*totals, strict=True)
        yield list(torch.stack(losses).sum(0)), epd.Tables(*(sum(parts) for parts in zip(*found, strict=True)))
        return
    for index, parts in enumerate(zip(*chains, strict=True), 1):
        loss = torch.stack(parts).sum()
        yield [loss.detach()], gradients(loss, raw, keep_graph=mode == "per_step" and index < len(raw.r))


def _whole_chain(chain, raw, mode):
    """(losses of all intervals (S,), gradients of their sum or of the last) of one micro-batch."""
    losses = torch.stack(list(chain))
    return losses.detach(), gradients(losses.sum() if mode == "joint" else losses[-1], raw, keep_graph=False)


def resolve_update_mode(mode, student, num_steps, dataset_name=None):
    """`auto` as published: `final_only` for epd students of less than 6 levels on the small pixel sets, else `per_step`."""
    if mode != "auto":
        return mode
    return "final_only" if student == "epd" and num_steps < 6 and dataset_name in FINAL_ONLY_SETS else "per_step"


def set_gradients(raw, found):
    """Give the leaf tensors `raw` the gradients `found`, for the optimiser."""
    for table, grad in zip(raw, found, strict=True):
        table.grad = grad


def cosine_rate(rate, batch_index, total, floor=0.01):
    """Learning rate of batch 0, 1, ... `total`: falls from `rate` to `floor` by a cosine."""
    return floor + (rate - floor) * (1 + math.cos(math.pi * batch_index / total)) / 2


def total_batches(total_kimg, batch):
    """T of the cosine: floor(1000 total_kimg / batch) + 1."""
    return int(1000 * total_kimg // batch) + 1


def interval_norm(x, y):
    """The figure that is logged per interval: mean over samples of the L2 norm of the elementwise squared error."""
    return (x - y).square().flatten(1).norm(dim=1).mean()


def squared_distance(x, y):
    """Sum over samples of the squared Euclidean distance."""
    return (x - y).square().sum()


def end_error(x, y):
    """Root over the mean, over samples, of the squared Euclidean distance of end points: the measure of validation."""
    return (squared_distance(x, y) / len(x)).sqrt()


def reference_states(direction, x, sigma_min, sigma_max, num_steps=400):
    """End points (B, ...) of a long Heun run on polynomial levels (rho 7), to validate against."""
    with torch.no_grad():
        return solvers.last(solvers.heun(direction, x, noise_levels.polynomial(num_steps, sigma_min, sigma_max)))
