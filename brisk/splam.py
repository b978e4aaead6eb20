"""Sub-path linear approximation distillation (SLAM / SPLAM, arXiv 2404.13903): the method as functions of tensors.

Letters: B batch, C channels, E embedding width; a, s signal and noise coefficients at the start t of a solver step,
a', s' (`_end`) at its end t'. Everything is float32 here, whatever the precision of the networks.
"""

import math

import torch

from brisk.schedules import expand, to_x0_eps

SIGMA_DATA = 0.5


def boundary_scalings(timesteps, timestep_scaling=10.0, sigma_data=SIGMA_DATA):
    """(c_skip, c_out) of the consistency function at float or integer `timesteps` (arXiv 2310.04378, appendix).

    c_skip = sd^2 / (u^2 + sd^2) and c_out = u / sqrt(u^2 + sd^2) with u = `timestep_scaling` * t; (1, 0) at t = 0.
    """
    u = timestep_scaling * timesteps.float()
    return sigma_data**2 / (u**2 + sigma_data**2), u / (u**2 + sigma_data**2).sqrt()


def draw_fraction(uniform, gamma_min=0.0, gamma_one_prob=0.0):
    """Sub-path fraction gamma in (gamma_min, 1] from two rows of uniform numbers in [0, 1), shape (2, B).

    Row 0 is the position, row 1 decides with probability `gamma_one_prob` that gamma is exactly 1. gamma = 0 is
    never drawn: it is degenerate where the signal vanishes.
    """
    gamma = 1 - uniform[0] * (1 - gamma_min)
    return torch.where(uniform[1] < gamma_one_prob, torch.ones_like(gamma), gamma)


def gamma_embedding(gamma, dim, scale=1000.0):
    """Sinusoidal embedding (B, dim) of w' = 10 - 10 gamma, for the U-Net's `timestep_cond`.

    gamma = 1 gives [0...0, 1...1], what diffusers' pipelines feed at guidance_scale=1 (they embed guidance_scale - 1
    by the same formula with scale 1000). Without `dim` (LoRA: the noise level alone tells gamma) there is none.
    """
    if dim is None:
        return None
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=gamma.device).float())
    angles = scale * (10 - 10 * gamma.float())[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))


def guided_ddim_step(cond, uncond, x, a, s, a_end, s_end, guidance, prediction_type):
    """One DDIM step of the teacher from t to t' under guidance out = cond + w (cond - uncond).

    Both x0 and eps are guided, for every prediction type. Returns (x_end, guided x0, guided eps), each like `x`.
    """
    x0_cond, eps_cond = to_x0_eps(cond, x, a, s, prediction_type)
    x0_uncond, eps_uncond = to_x0_eps(uncond, x, a, s, prediction_type)
    x0 = x0_cond + guidance * (x0_cond - x0_uncond)
    eps = eps_cond + guidance * (eps_cond - eps_uncond)
    return a_end * x0 + s_end * eps, x0, eps


def sub_path_point(x, x_end, gamma, a, s, a_end, s_end):
    """Point x_gamma on the segment from the drifted end to the start, and its noise level (2404.13903, section 4).

    With r = a / a': x_gamma = gamma x + (1 - gamma) r x_end and sigma_gamma^2 = A^2 + gamma^2 (s^2 - A^2), A = r s'.
    Args: `x`, `x_end` (B, C, H, W), `gamma` (B,). Returns (x_gamma like `x`, sigma_gamma (B, 1, 1, 1)).
    """
    gamma = expand(gamma, x)
    ratio = a / a_end
    drifted_noise = ratio * s_end
    sigma = (drifted_noise**2 + gamma**2 * (s**2 - drifted_noise**2)).clamp(min=0).sqrt()
    return gamma * x + (1 - gamma) * ratio * x_end, sigma


def sub_path_x0(output, x_gamma, a, s, sigma, prediction_type):
    """Clean sample that the student's raw `output` at x_gamma stands for, when it is called with time t.

    v_prediction keeps the network's combination at t, v = a e - s x0, so X0 = (a x - sigma v) / (a^2 + s sigma):
    bounded for every gamma, and the usual conversion at gamma = 1.
    """
    if prediction_type == "epsilon":
        return (x_gamma - sigma * output) / a
    if prediction_type == "v_prediction":
        return (a * x_gamma - sigma * output) / (a**2 + s * sigma).clamp(min=1e-8)
    return output


def snr_matched_input(x_gamma, sigma, a, log_snr_table):
    """Rescaled student input and the fractional time whose signal-to-noise ratio it has (`--subpath_param snr`).

    rho = sqrt(a^2 + sigma^2); tau solves ln(a/s)(tau) = ln(a/sigma) by linear interpolation between integer times.
    Args: `log_snr_table` (T,) = ln(a(t)/s(t)), decreasing, from `log_snr_table()`.
    Returns (x_gamma / rho, tau (B,) float, rho (B, 1, 1, 1)). gamma = 1 gives rho = 1, tau = t.
    """
    rho = (a**2 + sigma**2).sqrt()
    wanted = (a / sigma).log().flatten()
    last = len(log_snr_table) - 1
    # searchsorted wants an increasing table: look the negated one up
    upper = torch.searchsorted(-log_snr_table, -wanted).clamp(1, last)
    left, right = log_snr_table[upper - 1], log_snr_table[upper]
    fraction = ((left - wanted) / (left - right)).clamp(0, 1)
    # a = 0 at the end of a zero-SNR schedule: ln 0 = -inf, the time is the last one
    fraction = torch.where(torch.isneginf(wanted), torch.ones_like(fraction), fraction)
    return x_gamma / rho, (upper - 1) + fraction, rho


def log_snr_table(alphas_cumprod):
    """ln(a(t) / s(t)) for every training timestep, shape (T,), float32."""
    alphas_cumprod = alphas_cumprod.double()
    return (0.5 * (alphas_cumprod.log() - (1 - alphas_cumprod).log())).float()


def student_input(x_gamma, timesteps, sigma, a, snr_table=None):
    """What the student is called on: (input, time, rho), as published (rho None), or matched in SNR with a table."""
    if snr_table is None:
        return x_gamma, timesteps, None
    return snr_matched_input(x_gamma, sigma, a, snr_table)


def student_x0(output, x_gamma, a, s, sigma, rho, prediction_type):
    """Clean sample that the student's raw `output` on `student_input` stands for."""
    if rho is None or prediction_type != "v_prediction":
        return sub_path_x0(output, x_gamma, a, s, sigma, prediction_type)
    return (a / rho) * (x_gamma / rho) - (sigma / rho) * output


def consistency_output(x, x0, timesteps, timestep_scaling=10.0):
    """f = c_skip(t) x + c_out(t) x0, the boundary condition f = x at t = 0 built in."""
    c_skip, c_out = boundary_scalings(timesteps, timestep_scaling)
    return expand(c_skip, x) * x + expand(c_out, x) * x0


def distillation_loss(prediction, target, loss_type="l2", huber_c=1e-3):
    """Mean over all elements of d^2 (`l2`) or sqrt(d^2 + c^2) - c (`huber`), d = prediction - target in float32."""
    difference = prediction.float() - target.float()
    if loss_type == "l2":
        return difference.square().mean()
    if loss_type == "huber":
        return ((difference.square() + huber_c**2).sqrt() - huber_c).mean()
    raise ValueError(f"loss_type is '{loss_type}'; it must be l2 or huber.")
