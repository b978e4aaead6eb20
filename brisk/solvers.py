"""Samplers of dx/dsigma = d(x, sigma), all with one signature, and what each costs.

A solver is a generator: `for x in heun(direction, x, sigmas, options)` gives the state after every interval. `direction(x,
sigma)` is called with x (B, ...) and sigma (B,) and returns the noise prediction (additive states, x = x0 + sigma e) or the
velocity (flow matching, x = (1 - sigma) x0 + sigma e). `sigmas` are N decreasing levels > 0; there are S = N - 1 intervals
[s, s'], h = ln s - ln s'. The state keeps the precision of x (float32 or float64), coefficients are computed in float64.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from brisk import sigmas as noise_levels

# Adams-Bashforth weights of equal steps by number of directions, newest first
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
QUADRATURE_NODES = 64
THRESHOLD_QUANTILE = 0.995


class SolverOptions(NamedTuple):
    """Settings of all solvers; each reads those it knows."""

    afs: bool = False  # the first direction in closed form, without the network
    flow: bool = False  # the state is that of flow matching; only `afs` and noise depend on it
    max_order: int = 3  # of the multistep solvers
    midpoint: float = 0.5  # where in ln sigma dpm2 takes its second direction, in (0, 1)
    predict_x0: bool = True  # dpmpp and unipc extrapolate D, else d
    lower_order_final: bool = True  # dpmpp and unipc lower the order at the last intervals
    thresholding: bool = False  # dpmpp and unipc clip D per sample at a quantile; for pixels
    variant: str = "bh2"  # unipc: bh1 or bh2
    vp_constants: tuple | None = None  # deis: see `sigmas.vp_constants`; None: of the ends of the grid
    churn: float = 0.0  # edm: total noise added and removed again
    churn_min: float = 0.0  # edm: levels between which it happens
    churn_max: float = math.inf
    churn_scale: float = 1.0  # edm: standard deviation of the added noise
    noise: Callable = torch.randn_like  # edm: x -> standard normal like x


DEFAULTS = SolverOptions()


def check_levels(sigmas):
    """The grid (N,) as floats. ValueError unless it has two levels or more, decreasing to one > 0."""
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2 or levels[-1] <= 0 or not all(s > e for s, e in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"noise levels must be two or more, decrease strictly and end above 0, not {levels}.")
    return levels


def at(x, sigma):
    """(B,) of the level `sigma` (float), in the precision and on the device of `x`."""
    return x.new_full((len(x),), sigma)


def analytic_direction(x, sigma, flow=False):
    """d at the start without the network: x / sqrt(1 + sigma^2) of additive states, x / sigma of flow matching."""
    return x / (sigma if flow else math.sqrt(1 + sigma**2))


def opening(direction, x, sigma, index, options):
    """d at the start of interval `index`: the analytic one in the first where `options.afs`, else one network call."""
    if options.afs and index == 0:
        return analytic_direction(x, sigma, options.flow)
    return direction(x, at(x, sigma))


def intervals(sigmas):
    """(index, s, s') of every interval."""
    levels = check_levels(sigmas)
    return [(index, start, end) for index, (start, end) in enumerate(zip(levels, levels[1:], strict=False))]


def combine(weights, directions):
    """sum_j weights_j directions_j."""
    return sum(weight * direction for weight, direction in zip(weights, directions, strict=True))


def euler(direction, x, sigmas, options=DEFAULTS):
    """First order: x += (s' - s) d. It is DDIM (arXiv 2010.02502)."""
    for index, start, end in intervals(sigmas):
        x = x + (end - start) * opening(direction, x, start, index, options)
        yield x


def heun(direction, x, sigmas, options=DEFAULTS):
    """Trapezoidal rule on an Euler step (arXiv 2206.00364, algorithm 1 without its last step to 0)."""
    for index, start, end in intervals(sigmas):
        first = opening(direction, x, start, index, options)
        second = direction(x + (end - start) * first, at(x, end))
        x = x + (end - start) * (first + second) / 2
        yield x


def dpm2(direction, x, sigmas, options=DEFAULTS):
    """DPM-Solver-2 (arXiv 2206.00927): a second direction at m = s^(1-r) s'^r, weights 1 / (2r) and 1 - 1 / (2r)."""
    r = options.midpoint
    if not 0 < r < 1:
        raise ValueError(f"the midpoint of dpm2 is {r:g}; it must lie between 0 and 1.")
    for index, start, end in intervals(sigmas):
        middle = start ** (1 - r) * end**r
        first = opening(direction, x, start, index, options)
        second = direction(x + (middle - start) * first, at(x, middle))
        x = x + (end - start) * (second / (2 * r) + (1 - 1 / (2 * r)) * first)
        yield x


def ipndm(direction, x, sigmas, options=DEFAULTS):
    """Adams-Bashforth with the weights of equal steps on whatever grid (arXiv 2204.13902, iPNDM), orders 1 to 4."""
    check_order("ipndm", options.max_order)
    recent = []
    for index, start, end in intervals(sigmas):
        recent = [opening(direction, x, start, index, options), *recent][: options.max_order]
        x = x + (end - start) * combine(ADAMS_BASHFORTH[len(recent) - 1], recent)
        yield x


def lagrange_integrals(nodes, start, end, time=None):
    """C_j = integral over [s, s'] of the Lagrange basis l_j(time(sigma)) dsigma through the levels `nodes`, floats.

    Gauss-Legendre in ln sigma. Args: `time`: map of levels, None for sigma itself.
    """
    time = time or (lambda sigma: sigma)
    points, weights = np.polynomial.legendre.leggauss(QUADRATURE_NODES)
    low, high = math.log(start), math.log(end)
    sigma = np.exp((low + high) / 2 + (high - low) / 2 * points)
    where, at_nodes = time(sigma), time(np.array(nodes))
    result = []
    for j, own in enumerate(at_nodes):
        others = np.delete(at_nodes, j)
        basis = np.prod([(where - other) / (own - other) for other in others], axis=0) if len(others) else 1.0
        result.append(float((weights * basis * sigma).sum() * (high - low) / 2))
    return result


def _variable_step(direction, x, sigmas, options, time):
    """Adams-Bashforth through the levels really visited, interpolating in `time`."""
    recent, nodes = [], []
    for index, start, end in intervals(sigmas):
        recent = [opening(direction, x, start, index, options), *recent][: options.max_order]
        nodes = [start, *nodes][: options.max_order]
        x = x + combine(lagrange_integrals(nodes, start, end, time), recent)
        yield x


def ipndm_v(direction, x, sigmas, options=DEFAULTS):
    """Adams-Bashforth with the weights of the actual steps in sigma, orders 1 to 4."""
    check_order("ipndm_v", options.max_order)
    yield from _variable_step(direction, x, sigmas, options, None)


def deis(direction, x, sigmas, options=DEFAULTS):
    """DEIS-tAB (arXiv 2204.13902): Adams-Bashforth in the time of a VP process, orders 1 to 4."""
    check_order("deis", options.max_order)
    levels = check_levels(sigmas)
    constants = options.vp_constants or noise_levels.vp_constants(levels[-1], levels[0])

    def time(sigma):
        return noise_levels.vp_time(torch.from_numpy(sigma), constants).numpy()

    yield from _variable_step(direction, x, levels, options, time)


def multistep_order(index, count, options):
    """Order of dpmpp and unipc at interval `index` of `count`: it rises at the start and may fall towards the end."""
    if index + 1 < options.max_order:
        return index + 1
    return min(options.max_order, count - index) if options.lower_order_final else options.max_order


def threshold(x0):
    """D clipped to [-q, q] and divided by q, q = max(1, 99.5 % quantile of |D|) per sample (arXiv 2205.11487, 2.3)."""
    limit = x0.flatten(1).abs().quantile(THRESHOLD_QUANTILE, dim=1).clamp(min=1)
    limit = limit.reshape(-1, *([1] * (x0.ndim - 1)))
    return x0.clamp(-limit, limit) / limit


def extrapolated(direction, x, sigma, options):
    """What dpmpp and unipc extrapolate: D = x - sigma d (perhaps clipped), or d itself."""
    if not options.predict_x0:
        return direction
    x0 = x - sigma * direction
    return threshold(x0) if options.thresholding else x0


def dpmpp(direction, x, sigmas, options=DEFAULTS):
    """Multistep DPM-Solver++ (`predict_x0`, arXiv 2211.01095) or DPM-Solver (2206.00927), orders 1 to 3."""
    check_order("dpmpp", options.max_order)
    steps, recent, logs = intervals(sigmas), [], []
    for index, start, end in steps:
        value = extrapolated(opening(direction, x, start, index, options), x, start, options)
        recent, logs = [value, *recent][:3], [-math.log(start), *logs][:3]
        order = multistep_order(index, len(steps), options)
        increment = _dpmpp_increment(recent, logs, -math.log(end), order, options.predict_x0)
        x = (end / start) * x - increment if options.predict_x0 else x - end * increment
        yield x


def _dpmpp_increment(recent, logs, log_end, order, predict_x0):
    """Exponential integral of the polynomial through the last `order` values, with DPM-Solver's divided differences."""
    h = log_end - logs[0]
    sign = -1 if predict_x0 else 1
    p1 = math.expm1(sign * h)
    if order == 1:
        return p1 * recent[0]
    r0 = (logs[0] - logs[1]) / h
    first = (recent[0] - recent[1]) / r0
    if order == 2:
        return p1 * (recent[0] + first / 2)
    r1 = (logs[1] - logs[2]) / h
    second = (recent[1] - recent[2]) / r1
    slope = first + r0 / (r0 + r1) * (first - second)
    curvature = (first - second) / (r0 + r1)
    p2 = p1 / h - sign
    p3 = p2 / h - 0.5
    return p1 * recent[0] + sign * p2 * slope + p3 * curvature


def unipc(direction, x, sigmas, options=DEFAULTS):
    """UniPC (arXiv 2302.04867), orders 1 to 3: the corrector's network call serves the next predictor.

    The corrector is left out in the last interval, once `max_order` is reached.
    """
    check_order("unipc", options.max_order)
    if options.variant not in ("bh1", "bh2"):
        raise ValueError(f"the UniPC variant is '{options.variant}'; it must be bh1 or bh2.")
    steps, recent, logs = intervals(sigmas), [], []
    value = None
    for index, start, end in steps:
        if value is None:
            value = extrapolated(opening(direction, x, start, index, options), x, start, options)
        recent, logs = [value, *recent][:3], [-math.log(start), *logs][:3]
        order = multistep_order(index, len(steps), options)
        base, scale, ratios, matrix, moments = _unipc_terms(x, recent, logs, start, end, order, options)
        differences = [(older - value) / ratio for older, ratio in zip(recent[1:order], ratios, strict=False)]
        x = base
        if order > 1:
            weights = [0.5] if order == 2 else np.linalg.solve(matrix[:-1, :-1], moments[:-1])
            x = base - scale * combine(map(float, weights), differences)
        if index + 1 < len(steps) or index + 1 < options.max_order:
            predicted = extrapolated(direction(x, at(x, end)), x, end, options)
            weights = [0.5] if order == 1 else np.linalg.solve(matrix, moments)
            x = base - scale * combine(map(float, weights), [*differences, predicted - value])
            value = predicted
        yield x


def _unipc_terms(x, recent, logs, start, end, order, options):
    """(first-order step, factor of the sums, ratios r_1..r_{o-1} 1, matrix (o, o) of their powers, moments (o,))."""
    h = -math.log(end) - logs[0]
    signed = -h if options.predict_x0 else h
    growth = math.expm1(signed)
    factor = signed if options.variant == "bh1" else growth
    ratios = [(log - logs[0]) / h for log in logs[1:order]] + [1.0]
    matrix = np.array([[ratio**power for ratio in ratios] for power in range(order)])
    moments, moment = [], growth / signed - 1
    for k in range(1, order + 1):
        moments.append(moment * math.factorial(k) / factor)
        moment = moment / signed - 1 / math.factorial(k + 1)
    if options.predict_x0:
        return (end / start) * x - growth * recent[0], factor, ratios, matrix, np.array(moments)
    return x - end * growth * recent[0], end * factor, ratios, matrix, np.array(moments)


def edm(direction, x, sigmas, options=DEFAULTS):
    """EDM's sampler (arXiv 2206.00364, algorithm 2): Heun steps to level 0, N intervals, with noise where `churn`."""
    if options.flow and options.churn:
        raise ValueError("noise of the edm solver (churn) is defined for additive states, not for flow matching.")
    levels = [*check_levels(sigmas), 0.0]
    for index, (start, end) in enumerate(zip(levels, levels[1:], strict=False)):
        if options.churn > 0 and options.churn_min <= start <= options.churn_max:
            raised = start * (1 + min(options.churn / (len(levels) - 1), math.sqrt(2) - 1))
            x = x + math.sqrt(raised**2 - start**2) * options.churn_scale * options.noise(x)
            start = raised
        first = opening(direction, x, start, index, options)
        reached = x + (end - start) * first
        if end > 0:
            reached = x + (end - start) * (first + direction(reached, at(x, end))) / 2
        x = reached
        yield x


class Solver(NamedTuple):
    """A row of `SOLVERS`."""

    run: Callable
    calls: Callable  # (S, max_order) -> network calls without `afs`
    highest_order: int | None  # of those that read `max_order`; these remember earlier intervals


SOLVERS = {
    "euler": Solver(euler, lambda count, order: count, None),
    "heun": Solver(heun, lambda count, order: 2 * count, None),
    "dpm2": Solver(dpm2, lambda count, order: 2 * count, None),
    "ipndm": Solver(ipndm, lambda count, order: count, 4),
    "ipndm_v": Solver(ipndm_v, lambda count, order: count, 4),
    "deis": Solver(deis, lambda count, order: count, 4),
    "dpmpp": Solver(dpmpp, lambda count, order: count, 3),
    "unipc": Solver(unipc, lambda count, order: count + (count < order), 3),
    "edm": Solver(edm, lambda count, order: 2 * count + 1, None),
}
ALIASES = {"ddim": "euler", "dpm": "dpm2"}


def find(name):
    """The `Solver` of a name or alias. ValueError for an unknown one."""
    name = ALIASES.get(name, name)
    if name not in SOLVERS:
        raise ValueError(f"the solver is '{name}'; it must be one of {', '.join([*SOLVERS, *ALIASES])}.")
    return SOLVERS[name]


def check_order(name, max_order):
    """ValueError where the solver cannot have that order."""
    highest = find(name).highest_order
    if highest is not None and not 1 <= max_order <= highest:
        raise ValueError(f"max_order is {max_order}; {name} takes 1 to {highest}.")


def network_calls(name, num_steps, options=DEFAULTS, substeps=1):
    """Sequential network calls of a whole run on N levels, with `substeps` per interval as in `with_substeps`."""
    return find(name).calls((num_steps - 1) * substeps, options.max_order) - options.afs


def with_substeps(name, direction, x, sigmas, options=DEFAULTS, substeps=1):
    """The solver `name` with its intervals cut further, as teachers are run; yields the state after every interval.

    Each interval is solved on its own `substeps` + 1 polynomial levels (rho 7). ValueError for cutting a multistep solver, whose
    memory reaches over intervals, or edm, which ends at 0.
    """
    solver = find(name)
    if substeps < 1 or (substeps > 1 and (solver.highest_order is not None or solver.run is edm)):
        raise ValueError(f"{substeps} sub-steps do not fit the solver {name}: only euler, heun and dpm2 can be cut.")
    if substeps == 1:
        yield from solver.run(direction, x, sigmas, options)
        return
    for index, start, end in intervals(sigmas):
        inner = noise_levels.polynomial(substeps + 1, end, start)
        x = last(solver.run(direction, x, inner, options._replace(afs=options.afs and index == 0)))
        yield x


def last(states):
    """The last of the states that a solver yields, without keeping the others."""
    return deque(states, maxlen=1).pop()
