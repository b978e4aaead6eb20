"""What stands between a sampler and a network: input scale, network time, and the direction its raw output stands for.

The sampler's state is additive, x = x0 + sigma e, or flow matching, x = (1 - sigma) x0 + sigma e; both follow
dx/dsigma = d(x, sigma) = (x - D) / sigma, D the estimate of x0. Directions are formed without D where that is possible: the
quotient loses its digits at small sigma in half precision. Letters: B batch, K points per sample, T training timesteps; sigma (B,).
"""

import torch

from brisk.schedules import expand
from brisk.sigmas import time_of_sigma


def take_rows(condition, rows):
    """The entries of sample `rows` (R,) of every tensor in a nest of dicts, lists and tuples; None stays None.

    Rows that name each sample K times in a row repeat every condition as repeat_interleave(K) does; `rows` None gives
    `condition` as it is. Raises TypeError for what has no entry per sample.
    """
    if condition is None or rows is None:
        return condition
    if isinstance(condition, torch.Tensor):
        return condition.index_select(0, rows.to(condition.device))
    if isinstance(condition, dict):
        return {name: take_rows(value, rows) for name, value in condition.items()}
    if isinstance(condition, (list, tuple)):
        return type(condition)(take_rows(value, rows) for value in condition)
    raise TypeError(f"a condition of type {type(condition).__name__} cannot be repeated; give tensors with one row per sample.")


def denoised(x, direction, sigma):
    """D = x - sigma d, like `x`."""
    return x - expand(sigma, x) * direction


def vp_input(x, sigma):
    """Network input of a DDPM-type model: x / sqrt(1 + sigma^2)."""
    return x / (1 + expand(sigma, x) ** 2).sqrt()


def vp_timestep(table, sigma, rounded=False):
    """Network time T t(sigma) - 1, (B,) like `sigma`, of a `sigmas.NoiseMap`; `rounded` to a trained index for embedding tables."""
    total = len(table.log_signal)
    timestep = (total * time_of_sigma(table, sigma) - 1).to(sigma.dtype)
    return timestep.round().clamp(0, total - 1) if rounded else timestep


def vp_direction(output, x, sigma, prediction_type, clip=False):
    """d of a DDPM-type network's raw `output` (B, C, ...) at the additive state `x`, in x's precision.

    epsilon: d = output; v: D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) output; sample: D = output. Surplus channels of
    `output` (learned variance) are dropped; `clip` keeps D in [-1, 1]. Raises ValueError for another type.
    """
    output, sigma = output[:, : x.shape[1]].to(x.dtype), expand(sigma, x)
    if prediction_type == "epsilon":
        direction = output
    elif prediction_type == "v_prediction":
        direction = (x * sigma / (1 + sigma**2).sqrt() + output) / (1 + sigma**2).sqrt()
    elif prediction_type == "sample":
        direction = (x - output) / sigma
    else:
        raise ValueError(f"prediction_type is '{prediction_type}'; it must be epsilon, v_prediction or sample.")
    return (x - (x - sigma * direction).clamp(-1, 1)) / sigma if clip else direction


def edm_input(x, sigma, sigma_data=0.5):
    """Network input under EDM's preconditioning, x / sqrt(sigma^2 + sigma_data^2) (arXiv 2206.00364, table 1)."""
    return x / (expand(sigma, x) ** 2 + sigma_data**2).sqrt()


def edm_direction(output, x, sigma, sigma_data=0.5):
    """d of a raw network `output` F under EDM's preconditioning: (sigma x / s - sigma_data F) / s, s^2 = sigma^2 + sigma_data^2."""
    sigma = expand(sigma, x)
    scale = (sigma**2 + sigma_data**2).sqrt()
    return (sigma * x / scale - sigma_data * output.to(x.dtype)) / scale


def guide(uncond, cond, scale):
    """Classifier-free guidance of directions, outputs or velocities: uncond + scale (cond - uncond)."""
    return uncond + scale * (cond - uncond)


def classifier_guide(direction, gradient, sigma, scale):
    """d - sqrt(1 - abar) scale grad ln p(y | network input), abar = 1 / (1 + sigma^2) (arXiv 2105.05233, algorithm 2)."""
    sigma = expand(sigma, direction)
    return direction - scale * sigma / (1 + sigma**2).sqrt() * gradient
