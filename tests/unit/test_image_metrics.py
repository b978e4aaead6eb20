"""Figures of features against closed forms, direct formulas and torchmetrics; files of statistics; mistakes in one sentence."""

import warnings

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from brisk import image_metrics, metrics
from brisk.image_metrics import (
    Statistics,
    inception_score,
    kernel_distance,
    measure,
    read_statistics,
    save_statistics,
    statistics_of,
)
from brisk.options import UserError

pytestmark = pytest.mark.quick


def features(count, size=5, seed=0, shift=0.0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=source) @ torch.randn(size, size, generator=source) + shift


def chances(count, classes=6, seed=0):
    return (2 * features(count, classes, seed)).softmax(1)


def of(mean, covariance):
    return Statistics(np.asarray(mean, float), np.asarray(covariance, float), None, None, "analytic.npz", "")


# Frechet distance


def test_statistics_are_mean_and_unbiased_covariance_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(image_metrics, "BLOCK", 7)
    values = features(50, shift=100.0)
    stats = statistics_of(values, "here")
    np.testing.assert_allclose(stats.mean, values.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-9)
    assert (stats.count, stats.source, stats.mean.dtype, stats.covariance.dtype) == (50, "here", np.float64, np.float64)
    assert torch.equal(stats.features, values)


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def test_frechet_of_gaussians_in_one_rotated_frame_has_the_closed_form():
    turn = rotation(0.7)
    std1, std2, between = np.array([3.0, 0.2]), np.array([1.0, 1.5]), np.array([0.5, -2.0])
    found = metrics.gaussian_frechet(np.zeros(2), turn @ np.diag(std1**2) @ turn.T, between, turn @ np.diag(std2**2) @ turn.T)
    assert found == pytest.approx((between**2).sum() + ((std1 - std2) ** 2).sum(), rel=1e-12)


def test_frechet_of_gaussians_far_from_one_frame_has_the_closed_form():
    """In two dimensions tr sqrt(AB) = sqrt(tr AB + 2 sqrt(det AB))."""
    one = rotation(0.3) @ np.diag([9.0, 0.04]) @ rotation(0.3).T
    other = rotation(1.5) @ np.diag([4.0, 0.25]) @ rotation(1.5).T
    product = one @ other
    expected = 2 + np.trace(one + other) - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert metrics.gaussian_frechet([1.0, 1.0], one, [0.0, 0.0], other) == pytest.approx(expected, rel=1e-12)


def test_a_measured_set_is_compared_with_an_analytic_reference():
    values = features(4000, 3, seed=5)
    mixing = torch.randn(3, 3, generator=_after(values.shape, 5)).double().numpy()
    row = measure(values, None, of(np.array([1.0, 0, 0]), mixing.T @ mixing), ["frechet"])
    assert row == {"frechet": pytest.approx(1.0, abs=0.2), "spread": {}}


def _after(shape, seed):
    source = torch.Generator().manual_seed(seed)
    torch.randn(*shape, generator=source)
    return source


@pytest.mark.parametrize("key", ["fid", "frechet"])
def test_frechet_agrees_with_torchmetrics(key):
    generated, real = features(80, shift=3.0), features(120, seed=1)
    identity = torch.nn.Identity()
    identity.num_features = 5
    other = FrechetInceptionDistance(feature=identity, normalize=True).set_dtype(torch.float64)
    other.update(real.double(), real=True)
    other.update(generated.double(), real=False)
    row = measure(generated, None, statistics_of(real, "real"), [key])
    assert row[key] == pytest.approx(float(other.compute()), rel=1e-9) and set(row) == {key, "spread"}


# kernel distance


def cubed(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3


def direct_kernel_distance(x, y):
    """The unbiased estimate of the squared maximum mean discrepancy, equation 4 of arXiv 1801.01401."""
    x, y, n = x.double().numpy(), y.double().numpy(), len(x)
    within = sum((cubed(z, z).sum() - np.trace(cubed(z, z))) / (n * (n - 1)) for z in (x, y))
    return within - 2 * cubed(x, y).mean()


def test_kernel_distance_of_one_full_subset_has_the_formula():
    x, y = features(40), features(40, seed=1, shift=0.5)
    mean, deviation = kernel_distance(x, y, subsets=1)
    assert mean == pytest.approx(direct_kernel_distance(x, y), rel=1e-9) and deviation == 0


def test_kernel_distance_over_subsets_surrounds_that_of_the_whole():
    x, y = features(300), features(250, seed=1, shift=0.5)
    mean, deviation = kernel_distance(x, y, subsets=50, subset_size=60)
    whole = direct_kernel_distance(x[:250], y)
    assert deviation > 0 and abs(mean - whole) < 4 * deviation / 50**0.5 + 0.05 * whole


def test_the_row_names_a_spread_only_where_subsets_leave_images_out(monkeypatch):
    monkeypatch.setattr(image_metrics, "SUBSET_SIZE", 30)
    monkeypatch.setattr(kernel_distance, "__defaults__", (5, 30, 0))
    row = measure(features(40), None, statistics_of(features(50, seed=1), "real"), ["kid"])
    assert row["spread"]["kid"] > 0
    row = measure(features(30), None, statistics_of(features(50, seed=1), "real"), ["kid"])
    assert "kid" in row and row["spread"] == {}


# inception score


@pytest.mark.filterwarnings("ignore:std")
def test_inception_score_of_one_split_has_the_formula():
    p = chances(30).double().numpy()
    p /= p.sum(1, keepdims=True)
    expected = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    mean, deviation = inception_score(torch.tensor(p), splits=1)
    assert mean == pytest.approx(expected, rel=1e-12) and np.isnan(deviation)


def test_inception_score_over_splits_is_their_mean_and_deviation():
    p = torch.eye(3, dtype=torch.float64).repeat(20, 1)  # zero probabilities; all splits are near the score 3
    mean, deviation = inception_score(p, splits=2)
    assert 2.9 < mean <= 3 and 0 <= deviation < 0.1
    assert inception_score(torch.full((40, 7), 1 / 7)) == pytest.approx((1.0, 0.0), abs=1e-6)


# the row


def test_a_row_holds_what_is_wanted():
    reference = statistics_of(features(60, seed=1), "real")
    row = measure(features(50), chances(50), reference, ["fid", "kid", "is", "pr"])
    assert set(row) == {"fid", "kid", "inception_score", "precision", "recall", "spread"}
    assert set(row["spread"]) == {"inception_score"}
    assert (row["precision"], row["recall"]) == metrics.precision_recall(features(60, seed=1), features(50))
    assert all(isinstance(value, float) for name, value in row.items() if name != "spread")
    assert measure(None, chances(50), None, ["is"])["inception_score"] == row["inception_score"]


def test_rows_do_not_depend_on_the_global_generator_and_leave_it_alone():
    reference = statistics_of(features(60, seed=1), "real")

    def row_under(seed):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        found = measure(features(50), chances(50), reference, ["kid", "is"])
        assert torch.equal(before, torch.random.get_rng_state())
        return found, kernel_distance(features(50), reference.features, subsets=3, subset_size=20)

    assert row_under(1) == row_under(2)
    others = [kernel_distance(features(50), reference.features, subsets=3, subset_size=20, seed=seed) for seed in (0, 1)]
    assert others[0] != others[1]
    assert inception_score(chances(50), seed=0) != inception_score(chances(50), seed=1)


def test_no_warning_reaches_the_reader():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(features(50), chances(50), statistics_of(features(60, seed=1), "real"), ["fid", "kid", "is", "pr"])


# files


def test_statistics_come_back_from_a_file(tmp_path):
    stats = statistics_of(features(30), "real")
    save_statistics(stats, tmp_path / "real.npz")
    again = read_statistics(tmp_path / "real.npz")
    for name in ("mean", "covariance", "features"):
        np.testing.assert_array_equal(getattr(again, name), getattr(stats, name))
    assert (again.count, again.digest, again.source) == (30, stats.digest, str(tmp_path / "real.npz"))
    assert statistics_of(features(30, seed=1), "real").digest != stats.digest
    assert [path.name for path in tmp_path.iterdir()] == ["real.npz"]
    save_statistics(again._replace(features=None, count=None), tmp_path / "bare.npz")
    bare = read_statistics(tmp_path / "bare.npz")
    assert (bare.count, bare.features, bare.digest) == (None, None, stats.digest)


def test_published_reference_files_are_read(tmp_path):
    """Of EDM: mu and sigma. Of ADM and DiT: also images, which would be large, and moments of another layer."""
    mean, covariance = np.arange(3.0), np.eye(3)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=covariance)
    extra = {"arr_0": np.zeros((9, 4, 4, 3), np.uint8), "mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(tmp_path / "adm.npz", mu=mean.astype(np.float32), sigma=covariance.astype(np.float32), **extra)
    for name in ("edm.npz", "adm.npz"):
        stats = read_statistics(tmp_path / name)
        np.testing.assert_array_equal(stats.mean, mean)
        np.testing.assert_array_equal(stats.covariance, covariance)
        assert (stats.count, stats.features) == (None, None)
        assert image_metrics.has_statistics(tmp_path / name)


def bad_files(folder):
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez(folder / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    np.savez(folder / "rows.npz", mu=np.zeros(3), sigma=np.eye(3), features=np.zeros((4, 2)))
    np.savez(folder / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    np.savez(folder / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    np.savez(folder / "words.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.save(folder / "array.npz.npy", np.zeros(3))
    (folder / "array.npz.npy").rename(folder / "array.npz")
    (folder / "text.npz").write_text("no archive")
    (folder / "folder.npz").mkdir()


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.npz", "does not exist"),
        ("images.npz", "holds arr_0; statistics are the arrays mu and sigma"),
        ("shapes.npz", r"mu of shape \(3,\) and sigma of shape \(2, 2\)"),
        ("rows.npz", r"features \(N, D\)"),
        ("nan.npz", "not finite"),
        ("objects.npz", "cannot be read"),
        ("words.npz", "cannot be read"),
        ("array.npz", "cannot be read"),
        ("text.npz", "cannot be read"),
        ("folder.npz", "cannot be read"),
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path, name, message):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / name)
    named = ("shapes.npz", "rows.npz", "nan.npz", "objects.npz", "words.npz")  # mu and sigma, though useless
    assert image_metrics.has_statistics(tmp_path / name) == (name in named)


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(UserError, match="--save_reference .* cannot be written: No such file or directory"):
        save_statistics(statistics_of(features(9), "real"), tmp_path / "nowhere" / "real.npz")


REAL = statistics_of(features(60, seed=1), "real.npz")
BARE = REAL._replace(features=None, count=None)


@pytest.mark.parametrize(
    "given, chance, reference, wanted, message",
    [
        (features(5), None, REAL, "fid", "the Frechet distance in 5 dimensions needs at least 6 images, there are 5; give more"),
        (features(9), None, statistics_of(features(5), "few"), "frechet", "at least 6 images, there are 5 in the reference few"),
        (torch.zeros(500, 2048), None, of(np.zeros(2048), np.eye(2048)), "fid", "2,048 dimensions .* 2,049 images, there are 500;"),
        (features(9), None, None, "kid", "the metric kid compares with a reference; give --reference FOLDER"),
        (features(9), None, BARE, "kid", "real.npz holds mu and sigma alone; give --reference FOLDER .* --save_reference FILE"),
        (features(9), None, BARE, "pr", "holds mu and sigma alone"),
        (features(1), None, REAL, "kid", "the kernel distance needs at least 2 images, there are 1"),
        (features(3), None, REAL, "pr", "precision and recall needs at least 4 images, there are 3"),
        (features(9, 4), None, REAL, "fid", "real.npz has 5 features, the extractor gives 4"),
        (features(9) / 0, None, REAL, "pr", "not finite"),
        (features(9), None, REAL, "is", "needs class probabilities, which the extractor inception alone gives"),
        (features(9), chances(19), REAL, "is", "over 10 splits needs at least 20 images, there are 19"),
        (features(9), None, REAL, "clip", "there is no metric clip of features; there are fid, frechet, kid, is, pr"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_sentence(given, chance, reference, wanted, message):
    with pytest.raises(UserError, match=message):
        measure(given, chance, reference, [wanted])


def test_statistics_need_two_finite_images():
    with pytest.raises(UserError, match="one has 1 images; statistics need two"):
        statistics_of(features(1), "one")
    with pytest.raises(UserError, match="not finite"):
        statistics_of(features(3) / 0, "bad")
