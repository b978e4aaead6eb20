"""The measurement on the built-in handwriting set: what is drawn, how the oracle reads it, which real images it is compared with.

Labels are columns (digits, foregrounds, backgrounds), each (N,) int64; images are float (N, 3, 32, 32) in [-1, 1].
"""

import statistics
from pathlib import Path

from brisk.options import UserError

REFERENCE_IMAGES = 2000
SHOWN = ((7, 2, 5), (3, 1, 0), (0, 4, 1), (5, 5, 4), (8, 7, 3), (2, 6, 7), (9, 3, 6), (4, 0, 2))  # captions of the pictures
CAPTIONS = 560  # ten digits in the ordered pairs of eight colours
ORACLE = Path(__file__).resolve().parent.parent / "assets" / "handwriting-oracle"


def load_oracle(folder=None, flag="--oracle"):
    """The frozen classifier in `folder`, by default the built-in one. UserError that names `flag` if it holds none."""
    from brisk import scorers  # here and below: they load torch

    try:
        return scorers.load_oracle(folder or ORACLE)
    except FileNotFoundError as error:
        raise UserError(f"{flag}: {error}") from None


def real_images(paper=None):
    """The held-out images that others are compared with, as `handwriting.draw` gives them; all on the colour `paper` if given."""
    from brisk import handwriting

    return handwriting.draw("test", REFERENCE_IMAGES, seed=0, paper=paper)


def held_out(oracle, paper=None):
    """The oracle's features (REFERENCE_IMAGES, 48) of `real_images`."""
    return features_of(oracle, real_images(paper)["images"])


def features_of(oracle, images):
    """The oracle's features (N, 48) of images, on the CPU; the oracle may be on another device."""
    return oracle.features(images.to(oracle.project.weight.device)).cpu()


def wanted_labels(count, seed):
    """The labels of `count` captions: all of them in an order drawn from `seed`, repeated."""
    import torch

    from brisk.handwriting import COLOURS

    n = len(COLOURS)
    every = torch.tensor([(d, f, b) for d in range(10) for f in range(n) for b in range(n) if f != b])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order.repeat(count // len(every) + 1)[:count]].unbind(1)


def captions_of(labels):
    """The captions, a list of N strings, of three columns of labels."""
    from brisk.handwriting import caption

    return [caption(*item) for item in zip(*(column.tolist() for column in labels), strict=True)]


def unseen_captions(path, flag="--training_prompts"):
    """The captions that the file `path` of prompts does not hold, in a fixed shuffled order.

    UserError that names `flag` if the file cannot be read, or holds all of them.
    """
    from brisk import epd_options

    seen = set(epd_options.read_prompts(None, path, flag))
    left = [text for text in captions_of(wanted_labels(CAPTIONS, 0)) if text not in seen]
    if not left:
        raise UserError(f"{flag} {path} holds every caption: none is left to measure with.")
    return left


def measure(oracle, images_by_seed, labels_by_seed, reference, extra=None):
    """{figure: its mean over seeds}, and in "spread" {figure: its standard deviation over seeds} where there are two or more.

    The figures are digit, foreground, background and all (see `scorers.prompt_agreement`), frechet (to the features `reference`;
    not the mean, but that of all seeds' images together), and those of `extra`.
    Args: `labels_by_seed`: per seed one column or three, None for no agreement; `extra`: per seed {figure: value}.
    ValueError if a seed has fewer images than the features have dimensions + 1.
    """
    import torch

    from brisk import metrics, scorers

    features = [features_of(oracle, images) for images in images_by_seed]
    by_seed = [{} for _ in features]
    if labels_by_seed is not None:
        by_seed = [scorers.prompt_agreement(oracle, images, *labels)
                   for images, labels in zip(images_by_seed, labels_by_seed, strict=True)]  # fmt: skip
    for row, own in zip(by_seed, features, strict=True):
        row["frechet"] = metrics.frechet_distance(own, reference)
    if extra is not None:
        by_seed = [row | more for row, more in zip(by_seed, extra, strict=True)]
    found = {name: statistics.mean(row[name] for row in by_seed) for name in by_seed[0]}
    found["frechet"] = metrics.frechet_distance(torch.cat(features), reference)
    if len(by_seed) > 1:
        found["spread"] = {name: statistics.stdev(row[name] for row in by_seed) for name in by_seed[0]}
    return found
