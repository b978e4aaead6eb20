"""Folders of images that have a class each: which class, and the square that is cut from an image.

Letters: R image side in pixels, K classes.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from brisk import samples
from brisk.options import UserError


def some(names, limit=3):
    """The first few of a list of names, for a message."""
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def list_class_images(folder, has_classes=True):
    """([(path, class id)], [class name]) of the images below `folder`, sorted by path; no names and ids 0 without classes.

    Classes are the `label` column of metadata.jsonl / .csv / .parquet where there is one (whole numbers are ids, names
    are numbered in their order), else the sub-folders of `folder` in the order of their names, as torchvision's
    ImageFolder numbers them. Raises UserError for images without a class and for classes without an image.
    """
    paths = samples.list_images(folder)
    if not has_classes:
        return [(path, 0) for path in paths], []
    labels = _metadata_labels(Path(folder))
    if labels:
        return _by_metadata(paths, labels)
    return _by_folder(Path(folder), paths)


def _metadata_labels(folder):
    """{path: label} of every metadata file below `folder`; rows without a label are left out."""
    labels = {}
    for path in [path for suffix in ("jsonl", "csv", "parquet") for path in folder.rglob(f"metadata.{suffix}")]:
        try:
            rows = [row for row in samples.metadata_rows(path) if row.get("label") not in (None, "")]
            labels |= {path.parent / row["file_name"]: row["label"] for row in rows}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: every row needs file_name and label ({error!r}).") from None
    return labels


def _by_metadata(paths, labels):
    without = [path.name for path in paths if path not in labels]
    if without:
        raise UserError(f"{len(without)} of {len(paths)} images have no label in the metadata file: {some(without)}.")
    names = [str(labels[path]) for path in paths]
    if all(name.isascii() and name.isdigit() for name in names):
        ids = [int(name) for name in names]
        return list(zip(paths, ids, strict=True)), [str(number) for number in range(max(ids) + 1)]
    classes = sorted(set(names))
    number_of = {name: number for number, name in enumerate(classes)}
    return [(path, number_of[name]) for path, name in zip(paths, names, strict=True)], classes


def _by_folder(folder, paths):
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    tops = [path.relative_to(folder).parts[0] for path in paths]
    outside = [path.name for path, top in zip(paths, tops, strict=True) if top not in classes]
    if outside:
        raise UserError(
            f"{len(outside)} images of {folder} have no class: {some(outside)}; put each into the sub-folder of its class, "
            "or name its label in metadata.jsonl."
        )
    empty = sorted(set(classes) - set(tops))
    if empty:
        raise UserError(f"sub-folders are classes, and these of {folder} hold no image: {some(empty)}.")
    number_of = {name: number for number, name in enumerate(classes)}
    return [(path, number_of[top]) for path, top in zip(paths, tops, strict=True)], classes


def adm_crop(image, size):
    """The centre square of `size` pixels of a PIL image, as ADM (guided-diffusion, `center_crop_arr`) and DiT cut it.

    Halved with a box filter while the short side is at least 2 x size, then bicubic to size, then cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ClassImageRows:
    """Sequence of raw samples {suffix: image bytes, "label": id} from the pairs of `list_class_images`."""

    def __init__(self, files, classes):
        self.files, self.classes = files, classes

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        """Raises Skip."""
        path, label = self.files[number]
        return {**samples.read_image_file(path), "label": label}


class CutClassImage:
    """Callable: raw sample of `ClassImageRows` -> {"pixels" uint8 (3, R, R), "labels" int64 ()}."""

    def __init__(self, size, random_flip=False):
        self.size, self.random_flip = size, random_flip

    def __call__(self, raw, rng):
        """Raises Skip."""
        square = adm_crop(samples.decode_image(raw), self.size)
        if self.random_flip and rng.random() < 0.5:
            square = ImageOps.mirror(square)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
        return {"pixels": pixels, "labels": torch.tensor(raw["label"])}
