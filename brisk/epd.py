"""EPD-Solver (arXiv 2507.14797, 2512.22796): K directions per interval in one network call, at learned places and weights.

Letters: B batch, K points, S intervals, N = S + 1 noise levels, [s, s'] an interval. A table has shape (S, K), row n for the
n-th interval from noise to data. `direction(x, sigma, rows)` is a solver's closure (see `solvers`) with a third argument that
may be left out: `rows` (R,) says whose conditions each row of x takes, None: row i is sample i.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from brisk.solvers import ADAMS_BASHFORTH, SolverOptions, combine, intervals, opening

STUDENTS = ("epd", "ipndm")
INITS = ("spread", "normal", "thirds")
CLIP = 1e-6  # how near to its ends a value may come before it is turned into a raw parameter


class Tables(NamedTuple):
    """The four numbers of every point, (S, K) each, or the raw parameters they come from; with a table per sample (B, S, K).

    A row of them, of one interval, is (K,) or (B, K) each.
    """

    r: torch.Tensor  # position in (0, 1): tau = s^(1-r) s'^r
    weight: torch.Tensor  # rows sum to 1
    scale_dir: torch.Tensor  # c, factor of the direction
    scale_time: torch.Tensor  # a, factor of the noise level the network is told, and of the direction

    def row(self, index):
        """The values of one interval."""
        return Tables(*(table[..., index, :] for table in self))

    def cast(self, like):
        """The same tables in the precision and on the device of the tensor `like`."""
        return Tables(*(table.to(like) for table in self))


def _scaled(raw, scale_range):
    """2 z sigmoid(rho / 2) + 1 - z = 1 + z tanh(rho / 4) in (1 - z, 1 + z); ones that know nothing of `raw` for z = 0."""
    if not scale_range:
        return torch.ones_like(raw)
    return 1 + scale_range * (raw / 4).tanh()


def effective(raw, scale_dir=0.0, scale_time=0.0, fix_last_scale_dir=False):
    """The tables of raw parameters: r = sigmoid, weights = softmax over K, scales within 1 +- their ranges.

    Args: `scale_dir`, `scale_time`: the ranges z >= 0; `fix_last_scale_dir`: c = 1 in the last interval.
    """
    if scale_dir < 0 or scale_time < 0:
        raise ValueError(f"scale_dir is {scale_dir:g} and scale_time {scale_time:g}; ranges cannot be negative.")
    direction_scale = _scaled(raw.scale_dir, scale_dir)
    if fix_last_scale_dir:
        direction_scale = torch.cat([direction_scale[:-1], torch.ones_like(direction_scale[-1:])])
    return Tables(raw.r.sigmoid(), raw.weight.softmax(-1), direction_scale, _scaled(raw.scale_time, scale_time))


def _unscaled(table, scale_range):
    if not scale_range:
        return torch.zeros_like(table)
    return 4 * ((table - 1) / scale_range).clamp(2 * CLIP - 1, 1 - 2 * CLIP).atanh()


def raw_parameters(tables, scale_dir=0.0, scale_time=0.0):
    """Raw parameters whose `effective` tables are `tables`, up to what the ranges and 1e-6 allow."""
    return Tables(
        tables.r.clamp(CLIP, 1 - CLIP).logit(),
        tables.weight.clamp(min=CLIP).log(),
        _unscaled(tables.scale_dir, scale_dir),
        _unscaled(tables.scale_time, scale_time),
    )


def initial_raw(intervals, points, init="spread", generator=None):
    """Raw parameters (S, K) float32 to start from. ValueError for an unknown `init`, or `thirds` without two points.

    `spread`: r_k = k / (K + 1), equal weights, scales 1. `normal`: standard normal numbers of `generator`, as published.
    `thirds`: r = 0.335 and 0.665, equal weights, scales 1.
    """
    shape = (intervals, points)
    if init == "normal":
        return Tables(*(torch.randn(shape, generator=generator) for _ in Tables._fields))
    if init == "spread":
        positions = torch.arange(1, points + 1) / (points + 1)
    elif init == "thirds" and points == 2:
        positions = torch.tensor([0.335, 0.665])
    elif init == "thirds":
        raise ValueError(f"init 'thirds' places two points, num_points is {points}.")
    else:
        raise ValueError(f"init is '{init}'; it must be one of {', '.join(INITS)}.")
    ones = torch.ones(shape)
    return raw_parameters(Tables(positions.expand(shape), ones / points, ones, ones))


class Cost(NamedTuple):
    """Network calls of one run."""

    intervals: int
    para_nfe: int  # calls one after the other, the K points of an interval in one
    total_nfe: int  # samples through the network per sample; a guided pair counts once
    para_nfe_cfg: int  # para_nfe with a guided pair counted as two


def cost(num_steps, num_points, afs=False, guided_pair=False):
    """The `Cost` on N = `num_steps` levels; `guided_pair`: every call has an unconditional half."""
    count = num_steps - 1
    para_nfe = 2 * count - afs
    return Cost(count, para_nfe, count * (1 + num_points) - afs, para_nfe * (1 + guided_pair))


class Split(NamedTuple):
    """Share of this process where several evaluate the points of an interval together, to sample; no gradient passes."""

    rank: int
    world: int
    all_reduce: Callable  # a tensor -> its sum over the processes

    def bounds(self, count):
        """(first, end) of the rows of this process among `count`; equal where there are more processes than rows."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world


def sample_of_row(batch, points, device=None):
    """(B K,) index of the sample that each row of K points per sample belongs to: row b K + k is point k of sample b."""
    return torch.arange(batch, device=device).repeat_interleave(points)


def in_chunks(direction, limit):
    """A closure like `direction` that never gives it more than `limit` rows at once."""

    def chunked(x, sigma, rows=None):
        if len(x) <= limit:
            return direction(x, sigma, rows)
        rows = torch.arange(len(x), device=x.device) if rows is None else rows
        return torch.cat([direction(*part) for part in zip(*(t.split(limit) for t in (x, sigma, rows)), strict=True)])

    return chunked


def checkpointed(direction):
    """A closure like `direction` whose activations are computed again in the backward pass instead of kept."""

    def recomputed(x, sigma, rows=None):
        return checkpoint(direction, x, sigma, rows, use_reentrant=False)

    return recomputed


def _per_point(values, like):
    """(B, K) values as (B, K, 1, ...), to broadcast against (B, K, ...) of samples `like` (B, ...)."""
    return values.reshape(*values.shape, *([1] * (like.ndim - 1)))


def branches(x, predictor, start, end, r):
    """The points of an interval at positions `r` (B, K): (states (B K, ...), levels tau (B, K)), row b K + k is point k of b.

    y_k = x + (tau_k - s) predictor, tau_k = s^(1 - r_k) s'^(r_k).
    """
    tau = (math.log(start) * (1 - r) + math.log(end) * r).exp()
    return (x[:, None] + _per_point(tau - start, x) * predictor[:, None]).flatten(0, 1), tau


def step(direction, x, predictor, start, end, row, split=None):
    """x (B, ...) at the end of an interval: x + (s' - s) sum_k w_k c_k a_k d(y_k, a_k tau_k), in one network call.

    The published form (y_k - D(y_k, a_k tau_k)) / tau_k is a_k d(y_k, a_k tau_k): a scales the time and the direction.
    Args: `predictor` (B, ...): direction along which the points lie; `row`: the `Tables` of this interval, (K,) or (B, K)
    each; `split`: where several processes share the points, this one's `Split`.
    """
    row = Tables(*(table.expand(len(x), -1) for table in row.cast(x)))
    states, tau = branches(x, predictor, start, end, row.r)
    points = tau.shape[1]
    levels, rows = (row.scale_time * tau).flatten(), sample_of_row(len(x), points, x.device)
    if split is None:
        found = direction(states, levels, rows)
    else:
        first, stop = split.bounds(len(states))
        found = torch.zeros_like(states)
        if stop > first:
            found[first:stop] = direction(states[first:stop], levels[first:stop], rows[first:stop])
    factors = _per_point(row.weight * row.scale_dir * row.scale_time, x)
    total = (factors * found.unflatten(0, (len(x), points))).sum(1)
    return x + (end - start) * (total if split is None else split.all_reduce(total))


def solve(direction, x, sigmas, rows, max_order=1, afs=False, flow=False, split=None, detach_history=False,
          detach_state=False):  # fmt: skip
    """EPD (`max_order` 1) or the iPNDM plug-in (2 to 4): yields the state after every interval.

    The plug-in places the points along the Adams-Bashforth combination of the last directions d_n instead of along d_n alone.
    Args: `sigmas` (N,) levels; `rows`: S `Tables` of one interval each, taken as the intervals come, so that training may
    update them in between; `afs`: the first d in closed form, of the family `flow` says; `split`: see `step`; `detach_history`:
    earlier directions pass no gradient; `detach_state`: nor does anything else of earlier intervals.
    Raises ValueError for an order outside 1 to 4.
    """
    if not 1 <= max_order <= len(ADAMS_BASHFORTH):
        raise ValueError(f"max_order is {max_order}; the plug-in takes 1 to {len(ADAMS_BASHFORTH)}.")
    recent, options = [], SolverOptions(afs=afs, flow=flow)
    for (index, start, end), row in zip(intervals(sigmas), rows, strict=True):
        if detach_state:
            x = x.detach()
        recent = [opening(direction, x, start, index, options), *recent][:max_order]
        predictor = combine(ADAMS_BASHFORTH[len(recent) - 1], recent)
        x = step(direction, x, predictor, start, end, row, split)
        if detach_history or detach_state:
            recent = [directions.detach() for directions in recent]
        yield x


def rows_of(tables):
    """The S rows of effective `tables`, for `solve`."""
    return [tables.row(index) for index in range(tables.r.shape[-2])]


def history_order(student, max_order=None):
    """The order `solve` needs: 1 of an `epd` student, `max_order` (3 if None) of an `ipndm` one. ValueError for others."""
    if student not in STUDENTS:
        raise ValueError(f"the student is '{student}'; it must be epd or ipndm.")
    return 1 if student == "epd" else (max_order or 3)
