"""Gaussian diffusion as DiT trains and samples it: linear betas, learned variance, respaced steps, in float64 tables.

Source: arXiv 2102.09672 (learned variance, variational bound), 2305.08891 (zero terminal SNR), 2401.08741 (FPDM).
Letters: B batch, C channels, N sampling steps; abar cumulative signal; a network's output has the prediction in its first
half of the channels and, with learned variance, one logit per value in the second.
"""

import math
from typing import NamedTuple

import torch

from brisk.schedules import expand, prediction_target, to_x0_eps


class Tables(NamedTuple):
    """A (respaced) process: one entry per step, index 0 the least noisy, all (N,)."""

    timesteps: torch.Tensor  # int64, what the network is told
    betas: torch.Tensor  # float64, like the rest
    alphas_cumprod: torch.Tensor
    alphas_cumprod_prev: torch.Tensor
    posterior_log_variance: torch.Tensor  # its value at 0, minus infinity, replaced by that at 1

    def to(self, device):
        """The same tables on `device` (float32 where it knows no float64)."""
        wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
        return Tables(self.timesteps.to(device), *(table.to(device, wide) for table in self[1:]))


def linear_betas(steps=1000):
    """DDPM's betas (T,), float64: 1e-4 to 0.02 at 1,000 steps, scaled for other numbers."""
    return torch.linspace(0.1 / steps, 20.0 / steps, steps, dtype=torch.float64)


def zero_terminal_snr(betas):
    """The betas (T,) rescaled so that no signal is left at the last step (arXiv 2305.08891, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    signal = root**2
    return torch.cat([1 - signal[:1], 1 - signal[1:] / signal[:-1]])


def respaced_timesteps(spec, total=1000):
    """The timesteps that sampling visits, ascending.

    Args: `spec`: a number of steps, numbers per equal section ("10,15,25"), or "ddimN" for fixed strides.
    Raises ValueError where that many steps do not fit.
    """
    text = str(spec)
    if text.startswith("ddim"):
        wanted = int(text[4:])
        stride = next((stride for stride in range(1, total) if len(range(0, total, stride)) == wanted), None)
        if stride is None:
            raise ValueError(f"no stride over {total} timesteps gives {wanted} steps.")
        return list(range(0, total, stride))
    counts = [int(count) for count in text.split(",")]
    if len(counts) == 1 and counts[0] == 1:
        return [total - 1]
    sizes = [total // len(counts) + (section < total % len(counts)) for section in range(len(counts))]
    found, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        if not 1 <= count <= size:
            raise ValueError(f"{size} timesteps cannot be divided into {count} steps.")
        stride, place = (size - 1) / (count - 1) if count > 1 else 1, 0.0
        for _ in range(count):
            found.append(start + round(place))
            place += stride  # summed, not multiplied: half-way cases follow the reference
        start += size
    return found


def make_tables(betas, timesteps=None):
    """`Tables` of the process with `betas` (T,), restricted to `timesteps` (a list; all if None)."""
    signal = (1 - betas.double()).cumprod(0)
    timesteps = torch.arange(len(betas)) if timesteps is None else torch.tensor(timesteps)
    kept = signal[timesteps]
    previous = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
    betas = 1 - kept / previous
    variance = betas * (1 - previous) / (1 - kept)
    if len(variance) > 1:
        variance = torch.cat([variance[1:2], variance[1:]])
    else:
        variance = betas  # a single step leaves no noise to add
    return Tables(timesteps, betas, kept, previous, variance.log())


def at(table, index, like):
    """`table[index]` (B,) in the dtype of `like`, shaped to broadcast against it. Sums belong before it: 1 - abar is small."""
    return expand(table[index].to(like.dtype), like)


def signal_and_noise(tables, index, like):
    """(sqrt(abar), sqrt(1 - abar)) at step `index` (B,)."""
    return at(tables.alphas_cumprod.sqrt(), index, like), at((1 - tables.alphas_cumprod).sqrt(), index, like)


def noised(tables, x0, noise, index):
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise at step `index` (B,)."""
    a, s = signal_and_noise(tables, index, x0)
    return a * x0 + s * noise


def target(tables, x0, noise, index, prediction_type):
    """What the first half of the output is trained towards: the noise, or v."""
    return prediction_target(x0, noise, *signal_and_noise(tables, index, x0), prediction_type)


def flow_path(x0, noise, timesteps, total=1000):
    """(x_t, target) of the straight path (1 - tau) x0 + tau noise, tau = t / T, whose velocity is noise - x0.

    The target is its negative, x0 - noise, as the published code trains it.
    """
    tau = expand(timesteps.to(x0.dtype) / total, x0)
    return (1 - tau) * x0 + tau * noise, x0 - noise


def recover(tables, prediction, x_t, index, prediction_type):
    """(x0, noise) that a prediction at x_t stands for."""
    return to_x0_eps(prediction, x_t, *signal_and_noise(tables, index, x_t), prediction_type)


def learned_log_variance(tables, logits, index):
    """Between the posterior's log variance (logit -1) and log beta (logit 1), arXiv 2102.09672, equation 15."""
    low, high = at(tables.posterior_log_variance, index, logits), at(tables.betas.log(), index, logits)
    fraction = (logits + 1) / 2
    return fraction * high + (1 - fraction) * low


def posterior_mean(tables, x0, x_t, index):
    """Mean of q(x_{t-1} | x_t, x0)."""
    noise, previous = 1 - tables.alphas_cumprod, tables.alphas_cumprod_prev
    of_x0 = tables.betas * previous.sqrt() / noise
    of_x_t = (1 - previous) * (1 - tables.betas).sqrt() / noise
    return at(of_x0, index, x_t) * x0 + at(of_x_t, index, x_t) * x_t


def flat_mean(values):
    """Mean over all but the batch dimension, (B,)."""
    return values.flatten(1).mean(1)


def variational_bound(tables, x0, x_t, index, output, prediction_type):
    """The term of the variational bound at step `index`, (B,), in bits per dimension; gradient reaches the logits alone."""
    prediction, logits = output.chunk(2, dim=1)
    predicted, _ = recover(tables, prediction.detach(), x_t, index, prediction_type)
    mean, log_variance = posterior_mean(tables, predicted, x_t, index), learned_log_variance(tables, logits, index)
    true_mean, true_log = posterior_mean(tables, x0, x_t, index), at(tables.posterior_log_variance, index, x_t)
    ratio = true_log - log_variance
    divergence = 0.5 * (-1 - ratio + ratio.exp() + (true_mean - mean) ** 2 * (-log_variance).exp())
    likelihood = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    return torch.where(index == 0, flat_mean(likelihood), flat_mean(divergence)) / math.log(2)


def _normal_cdf(x):
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(x, mean, log_scale):
    """Of bins of width 2/255, open at both ends."""
    centred, inverse = x - mean, (-log_scale).exp()
    above, below = _normal_cdf(inverse * (centred + 1 / 255)), _normal_cdf(inverse * (centred - 1 / 255))

    def log(value):
        return value.clamp(min=1e-12).log()

    return torch.where(x < -0.999, log(above), torch.where(x > 0.999, log(1 - below), log(above - below)))


def loss_weights(tables, index, weighting, prediction_type):
    """Weights (B,), float64, of the squared error of the prediction; `weighting` as `--loss_weighting` takes it.

    `p2` is SNR sqrt(1 - abar) on the error of x0 (arXiv 2204.00227 with k = 1, gamma = 1/2), that is abar sqrt(1 - abar) on
    v and sqrt(1 - abar) on epsilon; `min_snr` min(SNR, 5) / (SNR + 1) on v and / SNR on epsilon (arXiv 2303.09556).
    """
    signal = tables.alphas_cumprod[index]
    if weighting == "p2":
        return (signal if prediction_type == "v_prediction" else 1.0) * (1 - signal).sqrt()
    if weighting == "min_snr":
        snr = (signal / (1 - signal)).clamp(min=1e-12)
        return snr.clamp(max=5) / (snr + (prediction_type == "v_prediction"))
    return torch.ones_like(signal)


def ddpm_step(tables, output, x_t, index, prediction_type, noise):
    """x_{t-1} by ancestral sampling with learned variance; `index` (B,), `noise` (B, C, h, w), unused at index 0."""
    prediction, logits = output.chunk(2, dim=1)
    x0, _ = recover(tables, prediction, x_t, index, prediction_type)
    spread = (0.5 * learned_log_variance(tables, logits, index)).exp()
    return posterior_mean(tables, x0, x_t, index) + expand(index > 0, x_t) * spread * noise


def ddim_step(tables, prediction, x_t, index, prediction_type, noise=None, eta=0.0):
    """x_{t-1} by DDIM (arXiv 2010.02502, equation 12); `noise` matters for `eta` above 0 alone."""
    x0, eps = recover(tables, prediction, x_t, index, prediction_type)
    signal, previous = tables.alphas_cumprod, tables.alphas_cumprod_prev
    sigma = eta * ((1 - previous) / (1 - signal)).sqrt() * (1 - signal / previous).sqrt()
    mean = at(previous.sqrt(), index, x_t) * x0 + at((1 - previous - sigma**2).sqrt(), index, x_t) * eps
    return mean if not eta else mean + expand(index > 0, x_t) * at(sigma, index, x_t) * noise
