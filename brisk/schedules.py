"""Noise schedules: cumulative signal tables, solver grids, conversions between prediction types.

Letters: B batch, T training timesteps, N solver steps; a = sqrt(abar), s = sqrt(1 - abar).
"""

from typing import NamedTuple

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class SolverGrid(NamedTuple):
    """Timesteps of an N-step DDIM grid and the cumulative signal at both ends of each step, all of shape (N,)."""

    start_timesteps: torch.Tensor  # int64, t_i = (i + 1) k - 1
    end_timesteps: torch.Tensor  # int64, t'_i = max(t_i - k, 0)
    alpha_cumprod_start: torch.Tensor  # float32
    alpha_cumprod_end: torch.Tensor  # float32

    def to(self, device):
        """The same grid on `device`."""
        return SolverGrid(*(table.to(device) for table in self))


def solver_grid(alphas_cumprod, num_ddim_timesteps):
    """Cut the T training timesteps into N pieces of k = T // N steps (arXiv 2310.04378, section 4.3).

    Args: `alphas_cumprod` (T,) cumulative signal, `num_ddim_timesteps` N.
    Raises ValueError unless 1 <= N <= T.
    """
    total = len(alphas_cumprod)
    if not 1 <= num_ddim_timesteps <= total:
        raise ValueError(f"num_ddim_timesteps is {num_ddim_timesteps}; it must be between 1 and {total}.")
    skip = total // num_ddim_timesteps
    start = (torch.arange(num_ddim_timesteps) + 1) * skip - 1
    end = (start - skip).clamp(min=0)
    table = alphas_cumprod.float().cpu()
    return SolverGrid(start, end, table[start], table[end])


def expand(values, like):
    """Per-sample scalars (B,) as (B, 1, 1, ...), to broadcast against `like`."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def signal_and_noise(alpha_cumprod, like):
    """(a, s) = (sqrt(abar), sqrt(1 - abar)) of `alpha_cumprod` (B,), shaped to broadcast against `like`."""
    alpha_cumprod = expand(alpha_cumprod, like)
    return alpha_cumprod.sqrt(), (1 - alpha_cumprod).sqrt()


def to_x0_eps(output, x, a, s, prediction_type):
    """Clean sample and noise that a raw network `output` at the noisy input `x` = a x0 + s eps stands for.

    Args: `output`, `x` (B, C, H, W); `a`, `s` broadcastable. Raises ValueError for an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return (x - s * output) / a, output
    if prediction_type == "v_prediction":
        return a * x - s * output, a * output + s * x
    if prediction_type == "sample":
        return output, (x - a * output) / s
    raise ValueError(f"prediction_type is '{prediction_type}'; it must be one of {', '.join(PREDICTION_TYPES)}.")


def prediction_target(x0, eps, a, s, prediction_type):
    """What a network of this type is to predict at a x0 + s eps. Raises ValueError for an unknown prediction type."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return a * eps - s * x0
    if prediction_type == "sample":
        return x0
    raise ValueError(f"prediction_type is '{prediction_type}'; it must be one of {', '.join(PREDICTION_TYPES)}.")


def check_prediction_type(prediction_type, alphas_cumprod=None):
    """ValueError for an unknown type, or for epsilon where the table reaches zero signal (division by a = 0)."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is '{prediction_type}'; it must be one of {', '.join(PREDICTION_TYPES)}.")
    if prediction_type == "epsilon" and alphas_cumprod is not None and alphas_cumprod.min() < 1e-6:
        raise ValueError(
            "the teacher's schedule has zero terminal SNR, from which epsilon cannot recover an image: "
            "use a v_prediction or sample teacher (--prediction_type says which it is)."
        )
