"""Distances between sets of feature vectors."""

import numpy as np
import torch

BLOCK = 1024  # rows of a matrix of distances held at a time


def gaussian_frechet(mu1, cov1, mu2, cov2) -> float:
    """Squared Frechet distance |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two Gaussians, in float64.

    Means are (D,), covariances (D, D) symmetric; arrays or CPU tensors. Raises ValueError for other shapes and for
    values that are not finite."""
    mu1, cov1, mu2, cov2 = (np.asarray(value, dtype=np.float64) for value in (mu1, cov1, mu2, cov2))
    size = mu1.shape[0] if mu1.ndim == 1 else -1
    if mu2.shape != (size,) or cov1.shape != (size, size) or cov2.shape != (size, size):
        shapes = ", ".join(str(value.shape) for value in (mu1, cov1, mu2, cov2))
        raise ValueError(f"Means must be (D,) and covariances (D, D) with the same D, got {shapes}.")
    if not all(np.isfinite(value).all() for value in (mu1, cov1, mu2, cov2)):
        raise ValueError("Means and covariances must be finite.")
    # tr (C1 C2)^(1/2) = tr (R C2 R)^(1/2) with R = C1^(1/2): symmetric, so its eigenvalues are real and not negative.
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0.0)).sum()
    return float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2.0 * cross)


def frechet_distance(features_a, features_b) -> float:
    """Squared Frechet distance between Gaussians fitted to two feature sets (N, D) and (M, D), in float64.

    Arrays or CPU tensors; the covariances are the unbiased ones. Raises ValueError when the shapes disagree, when a set
    has fewer than D + 1 rows, or when a value is not finite."""
    a, b = (np.asarray(features, dtype=np.float64) for features in (features_a, features_b))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Features must be (N, D) and (M, D) with the same D, got {a.shape} and {b.shape}.")
    if min(len(a), len(b)) < a.shape[1] + 1:
        needed = f"{a.shape[1]} dimensions need at least {a.shape[1] + 1} samples on each side"
        raise ValueError(f"Features of {needed}, got {len(a)} and {len(b)}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("Features must be finite.")
    cov_a, cov_b = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (a, b))
    return gaussian_frechet(a.mean(axis=0), cov_a, b.mean(axis=0), cov_b)


def precision_recall(real, generated, neighbours=3) -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991) of feature sets (N, D) and (M, D), arrays or tensors.

    A set is estimated by balls about its rows that reach to their k-th nearest other row. Precision is the share of generated
    rows within the real set, recall the share of real rows within the generated one. Distances are computed where `real` is,
    in float32 about the mean of `real`, a block of rows at a time. Raises ValueError when the shapes disagree, when a set has
    fewer than k + 1 rows, or when a value is not finite."""
    real, generated = (torch.as_tensor(features) for features in (real, generated))
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise ValueError(f"Features must be (N, D) and (M, D) with the same D, got {shapes}.")
    if neighbours < 1 or min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need at least {neighbours + 1} samples, got {len(real)} and {len(generated)}.")
    centre = real.double().mean(0)
    # about the centre, since squared lengths far from it would cost float32 the digits of the distances
    real, generated = ((features.to(real.device).double() - centre).float() for features in (real, generated))
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise ValueError("Features must be finite.")
    real_reach, generated_reach = _reach(real, neighbours), _reach(generated, neighbours)
    is_precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled = 0
    for rows, reach in zip(real.split(BLOCK), real_reach.split(BLOCK), strict=True):
        distances = torch.cdist(rows, generated)
        is_precise |= (distances <= reach[:, None]).any(0)
        recalled += int((distances <= generated_reach).any(1).sum())
    return float(is_precise.double().mean()), recalled / len(real)


def _reach(features, neighbours):
    """Distance (N,) of each row of (N, D) to its k-th nearest other row."""
    # the nearest row of all is the row itself
    nearest = [torch.cdist(rows, features).kthvalue(neighbours + 1, dim=1).values for rows in features.split(BLOCK)]
    return torch.cat(nearest)
