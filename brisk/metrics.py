"""Distances between images, and between sets of feature vectors."""

import numpy as np


def psnr(images, others, span) -> float:
    """Peak signal-to-noise ratio in dB between two equal-shaped sets of images whose values span `span`; inf if equal."""
    error = np.square(np.asarray(images, dtype=np.float64) - np.asarray(others, dtype=np.float64)).mean()
    return float(10 * np.log10(span**2 / error)) if error else float("inf")


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
