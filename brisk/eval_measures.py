"""What a set of images is worth: its features against a reference, scores of its images, its distance to another set.

Every process reads its share of fixed batches, and all get all of it back in the images' order.
"""

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from brisk import builtin_protocol, feature_extractors, image_metrics, image_sets, rewards
from brisk.options import UserError

DISTANCES = ("frechet", "fid", "kid", "is", "pr")
# --weights HEAD=FILE means this key of the head's settings
MAIN_KEY = {"hps": "weights_path", "pickscore": "model", "imagereward": "checkpoint", "clip": "model",
            "aesthetic": "predictor_path", "mps": "checkpoint"}  # fmt: skip


class Instruments(NamedTuple):
    """What a run measures with."""

    oracle: torch.nn.Module | None  # of the builtin protocols
    extractor: feature_extractors.Extractor | None
    reference: image_metrics.Statistics | None
    heads: list  # `rewards.Reward`


def recompress(images, quality):
    """Images (B, H, W, 3) uint8 as a JPEG file of `quality` would hold them."""
    from PIL import Image

    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(file)))
    return np.stack(found)


def open_drawn(files, protocol):
    """The `image_sets.ImageSet` of drawn `files` or of a folder or npz, at the size at which `protocol` measures."""
    return image_sets.open_images(files, resize=protocol.measured_at, resize_filter=protocol.resize_filter)


def read(images, function, batch_size, state, jpeg=None, progress=None):
    """(numbers of the images that could be read, [`function`'s results of all, concatenated]); every process gets them.

    Args: `function`: (numbers, uint8 (B, H, W, 3)) -> list of tensors (B, ...) or None; `jpeg`: quality, to compress anew.
    """
    from accelerate.utils import gather_object

    own = []
    for numbers, values in images.batches(batch_size, state.process_index, state.num_processes):
        if len(numbers):
            values = recompress(values, jpeg) if jpeg else values
            own.append((list(numbers), [None if part is None else part.cpu() for part in function(numbers, values)]))
        if progress is not None:
            progress(len(numbers))
    every = sorted(gather_object(own), key=lambda item: item[0][0])
    if not every:
        raise UserError("no image could be read.")
    parts = zip(*(parts for _, parts in every), strict=True)
    return [n for numbers, _ in every for n in numbers], [None if p[0] is None else torch.cat(p) for p in map(list, parts)]


def load_reference(path, extractor, protocol, batch_size, state, progress=None):
    """The `image_metrics.Statistics` of a file of them, or of a folder or npz of images. UserError."""
    if path is None:
        if protocol.extractor == "handwriting":
            oracle, paper = builtin_protocol.load_oracle(), None
            if protocol.conditions == "classes":
                from brisk.handwriting import CLASS_PAPER as paper
            return image_metrics.statistics_of(builtin_protocol.held_out(oracle, paper), "2,000 tinted held-out scans")
        raise UserError(f"--reference is not given; give {protocol.reference or 'a folder of real images, or their statistics'}.")
    if Path(path).suffix == ".npz" and image_metrics.has_statistics(path):
        return image_metrics.read_statistics(path)
    images = open_drawn(path, protocol)
    _, (features, _) = read(images, lambda _, values: extractor.read(values), batch_size, state, protocol.jpeg, progress)
    names = hashlib.sha256("\n".join(map(str, images.names)).encode()).hexdigest()[:16]
    return image_metrics.statistics_of(features, f"{path} ({len(features):,} images, names {names})")


def reward_settings(given):
    """{head: its settings} of --weights HEAD=VALUE and HEAD.KEY=VALUE. UserError."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        head, dot, key = name.partition(".")
        if not equals or head not in (*MAIN_KEY, "inception", "torchscript"):
            heads = ", ".join((*MAIN_KEY, "inception", "torchscript"))
            raise UserError(f"--weights '{text}' is not of the form HEAD=FILE or HEAD.KEY=VALUE, with HEAD one of {heads}.")
        known = {"hps": {"weights_path": None}, **rewards.SECTIONS}.get(head, {})
        key = key if dot else MAIN_KEY.get(head, "file")
        if known and key not in known:
            raise UserError(f"--weights '{text}': {head} has no {key}, only {', '.join(known)}.")
        found.setdefault(head, {})[key] = value
    return found


def load_heads(metrics, weights, protocol, batch_size, device):
    """The `rewards.Reward` of every reward in `metrics`. UserError that names the file that is missing and its flag."""
    mixed = [name for name in metrics if name in rewards.MIXED]
    groups = ([("multi", mixed)] if mixed else []) + [(name, [name]) for name in metrics if name == "mps" or ":" in name]
    sections = {head: values for head, values in weights.items() if head in rewards.SECTIONS}
    sections["clip"] = {"model": protocol.clip_model, **sections.get("clip", {})}
    heads = []
    for kind, names in groups:
        settings = rewards.RewardSettings(
            type=kind, weights=dict.fromkeys(names, 1.0), weights_path=weights.get("hps", {}).get("weights_path"),
            batch_size=batch_size, **sections,
        )  # fmt: skip
        try:
            heads.append(rewards.load(settings, device))
        except UserError as error:
            text = str(error).replace("reward.multi.", "--weights ").replace("reward.weights_path", "--weights hps")
            raise UserError(text.replace("reward.type", "--metrics")) from None
    return heads


def load(metrics, protocol, weights, reference, batch_size, state, progress=None):
    """The `Instruments` for these `metrics`. UserError for missing weights or references."""
    builtin = protocol.extractor == "handwriting"
    wants_features = [name for name in metrics if name in DISTANCES or (builtin and name == "agreement")]
    if "agreement" in metrics and not builtin:
        raise UserError("--metrics agreement needs the built-in handwriting set (--protocol builtin).")
    if "fid" in metrics and protocol.extractor != "inception":
        raise UserError(f"--metrics fid is the Frechet distance in Inception's features; in those of {protocol.extractor} it is "
                        "called frechet.")  # fmt: skip
    oracle = builtin_protocol.load_oracle().to(state.device) if builtin else None
    extractor = statistics = None
    if wants_features:
        file = weights.get(protocol.extractor, {}).get("file")
        extractor = feature_extractors.load(protocol.extractor, file, state.device, clean=protocol.clean)
    if set(wants_features) - {"is"}:
        statistics = load_reference(reference, extractor, protocol, batch_size, state, progress)
        for name in set(wants_features) & set(DISTANCES) - {"is"}:
            image_metrics.check_reference(name, statistics, extractor.dimensions or len(statistics.mean))
    return Instruments(oracle, extractor, statistics, load_heads(metrics, weights, protocol, batch_size, state.device))


def check_count(metrics, instruments, count):
    """UserError where a set of `count` images is too small for the `metrics`, before they are drawn or read."""
    extractor, reference = instruments.extractor, instruments.reference
    if extractor is not None:
        names = {"frechet" if name == "agreement" else name for name in metrics}  # both come of one reading
        size = extractor.dimensions or (0 if reference is None else len(reference.mean))
        for name in [name for name in DISTANCES if name in names]:
            image_metrics.check_count(name, count, size)


def check_prompts(metrics, has_prompts):
    """UserError where rewards of `metrics` judge images by captions that there are not."""
    needing = [name for name in metrics if name in rewards.MIXED + ("mps",) and name != "aesthetic"]
    if needing and not has_prompts:
        raise UserError(f"there are no captions, which --metrics {','.join(needing)} needs.")


def row_of(images, metrics, instruments, protocol, prompts, labels, batch_size, state, progress=None):
    """(row of figures, with "spread"; {score: all its statistics}; names of the unreadable images).

    Features and scores are the same in every process; figures are computed by the main one alone.
    Args: `images`: an `image_sets.ImageSet`; `prompts`: one per image, or None; `labels`: as `eval_drawing.Wanted` has them,
    or None.
    """
    heads, extractor, reference = instruments.heads, instruments.extractor, instruments.reference
    wants_classes, wants_pixels = "is" in metrics, "agreement" in metrics

    def function(numbers, values):
        features, probabilities = extractor.read(values, wants_classes) if extractor is not None else (None, None)
        pixels = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255
        texts = None if prompts is None else [prompts[number] for number in numbers]
        scores = [score for head in heads for score in head.score(pixels, texts).values()]
        return [features, probabilities, pixels if wants_pixels else None, *scores]

    numbers, (features, probabilities, pixels, *scores) = read(images, function, batch_size, state, protocol.jpeg, progress)
    missing = [images.names[number] for number in sorted(set(range(len(images))) - set(numbers))]
    row, details = {"spread": {}, "images": len(numbers), "unreadable": len(missing)}, {}
    if not state.is_main_process:
        return row, details, missing
    size = len(images) // protocol.seeds
    sets = [torch.tensor([row for row, number in enumerate(numbers) if number // size == one]) for one in range(protocol.seeds)]
    if wants_pixels:
        places = [torch.tensor(numbers)[rows] % size for rows in sets]
        asked = [tuple(column[own] for column in columns) for columns, own in zip(labels, places, strict=True)]
        add(row, builtin_protocol.measure(instruments.oracle, [pixels[rows] * 2 - 1 for rows in sets], asked, reference.features))
    wanted = [name for name in metrics if name in DISTANCES and name not in row]
    if wanted:
        add(row, _distances(features, probabilities, sets, reference, wanted))
    for name, values in zip([name for head in heads for name in head.heads], scores, strict=True):
        details[name] = _statistics(values.double())
        add(row, {name: details[name]["mean"], "spread": {name: details[name]["std"] / len(values) ** 0.5}})
    return row, details, missing


def _statistics(values):
    return {"count": len(values), "mean": values.mean().item(), "std": values.std(correction=0).item(),
            "min": values.min().item(), "max": values.max().item()}  # fmt: skip


def add(row, more):
    """Add the figures of a row to another, their spreads to its spreads."""
    row["spread"] |= more.get("spread", {})
    row |= {name: value for name, value in more.items() if name != "spread"}


def _distances(features, probabilities, sets, reference, wanted):
    """`image_metrics.measure` of all images, with the spread over sets where there are several, large enough to be measured."""
    row = image_metrics.measure(features, probabilities, reference, wanted)
    if len(sets) > 1 and min(map(len, sets)) > features.shape[1]:
        apart = [image_metrics.measure(features[rows], None if probabilities is None else probabilities[rows], reference, wanted)
                 for rows in sets]  # fmt: skip
        names = [name for name in row if name != "spread"]
        row["spread"] = {name: float(np.std([one[name] for one in apart], ddof=1)) for name in names}
    return row


def psnr_between(images, others):
    """Peak signal-to-noise ratio in dB between two `ImageSet`s of as many images of one size; None if all are equal.

    Over the images that are readable in both.
    """
    total = count = 0
    for (numbers, values), (other_numbers, other_values) in zip(images.batches(64), others.batches(64), strict=True):
        both = [number for number in numbers if number in other_numbers]
        one = values[[numbers.index(number) for number in both]].astype(np.float64)
        other = other_values[[other_numbers.index(number) for number in both]]
        total += np.square(one - other).sum()
        count += one.size
    return None if total == 0 else float(10 * np.log10(255**2 * count / total))
