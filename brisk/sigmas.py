"""Noise levels: the decreasing grids a sampler visits, and the map between noise level and time of a discrete model.

Letters: N points of a grid, S = N - 1 intervals, T training timesteps, l = ln(abar) / 2 log signal. Two families share one
scale sigma: additive, x = x0 + sigma e, and flow matching, x = (1 - sigma) x0 + sigma e. Everything here is float64.
"""

import math
from typing import NamedTuple

import torch

SCHEDULES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
SMALLEST_SIGNAL = 2.0**-24  # stands for abar = 0 at the end of a zero-SNR schedule: sigma 4096
TIME_EPSILON = 1e-3  # least time of `time_uniform` and of `discrete` grids


def _fractions(num_steps):
    """u_i = i / (N - 1), (N,). ValueError for less than two points."""
    if num_steps < 2:
        raise ValueError(f"num_steps is {num_steps}; a sampler needs at least 2 noise levels.")
    return torch.arange(num_steps, dtype=torch.float64) / (num_steps - 1)


def _check_ends(sigma_min, sigma_max):
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min is {sigma_min:g} and sigma_max {sigma_max:g}; needed is 0 < sigma_min < sigma_max.")


def _power_grid(num_steps, high, low, rho):
    """N points from `high` to `low`, equally spaced in their power 1 / rho (arXiv 2206.00364, equation 5)."""
    if rho <= 0:
        raise ValueError(f"schedule_rho is {rho:g}; it must be positive.")
    return (high ** (1 / rho) + _fractions(num_steps) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def polynomial(num_steps, sigma_min, sigma_max, rho=7.0):
    """EDM's grid, (N,) decreasing from `sigma_max` to `sigma_min`. ValueError for a bad range, N < 2 or rho <= 0."""
    _check_ends(sigma_min, sigma_max)
    return _power_grid(num_steps, sigma_max, sigma_min, rho)


def logsnr(num_steps, sigma_min, sigma_max):
    """N points equally spaced in ln sigma (arXiv 2211.01095), decreasing."""
    _check_ends(sigma_min, sigma_max)
    return (math.log(sigma_max) + _fractions(num_steps) * (math.log(sigma_min) - math.log(sigma_max))).exp()


def vp_constants(sigma_min, sigma_max, epsilon=TIME_EPSILON):
    """(beta_d, beta_min) of the VP process with sigma(epsilon) = sigma_min and sigma(1) = sigma_max."""
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (low / epsilon - high) / (epsilon - 1)
    return beta_d, high - beta_d / 2


def vp_sigma(time, constants):
    """sigma(t) = sqrt(expm1(beta_d t^2 / 2 + beta_min t)) of times (...)."""
    beta_d, beta_min = constants
    return (beta_d * time**2 / 2 + beta_min * time).expm1().sqrt()


def vp_time(sigma, constants):
    """t(sigma), the inverse of `vp_sigma`; sigma (...)."""
    beta_d, beta_min = constants
    return ((beta_min**2 + 2 * beta_d * (sigma**2).log1p()).sqrt() - beta_min) / beta_d


def time_uniform(num_steps, sigma_min, sigma_max, rho=1.0, epsilon=TIME_EPSILON):
    """N points of the VP process through both ends, equally spaced in t^(1/rho) from 1 to `epsilon`; decreasing."""
    _check_ends(sigma_min, sigma_max)
    return vp_sigma(_power_grid(num_steps, 1.0, epsilon, rho), vp_constants(sigma_min, sigma_max, epsilon))


class NoiseMap(NamedTuple):
    """Noise levels of a model trained on T discrete timesteps: l(t) is piecewise linear through (k / T, l_k), k = 1..T."""

    log_signal: torch.Tensor  # (T,) float64, decreasing

    def to(self, device):
        """The same map on `device` (float32 where it knows no float64)."""
        return NoiseMap(self.log_signal.to(device, torch.float32 if torch.device(device).type == "mps" else None))


def noise_map(alphas_cumprod):
    """The map of cumulative signals abar_1..abar_T (T,), a last 0 taken as 2^-24. ValueError unless they decrease in (0, 1)."""
    signal = torch.as_tensor(alphas_cumprod).double().cpu().clone()
    signal[-1] = signal[-1].clamp(min=SMALLEST_SIGNAL)
    if len(signal) < 2 or not (0 < signal[-1] and signal[0] < 1 and (signal.diff() < 0).all()):
        raise ValueError("alphas_cumprod must decrease strictly and lie between 0 and 1.")
    return NoiseMap(signal.log() / 2)


def _interpolate(x, knots, values):
    """Piecewise linear through (knots (T,) increasing, values (T,)) at x (...), extrapolated by the outer pieces."""
    upper = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = knots[upper - 1]
    slope = (values[upper] - values[upper - 1]) / (knots[upper] - left)
    return values[upper - 1] + slope * (x - left)


def _knots(table):
    """Times k / T of the T entries of `table`."""
    return torch.arange(1, len(table) + 1, dtype=table.dtype, device=table.device) / len(table)


def sigma_of_time(table, time):
    """sigma(t) = sqrt(expm1(-2 l(t))) of times (...) in (0, 1], in the precision of the map `table`."""
    log_signal = _interpolate(time.to(table.log_signal.dtype), _knots(table.log_signal), table.log_signal)
    return (-2 * log_signal).expm1().sqrt()


def time_of_sigma(table, sigma):
    """t(sigma) of noise levels (...), the inverse of `sigma_of_time`, in the precision of the map `table`."""
    table, minus_log = table.log_signal, 0.5 * (sigma.to(table.log_signal.dtype) ** 2).log1p()
    upper = torch.searchsorted(-table, minus_log).clamp(1, len(table) - 1)
    above, below = table[upper - 1], table[upper]
    return (upper + (minus_log + above) / (above - below)) / len(table)


def sigma_range(table):
    """(sigma(1e-3), sigma(1)) of the map `table`, the range its model was trained on, as floats."""
    return tuple(sigma_of_time(table, table.log_signal.new_tensor([TIME_EPSILON, 1.0])).tolist())


def discrete(num_steps, table, rho=1.0, sigma_min=None, sigma_max=None):
    """N points of the map `table`, equally spaced in t^(1/rho), decreasing; the ends default to `sigma_range`."""
    low, high = sigma_range(table)
    ends = (low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    _check_ends(*ends)
    first, last = time_of_sigma(table, torch.tensor(ends, dtype=torch.float64)).tolist()
    return sigma_of_time(table, _power_grid(num_steps, last, first, rho))


def flowmatch(num_steps, shift=3.0, mu=None, timesteps=1000):
    """N flow-matching levels, decreasing from 1, without the terminal 0 (arXiv 2403.03206, section 5.3.2).

    `shift` q (SD3): f(s) = q s / (1 + (q - 1) s) of equal steps between f(1) and f(1 / T): shifted twice at the low end, as the
    published scheduler does. `mu` (FLUX) sets `shift` aside: exp(mu) / (exp(mu) + 1 / s - 1) of equal steps from 1 to 1 / T.
    """
    fractions = _fractions(num_steps)
    if mu is not None:
        levels = 1 + fractions * (1 / timesteps - 1)
        return math.exp(mu) / (math.exp(mu) + 1 / levels - 1)
    if shift is None or shift <= 0:
        raise ValueError(f"the flow-matching shift is {shift}; it must be positive unless mu is given.")

    def shifted(level):
        return shift * level / (1 + (shift - 1) * level)

    return shifted(shifted(1.0) + fractions * (shifted(1 / timesteps) - shifted(1.0)))


def flow_mu(latent_side):
    """mu of FLUX for a latent of that side: linear in the L = (side / 2)^2 tokens, 0.5 at 256 and 1.15 at 4096."""
    return 0.5 + ((latent_side / 2) ** 2 - 256) * (1.15 - 0.5) / (4096 - 256)


def schedule(kind, num_steps, sigma_min=None, sigma_max=None, rho=None, table=None, shift=3.0, mu=None):
    """The grid of a name in `SCHEDULES`, (N,) float64 decreasing.

    Args: `rho`: None for the customary one (7 of `polynomial`, else 1); `table`: the `NoiseMap` that `discrete` needs; `shift`,
    `mu`: of `flowmatch`, which reads no sigma range. Raises ValueError for an unknown name or what a grid cannot do without.
    """
    if kind == "flowmatch":
        return flowmatch(num_steps, shift, mu)
    if kind == "discrete":
        if table is None:
            raise ValueError("schedule_type 'discrete' needs a model with a table of alphas_cumprod.")
        return discrete(num_steps, table, rho or 1.0, sigma_min, sigma_max)
    if kind not in SCHEDULES:
        raise ValueError(f"schedule_type is '{kind}'; it must be one of {', '.join(SCHEDULES)}.")
    if sigma_min is None or sigma_max is None:
        raise ValueError(f"schedule_type '{kind}' needs sigma_min and sigma_max.")
    if kind == "logsnr":
        return logsnr(num_steps, sigma_min, sigma_max)
    return {"polynomial": polynomial, "time_uniform": time_uniform}[kind](
        num_steps, sigma_min, sigma_max, rho or (7.0 if kind == "polynomial" else 1.0)
    )
