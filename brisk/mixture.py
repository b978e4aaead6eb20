"""A mixture of Gaussians whose denoiser is known exactly: a model without a network, to measure samplers against.

Letters: B batch, J components, E values of a sample. The state is x = a x0 + sigma e, with a = 1 (additive) or a = 1 - sigma
(flow matching); the prior of component j is N(mu_j, s_j^2 I).
"""

from typing import NamedTuple

import torch

from brisk.schedules import expand


class Mixture(NamedTuple):
    """Components in one precision and on one device."""

    means: torch.Tensor  # (J, E)
    stds: torch.Tensor  # (J,)
    weights: torch.Tensor  # (J,)
    class_weights: torch.Tensor | None = None  # (classes, J), in place of `weights` where a class is asked for


def from_lists(means, stds, weights, class_weights=None, dtype=torch.float64, device=None):
    """The mixture of nested lists of numbers; weights are scaled to sum to 1. ValueError where the shapes disagree."""
    means, stds, weights = (torch.tensor(values, dtype=dtype, device=device) for values in (means, stds, weights))
    rows = None if class_weights is None else torch.tensor(class_weights, dtype=dtype, device=device)
    if means.ndim != 2 or stds.shape != means.shape[:1] or weights.shape != stds.shape:
        raise ValueError("a mixture needs means (J, E), stds (J,) and weights (J,).")
    if rows is not None:
        if rows.ndim != 2 or rows.shape[1:] != stds.shape:
            raise ValueError("class_weights must have a row of J weights per class.")
        rows = rows / rows.sum(-1, keepdim=True)
    return Mixture(means, stds, weights / weights.sum(), rows)


def posterior_mean(mixture, x, sigma, labels=None, flow=False):
    """D = E[x0 | x] like `x` (B, ...), E values a sample.

    v_j = a^2 s_j^2 + sigma^2, responsibilities prop. to w_j N(x; a mu_j, v_j I), D = sum_j p_j (a s_j^2 x + sigma^2 mu_j) / v_j.
    Args: `sigma` (B,); `labels` (B,) int64 rows of the class weights, None for the weights of the whole mixture.
    """
    flat = x.flatten(1)
    signal = (1 - sigma if flow else torch.ones_like(sigma))[:, None]
    variance = signal**2 * mixture.stds**2 + sigma[:, None] ** 2  # (B, J)
    weights = mixture.weights if labels is None else mixture.class_weights[labels]
    distance = (flat[:, None] - signal[:, :, None] * mixture.means).square().sum(-1)
    logits = weights.log() - distance / (2 * variance) - flat.shape[1] / 2 * variance.log()
    share = logits.softmax(-1) / variance
    of_x = (share * signal * mixture.stds**2).sum(-1, keepdim=True)
    of_means = (share * sigma[:, None] ** 2) @ mixture.means
    return (of_x * flat + of_means).reshape(x.shape)


def direction(mixture, x, sigma, labels=None, flow=False):
    """d = (x - D) / sigma: the noise of the additive family, the velocity of the flow family."""
    return (x - posterior_mean(mixture, x, sigma, labels, flow)) / expand(sigma, x)
