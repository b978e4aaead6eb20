"""Residual Dirichlet policy over EPD tables (arXiv 2512.22796): where it starts, what it draws, how it learns, what it exports.

One decision per image: an action is a whole table; the reward comes with the finished image. Letters: S intervals, K points,
B images = P prompts x k variants, prompt-major. Positions are the partial sums of K + 1 segments of the unit interval.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from brisk import dirichlet
from brisk.epd import Tables

LEAST = 1e-6  # segment or weight of a cold start
LEAST_ALPHA = 1e-5
LOG_STD_RANGE = (-7.0, 2.0)
GROUPINGS = ("prompt", "mixed")
IMAGE_REWARD_OFFSET = 3 * 1.0333394966054072  # three standard deviations of the published reward
# (added, divided by) of the published mixture before clamping to [0, 1]
REWARD_SCALES = {
    "hps": (0.0, 1.0), "pickscore": (0.0, 26.0), "imagereward": (IMAGE_REWARD_OFFSET, 10.0), "clip": (0.0, 1.0),
    "aesthetic": (0.0, 10.0),
}  # fmt: skip


class Factors(NamedTuple):
    """Parameters of the policy's distributions, (S, ...) each; the scales are None where they are not learned."""

    alpha_pos: torch.Tensor  # (S, K + 1)
    alpha_weight: torch.Tensor  # (S, K)
    dir_location: torch.Tensor | None = None  # (S, K), of ln c
    dir_log_std: torch.Tensor | None = None
    time_location: torch.Tensor | None = None  # of ln a
    time_log_std: torch.Tensor | None = None


class Action(NamedTuple):
    """B drawn tables, (B, S, ...) each, without gradient."""

    segments: torch.Tensor  # (B, S, K + 1)
    weight: torch.Tensor  # (B, S, K)
    scale_dir: torch.Tensor | None = None
    scale_time: torch.Tensor | None = None


def sanitise(tables):
    """Tables whose positions rise by 1e-6 or more within (0, 1), as (tables, reordered (S,) bool, adjusted (S,) bool).

    Points are sorted by position (stable), then r_k is clamped into [r_{k-1} + e, 1 - e (K - k + 1)]; computed in float64.
    """
    tables = Tables(*(table.double() for table in tables))
    order = tables.r.argsort(dim=-1, stable=True)
    points = order.shape[-1]
    reordered = (order != torch.arange(points, device=order.device)).any(-1)
    tables = Tables(*(table.gather(-1, order) for table in tables))
    positions, previous = [], torch.zeros_like(tables.r[..., 0])
    for k in range(points):
        highest = torch.full_like(previous, 1 - LEAST * (points - k))
        previous = torch.minimum(torch.maximum(tables.r[..., k], previous + LEAST), highest)
        positions.append(previous)
    positions = torch.stack(positions, -1)
    return tables._replace(r=positions), reordered, (positions != tables.r).any(-1)


def cold_start(tables, concentration):
    """(segments (S, K + 1), weights (S, K), fallback of either (S,) bool, `Factors` without scales) of sanitised tables.

    alpha = concentration x mean; a row with a segment or weight <= 1e-6 becomes uniform.
    """
    ends = torch.zeros_like(tables.r[:, :1])
    segments = torch.cat([ends, tables.r, ends + 1], -1).diff(dim=-1)
    weight = tables.weight.clamp(min=LEAST)
    weight = weight / weight.sum(-1, keepdim=True)
    fallbacks = [(share <= LEAST).any(-1) for share in (segments, weight)]
    segments, weight = (
        torch.where(fallback[:, None], torch.full_like(share, 1 / share.shape[-1]), share)
        for share, fallback in zip((segments, weight), fallbacks, strict=True)
    )
    return segments, weight, *fallbacks, Factors(concentration * segments, concentration * weight)


def base_factors(tables, concentration, learn_dir=False, learn_time=False, scale_std=0.05):
    """The policy at the start, whose mean is the sanitised `tables` (S, K); scales log-normal around theirs where learned."""
    tables = sanitise(tables)[0]
    *_, start = cold_start(tables, concentration)
    log_std = torch.full_like(tables.r, math.log(scale_std))
    of_dir = (tables.scale_dir.log(), log_std) if learn_dir else (None, None)
    of_time = (tables.scale_time.log(), log_std) if learn_time else (None, None)
    return Factors(start.alpha_pos, start.alpha_weight, *of_dir, *of_time)


class Block(nn.Module):
    """x + Linear(silu(LayerNorm(x)))."""

    def __init__(self, width):
        super().__init__()
        self.layer_norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        """(S, H) -> (S, H)."""
        return x + self.linear(nn.functional.silu(self.layer_norm(x)))


class Residual(nn.Module):
    """The network of the policy: an embedding per interval, blocks, and a linear layer that starts at zero."""

    def __init__(self, intervals, outputs, hidden=128, blocks=2):
        super().__init__()
        self.step_embed = nn.Embedding(intervals, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(blocks))
        self.output_linear = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.output_linear.weight)
        nn.init.zeros_(self.output_linear.bias)

    def forward(self):
        """Residuals (S, outputs): K + 1 of segments, K of weights, then K locations and K log-stds per learned scale."""
        x = self.step_embed.weight
        for block in self.blocks:
            x = block(x)
        return self.output_linear(x)


def residual_width(base):
    """Outputs that `Residual` needs for the policy around `base`."""
    return sum(factor.shape[-1] for factor in base if factor is not None)


def apply_residuals(base, deltas):
    """The `Factors` at residuals (S, `residual_width`): alpha = max(exp(ln max(base, 1e-5) + delta), 1e-5), the rest add up."""
    widths = [0 if factor is None else factor.shape[-1] for factor in base]
    parts = deltas.split(widths, dim=-1)
    alphas = [
        (factor.clamp(min=LEAST_ALPHA).log() + part).exp().clamp(min=LEAST_ALPHA)
        for factor, part in zip(base[:2], parts[:2], strict=True)
    ]
    scales = []
    for index, (factor, part) in enumerate(zip(base[2:], parts[2:], strict=True)):
        moved = None if factor is None else factor + part
        scales.append(moved.clamp(*LOG_STD_RANGE) if moved is not None and index % 2 else moved)
    return Factors(*alphas, *scales)


def draw(factors, count, rng):
    """`count` actions of the policy; `rng`: a numpy generator."""
    scales = [
        None if location is None else dirichlet.draw_log_normal(location.detach(), log_std.detach(), count, rng)
        for location, log_std in (factors[2:4], factors[4:6])
    ]
    return Action(*(dirichlet.draw(alpha, count, rng) for alpha in factors[:2]), *scales)


def action_tables(action, fixed):
    """`Tables` (B, S, K) of actions; scales that are not learned are those of the tables `fixed` (S, K)."""
    r = action.segments[..., :-1].cumsum(-1)
    scales = [
        table.to(r).expand_as(r) if scale is None else scale
        for scale, table in zip(action[2:], (fixed.scale_dir, fixed.scale_time), strict=True)
    ]
    return Tables(r, action.weight, *scales)


def log_densities(factors, action):
    """ln pi by factor, each (B, S): positions, weights, and the learned scales summed over points."""
    found = [dirichlet.log_density(factors.alpha_pos, action.segments), dirichlet.log_density(factors.alpha_weight, action.weight)]
    for scale, location, log_std in ((action.scale_dir, *factors[2:4]), (action.scale_time, *factors[4:6])):
        if location is not None:
            found.append(dirichlet.log_normal_density(location, log_std, scale).sum(-1))
    return found


def log_density(factors, action):
    """ln pi(action), (B,): the sum over intervals and factors."""
    return torch.stack(log_densities(factors, action)).sum((0, -1))


def entropies(factors):
    """Entropy by factor, each (S,)."""
    found = [dirichlet.entropy(alpha) for alpha in factors[:2]]
    pairs = (factors[2:4], factors[4:6])
    return found + [dirichlet.log_normal_entropy(*pair).sum(-1) for pair in pairs if pair[0] is not None]


def divergences(factors, base):
    """KL(pi || base) by factor, each (S,)."""
    found = [
        dirichlet.divergence(alpha, start.clamp(min=LEAST_ALPHA)) for alpha, start in zip(factors[:2], base[:2], strict=True)
    ]
    pairs = ((factors[2:4], base[2:4]), (factors[4:6], base[4:6]))
    return found + [dirichlet.normal_divergence(*own, *start).sum(-1) for own, start in pairs if own[0] is not None]


def advantages(rewards, variants, grouping="prompt", normalise=True):
    """A_i = R_i - mean of the other rewards of its group, then whitened over the batch; (B,) like `rewards`.

    `grouping` prompt: groups of the k = `variants` images of a prompt; mixed: every P-th image, as published. k = 1: A = R.
    Raises ValueError where k does not divide B.
    """
    if len(rewards) % variants:
        raise ValueError(f"{len(rewards)} rewards are no multiple of {variants} variants per prompt.")
    if grouping not in GROUPINGS:
        raise ValueError(f"the grouping is '{grouping}'; it must be {' or '.join(GROUPINGS)}.")
    found = rewards
    if variants > 1:
        dim, shape = (1, (-1, variants)) if grouping == "prompt" else (0, (variants, -1))
        groups = rewards.reshape(shape)
        found = (groups - (groups.sum(dim, keepdim=True) - groups) / (variants - 1)).flatten()
    if normalise:
        found = (found - found.mean()) / found.std(correction=0).clamp(min=1e-8)
    return found


class PolicyLoss(NamedTuple):
    """What `policy_loss` gives; 0-dimensional except the ratio."""

    loss: torch.Tensor
    policy_loss: torch.Tensor
    divergence: torch.Tensor
    entropy: torch.Tensor
    ratio: torch.Tensor  # (B,)
    clip_fraction: torch.Tensor


def policy_loss(factors, base, action, old_log_density, advantage, clip=0.2, kl_coef=0.0, entropy_coef=0.0):
    """Clipped objective (arXiv 1707.06347, equation 7) of whole tables, plus kl_coef KL(pi || base) - entropy_coef H."""
    ratio = (log_density(factors, action) - old_log_density).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    surrogate = torch.maximum(-advantage * ratio, -advantage * clipped).mean()
    divergence = torch.stack(divergences(factors, base)).sum()
    spread = torch.stack(entropies(factors)).sum()
    loss = surrogate + kl_coef * divergence - entropy_coef * spread
    outside = ((ratio - 1).abs() > clip).double().mean()
    return PolicyLoss(loss, surrogate, divergence, spread, ratio, outside)


def exported_tables(factors, fixed, point="mean", scale_point="mean"):
    """The `Tables` (S, K) that stand for the policy: its mean, or the mode of rows whose alpha are all above 1.

    Args: `fixed`: tables whose scales stay where they are not learned; `scale_point`: mean or median of the log-normals.
    """

    def center(alpha):
        total = alpha.sum(-1, keepdim=True)
        mean = alpha / total
        if point == "mean":
            return mean
        return torch.where((alpha > 1).all(-1, keepdim=True), (alpha - 1) / (total - alpha.shape[-1]), mean)

    def scale(location, log_std, table):
        if location is None:
            return table.to(factors.alpha_pos)
        return (location + ((2 * log_std).exp() / 2 if scale_point == "mean" else 0)).exp()

    r = center(factors.alpha_pos)[..., :-1].cumsum(-1)
    scales = scale(*factors[2:4], fixed.scale_dir), scale(*factors[4:6], fixed.scale_time)
    return Tables(r, center(factors.alpha_weight), *scales)


def wide_enough(tables, scale_dir, scale_time):
    """Ranges (z_c, z_a), enlarged where a scale of `tables` lies outside 1 +- z."""
    return tuple(
        max(stated, 1.001 * (scale - 1).abs().max().item()) if (scale - 1).abs().max() > stated else stated
        for stated, scale in ((scale_dir, tables.scale_dir), (scale_time, tables.scale_time))
    )


def normalised_reward(head, raw):
    """A reward model's score brought to [0, 1] as the published mixture does. ValueError for an unknown head."""
    if head not in REWARD_SCALES:
        raise ValueError(f"the reward is '{head}'; it must be one of {', '.join(REWARD_SCALES)}.")
    added, divisor = REWARD_SCALES[head]
    return ((raw + added) / divisor).clamp(0, 1)


def mixed_reward(scores, weights):
    """Weighted mean (B,) of normalised scores {head: (B,)} over the heads of positive weight {head: float}."""
    heads = [head for head, weight in weights.items() if weight > 0]
    return sum(weights[head] * normalised_reward(head, scores[head]) for head in heads) / sum(weights[head] for head in heads)
