"""Dirichlet and log-normal distributions in closed form: log-density, entropy, divergence, draws.

The last axis of a Dirichlet holds its components; log-normals are elementwise and given by the location and the log standard
deviation of their logarithm.
"""

import math

import torch

SMALLEST = 1e-9  # component of a draw; its logarithm enters log-densities


def log_density(alpha, x):
    """ln Dirichlet(x; alpha), (...): sum (alpha - 1) ln x + ln Gamma(sum alpha) - sum ln Gamma(alpha). x (..., C) > 0."""
    return ((alpha - 1) * x.log()).sum(-1) + alpha.sum(-1).lgamma() - alpha.lgamma().sum(-1)


def entropy(alpha):
    """Differential entropy (...) of Dirichlet(alpha (..., C))."""
    total = alpha.sum(-1)
    log_beta = alpha.lgamma().sum(-1) - total.lgamma()
    return log_beta + (total - alpha.shape[-1]) * total.digamma() - ((alpha - 1) * alpha.digamma()).sum(-1)


def divergence(alpha, base):
    """KL(Dirichlet(alpha) || Dirichlet(base)), (...)."""
    total = alpha.sum(-1)
    log_ratio = total.lgamma() - alpha.lgamma().sum(-1) - base.sum(-1).lgamma() + base.lgamma().sum(-1)
    return log_ratio + ((alpha - base) * (alpha.digamma() - total.digamma()[..., None])).sum(-1)


def draw(alpha, count, rng):
    """`count` draws (count, ..., C) like `alpha`, every component at least 1e-9; `rng`: a numpy generator."""
    shape = alpha.detach().double().cpu().numpy()
    gamma = torch.from_numpy(rng.standard_gamma(shape, size=(count, *shape.shape)))
    shares = (gamma / gamma.sum(-1, keepdim=True)).nan_to_num(1 / shape.shape[-1]).clamp(min=SMALLEST)
    return (shares / shares.sum(-1, keepdim=True)).clamp(min=SMALLEST).to(alpha)


def log_normal_density(location, log_std, x):
    """ln of the density of exp(N(location, exp(log_std)^2)) at x > 0, elementwise."""
    z = (x.log() - location) / log_std.exp()
    return -z**2 / 2 - log_std - math.log(2 * math.pi) / 2 - x.log()


def log_normal_entropy(location, log_std):
    """Differential entropy, elementwise."""
    return location + log_std + (1 + math.log(2 * math.pi)) / 2


def normal_divergence(location, log_std, base_location, base_log_std):
    """KL between the normals of the logarithms, which is that of the log-normals, elementwise."""
    squares = (2 * log_std).exp() + (location - base_location) ** 2
    return base_log_std - log_std + squares / (2 * (2 * base_log_std).exp()) - 0.5


def draw_log_normal(location, log_std, count, rng):
    """`count` draws (count, ...) like `location`; `rng`: a numpy generator."""
    z = torch.from_numpy(rng.standard_normal((count, *location.shape))).to(location)
    return (location + log_std.exp() * z).exp().detach()
