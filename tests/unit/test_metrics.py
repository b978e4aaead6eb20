"""The Frechet distance against closed forms and scipy's matrix square root; precision and recall against their definition."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from brisk import metrics
from brisk.metrics import frechet_distance, gaussian_frechet, precision_recall


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


def direct_precision_recall(real, generated, neighbours):
    """The definition, in float64 without blocks."""

    def inside(points, centres):
        own = np.linalg.norm(centres[:, None] - centres[None], axis=2)
        reach = np.sort(own, axis=1)[:, neighbours]  # column 0 is the row itself
        return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= reach).any(1).mean()

    return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_precision_and_recall_against_the_definition(neighbours, offset, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)
    rng = np.random.default_rng(neighbours)
    real, generated = rng.normal(size=(70, 4)) + offset, 0.6 * rng.normal(size=(50, 4)) + 0.4 + offset
    found = precision_recall(real, generated, neighbours)
    assert found == pytest.approx(direct_precision_recall(real, generated, neighbours), abs=1e-12)
    assert 0 < found[1] < found[0] <= 1
    assert precision_recall(generated, real, neighbours) == pytest.approx(found[::-1], abs=1e-12)
    assert precision_recall(torch.tensor(real), torch.tensor(generated), neighbours) == found


def test_precision_and_recall_of_hand_made_sets():
    points = np.random.default_rng(0).normal(size=(40, 3))
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100.0) == (0.0, 0.0)
    # drawings of one corner only: all of them fit, most of the set is missing
    corner = points[points[:, 0] > 0.8]
    precision, recall = precision_recall(points, corner)
    assert precision == 1.0 and len(corner) / 40 <= recall < 0.6
    # the same the other way round: the corner is all covered, most drawings are no part of it
    assert precision_recall(corner, points) == (recall, precision)


def test_a_ball_reaches_to_the_kth_other_row_and_holds_its_edge():
    line = np.array([[0.0], [1.0], [3.0], [7.0]])
    assert precision_recall(line, np.array([[-1.0], [-1.5]]), 1)[0] == 0.5  # the ball of 0 reaches to 1
    assert precision_recall(line, np.array([[-3.0], [-3.5], [-4.0], [-5.0]]), 2)[0] == 0.25  # to 3
    assert precision_recall(line, np.array([[-1.0], [50.0]]), 1)[1] == 1.0  # about -1, 51 wide
    assert precision_recall(line, np.array([[-1.0], [0.5], [20.0], [21.0]]), 1)[1] == 0.5  # about 0 and 1 alone


@pytest.mark.parametrize(
    "real, generated, message",
    [
        (np.zeros((5, 2)), np.zeros((5, 3)), "same D"),
        (np.zeros(5), np.zeros((5, 1)), "same D"),
        (np.zeros((3, 2)), np.zeros((9, 2)), "3 neighbours need at least 4 samples, got 3 and 9"),
        (np.zeros((9, 2)), np.zeros((3, 2)), "at least 4 samples"),
        (np.full((9, 2), np.nan), np.zeros((9, 2)), "finite"),
        (np.zeros((9, 2)), np.full((9, 2), np.inf), "finite"),
    ],
)
def test_bad_features_of_precision_and_recall_are_refused(real, generated, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated)
