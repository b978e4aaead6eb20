"""The Frechet distance against closed forms and against scipy's matrix square root."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from brisk.metrics import frechet_distance, gaussian_frechet


def random_covariance(size: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T / rank


def test_diagonal_gaussians_have_the_closed_form():
    mu1, mu2 = np.array([1.0, -2.0, 0.5]), np.array([0.0, 1.0, 0.5])
    std1, std2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.25, 0.5])
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    assert gaussian_frechet(mu1, np.diag(std1**2), mu2, np.diag(std2**2)) == pytest.approx(expected, rel=1e-12)


def test_one_dimension():
    assert gaussian_frechet([3.0], [[4.0]], [1.0], [[9.0]]) == pytest.approx(4.0 + 1.0, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_full_covariances_against_scipy(seed):
    cov1, cov2 = random_covariance(12, 30, seed), random_covariance(12, 30, seed + 100)
    mu1, mu2 = np.random.default_rng(seed + 200).normal(size=(2, 12))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)
    assert gaussian_frechet(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-9)


def test_singular_covariances():
    """Rank 3 in 10 dimensions: round-off makes eigenvalues slightly negative, which must not give nan."""
    cov = random_covariance(10, 3, 5)
    assert gaussian_frechet(np.zeros(10), cov, np.zeros(10), cov) == pytest.approx(0.0, abs=1e-6)
    nothing = np.zeros((10, 10))
    assert gaussian_frechet(np.zeros(10), cov, np.zeros(10), nothing) == pytest.approx(np.trace(cov), rel=1e-9)


def test_features_use_their_means_and_unbiased_covariances():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(200, 5)), 2.0 + rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5))
    cov1, cov2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * sqrtm(cov1 @ cov2).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_tensors_are_accepted_and_computed_in_float64():
    features = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    # A shift of 1 on top of 1e4: float32 sums would lose it.
    shifted = features.double() + 1e4
    assert frechet_distance(features.double() + 1e4 + 1.0, shifted) == pytest.approx(3.0, rel=1e-6)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    "a, b, message",
    [
        (np.zeros((5, 5)), np.zeros((9, 5)), "at least 6 samples"),
        (np.zeros((9, 5)), np.zeros((9, 4)), "same D"),
        (np.zeros(9), np.zeros((9, 1)), "same D"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "finite"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), "finite"),
    ],
)
def test_bad_features_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([0.0], [[1.0]], [0.0, 0.0], [[1.0]]), "same D"),
        (([0.0], [1.0], [0.0], [[1.0]]), "same D"),
        (([[0.0]], [[1.0]], [[0.0]], [[1.0]]), "same D"),
        (([np.nan], [[1.0]], [0.0], [[1.0]]), "finite"),
    ],
)
def test_bad_gaussians_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_frechet(*arguments)
