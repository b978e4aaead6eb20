"""Frechet distance, kernel distance, inception score, precision and recall of the features of images, as one row of figures.

Letters: N images, M images of the reference, D features, C classes.
"""

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from brisk import metrics
from brisk.options import UserError

FRECHET = ("fid", "frechet")  # one distance: of Inception features, of others
WANTED = (*FRECHET, "kid", "is", "pr")
NEIGHBOURS = 3
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
BLOCK = 4096  # rows taken to float64 at a time


class Statistics(NamedTuple):
    """What a set of images is compared by."""

    mean: np.ndarray  # (D,) float64
    covariance: np.ndarray  # (D, D) float64, unbiased
    count: int | None  # None: the file does not say
    features: torch.Tensor | None  # (N, D) float32
    source: str  # for messages and the record
    digest: str  # of mean and covariance


def statistics_of(features, source):
    """The `Statistics` of features (N, D). UserError for fewer than two images and for values that are not finite."""
    features = torch.as_tensor(features, dtype=torch.float32)
    if len(features) < 2:
        raise UserError(f"{source} has {len(features)} images; statistics need two at least.")
    if not features.isfinite().all():
        raise UserError(f"{source} has features that are not finite.", 1)
    parts = [part.numpy().astype(np.float64) for part in features.split(BLOCK)]
    mean = sum(part.sum(0) for part in parts) / len(features)
    covariance = sum((part - mean).T @ (part - mean) for part in parts) / (len(features) - 1)
    return Statistics(mean, covariance, len(features), features, source, _digest(mean, covariance))


def has_statistics(path):
    """Whether an .npz file holds mu and sigma; False of a file that cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {"mu", "sigma"} <= set(file.files)
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        return False


def read_statistics(path):
    """The `Statistics` in an .npz file with mu (D,) and sigma (D, D), and perhaps features (N, D) and count.

    So are the reference files of EDM and of ADM / DiT, whose other arrays are not read. UserError.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if not {"mu", "sigma"} <= set(file.files):
                held = ", ".join(file.files) or "nothing"
                raise UserError(f"--reference {path} holds {held}; statistics are the arrays mu and sigma.")
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
            features = torch.tensor(file["features"], dtype=torch.float32) if "features" in file.files else None
            count = int(file["count"]) if "count" in file.files else None
    except FileNotFoundError:
        raise UserError(f"--reference {path} does not exist.") from None
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"--reference {path} cannot be read as an .npz file of statistics ({error}).") from None
    size = len(mean) if mean.ndim == 1 else -1
    fits = covariance.shape == (size, size) and (features is None or (features.ndim == 2 and features.shape[1] == size))
    if not fits:
        raise UserError(f"--reference {path} holds mu of shape {mean.shape} and sigma of shape {covariance.shape}; with D features "
                        "they must be (D,) and (D, D), and features (N, D).")  # fmt: skip
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all() and (features is None or features.isfinite().all())):
        raise UserError(f"--reference {path} holds values that are not finite.")
    count = len(features) if features is not None else count
    return Statistics(mean, covariance, count, features, str(path), _digest(mean, covariance))


def save_statistics(stats, path):
    """Write `Statistics` with mu, sigma, count and features, those that there are, so that no half-written file can be seen."""
    arrays = {"mu": stats.mean, "sigma": stats.covariance}
    if stats.count is not None:
        arrays["count"] = np.int64(stats.count)
    if stats.features is not None:
        arrays["features"] = stats.features.numpy()
    temporary = Path(path).with_name(f".{Path(path).name}.tmp.npz")
    try:
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--save_reference {path} cannot be written: {error.strerror}.") from None


def _digest(mean, covariance):
    return hashlib.sha256(mean.tobytes() + np.ascontiguousarray(covariance).tobytes()).hexdigest()[:16]


def kernel_distance(features, reference_features, subsets=SUBSETS, subset_size=SUBSET_SIZE, seed=0):
    """Kernel inception distance (arXiv 1801.01401) of features (N, D) and (M, D), in float64.

    Returns (mean, standard deviation) over `subsets` random pairs of subsets of `subset_size` rows, at most N and M. UserError
    for fewer than two rows.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, len(features), len(reference_features))
    if size < 2:
        raise UserError(f"the kernel distance needs two images at least, there are {len(features)} and {len(reference_features)}.")
    metric = _quiet(KernelInceptionDistance, subsets=subsets, subset_size=size)
    metric.update(torch.as_tensor(reference_features).double(), real=True)
    metric.update(torch.as_tensor(features).double(), real=False)
    return _computed(metric, seed)


def inception_score(probabilities, splits=SPLITS, seed=0):
    """Inception score (arXiv 1606.03498) of class probabilities (N, C), in float64.

    Returns (mean, standard deviation) over `splits` parts of the shuffled images; of one part the deviation is nan. UserError for
    fewer than two images a part.
    """
    from torchmetrics.image.inception import InceptionScore

    if len(probabilities) < 2 * splits:
        needed = f"the inception score over {splits} splits needs at least {2 * splits} images"
        raise UserError(f"{needed}, there are {len(probabilities)}; give more, or other --metrics.")
    # the metric takes the softmax itself: that of the logarithms is the probabilities again; 0 log 0 would be no number
    logarithms = torch.as_tensor(probabilities).double().clamp_min(torch.finfo(torch.float64).tiny).log()
    metric = _quiet(InceptionScore, splits=splits)
    metric.update(logarithms)
    return _computed(metric, seed)


def _quiet(metric, **settings):
    """A metric of torchmetrics on what it is given: every process has all images, and its advice about memory is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return metric(feature=torch.nn.Identity(), sync_on_compute=False, **settings)


def _computed(metric, seed):
    """A metric's two figures as floats, its random choices by `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change the GPUs' generators too
        return tuple(float(value) for value in metric.compute())


def measure(features, probabilities, reference, wanted):
    """A row of figures of generated images, with the "spread" of those that have one.

    Args: `features` (N, D) or None; `probabilities` (N, C) or None, of the inception score alone; `reference`: `Statistics` or
    None, of the others; `wanted`: names in `WANTED`, giving fid, frechet, kid, inception_score, precision and recall. The spread
    of kid is the standard deviation over subsets, given where they leave out images of both sets; of inception_score that over
    splits. UserError for too few images, and for what the reference does not hold.
    """
    row, spread = {}, {}
    for name in wanted:
        if name not in WANTED:
            raise UserError(f"there is no metric {name} of features; there are {', '.join(WANTED)}.")
        if name == "is":
            if probabilities is None:
                raise UserError("the inception score needs class probabilities, which the extractor inception alone gives.")
            row["inception_score"], spread["inception_score"] = inception_score(probabilities)
            continue
        check_reference(name, reference, features.shape[1])
        check_count(name, len(features), features.shape[1])
        if not features.isfinite().all():
            raise UserError(f"the metric {name}: the images have features that are not finite.", 1)
        if name in FRECHET:
            found = statistics_of(features, "the set of images")
            row[name] = metrics.gaussian_frechet(found.mean, found.covariance, reference.mean, reference.covariance)
        elif name == "kid":
            row["kid"], deviation = kernel_distance(features, reference.features)
            if min(len(features), len(reference.features)) > SUBSET_SIZE:
                spread["kid"] = deviation
        else:
            row["precision"], row["recall"] = metrics.precision_recall(reference.features, features, NEIGHBOURS)
    return {**row, "spread": spread}


def check_reference(name, reference, size):
    """UserError where the figure `name` of features of `size` dimensions cannot be had with this reference."""
    if reference is None:
        raise UserError(f"the metric {name} compares with a reference; give --reference FOLDER, or a file of images or statistics.")
    if len(reference.mean) != size:
        raise UserError(f"the reference {reference.source} has {len(reference.mean):,} features, the extractor gives {size:,}; "
                        "both must come from one extractor.")  # fmt: skip
    if name in ("kid", "pr") and reference.features is None:
        raise UserError(f"the metric {name} needs the features of the reference, {reference.source} holds mu and sigma alone; "
                        "give --reference FOLDER of the images (and --save_reference FILE to keep their features).")  # fmt: skip
    if reference.count is not None:
        check_count(name, reference.count, size, f" in the reference {reference.source}")


def check_count(name, count, dimensions, where=""):
    """UserError where the figure `name` needs more than `count` images of so many features."""
    if name in FRECHET:
        least, what = dimensions + 1, f"the Frechet distance in {dimensions:,} dimensions"
    elif name == "is":
        least, what = 2 * SPLITS, f"the inception score over {SPLITS} splits"
    else:
        least, what = (2, "the kernel distance") if name == "kid" else (NEIGHBOURS + 1, "the pair of precision and recall")
    if count < least:
        raise UserError(f"{what} needs at least {least:,} images, there are {count:,}{where}; give more, or other --metrics.")
