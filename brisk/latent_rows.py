"""Cached latents with labels as raw samples: a folder of features, two arrays, made-up ones; a raw sample to tensors.

A raw sample is a dict of .npy bytes or arrays: "latent.npy" or "moments.npy", and "label.npy" or "cls" (a number in
ASCII). `wanted` is a `latents.LatentOptions`. Letters: C latent channels, h latent side, K classes, N samples.
"""

import io
import os
import re
from pathlib import Path

import numpy as np
import torch

from brisk.class_images import some
from brisk.options import UserError
from brisk.samples import Skip
from brisk.seeding import derive

ARRAYS = ("latent.npy", "moments.npy")
PROBED = 10  # samples tried before the run starts


def kind_of_shape(shape, channels, size):
    """What an array of `shape` holds, None if neither; a leading 1 is allowed.

    "latents": (C, h, h); "moments": (2, C, h, h) or (2C, h, h).
    """
    square = (size, size)
    shape = tuple(shape[1:]) if len(shape) == 4 and shape[0] == 1 else tuple(shape)
    if shape == (channels, *square):
        return "latents"
    return "moments" if shape in ((2, channels, *square), (2 * channels, *square)) else None


def kind_of_sample(raw, wanted, where):
    """What a raw sample holds, "latents" or "moments". Raises Skip; UserError naming `where` if no run like this can use it."""
    array, _ = read_array(raw, ARRAYS, "no latent"), read_label(raw, wanted)
    kind = kind_of_shape(array.shape, wanted.in_channels, wanted.sample_size)
    if kind is None or array.dtype.kind != "f":
        shape = (wanted.in_channels, wanted.sample_size, wanted.sample_size)
        raise UserError(
            f"{where} is {array.dtype} of shape {tuple(array.shape)}; this run needs floating-point latents of shape {shape}, "
            f"or means and deviations of shape {(2, *shape)}: --image_size or --in_channels is not that of the data."
        )
    return kind


def probe(rows, wanted, where):
    """`kind_of_sample` of the first usable one of a sequence of raw samples. Raises UserError."""
    reason = "there is none"
    for number in range(min(PROBED, len(rows))):
        try:
            raw = rows[number]
            return kind_of_sample(raw, wanted, f"sample {raw['__key__']} of {where}")
        except Skip as problem:
            reason = problem
    raise UserError(f"the first samples of {where} cannot be used for training: {reason}.")


def read_array(raw, names, missing):
    """The array of the first of `names` in a raw sample, .npy bytes or array. Raises Skip, with `missing` if none is there."""
    content = next((raw[name] for name in names if name in raw), None)
    if content is None:
        raise Skip(missing)
    if not isinstance(content, bytes):
        return content
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:  # ValueError, EOFError, TypeError, zipfile's own
        raise Skip("unreadable array") from None


def read_label(raw, wanted):
    """The label of a raw sample: int64 (), or float32 (label_dim,). Raises Skip; UserError for a class out of range."""
    if wanted.label_type == "none":
        return torch.tensor(0)
    if wanted.label_type == "class" and "cls" in raw:
        try:
            number = int(raw["cls"])
        except ValueError:
            raise Skip("unusable label") from None
    else:
        array = read_array(raw, ("label.npy",), "no label")
        if wanted.label_type == "vector":
            if array.size != wanted.label_dim or array.dtype.kind != "f" or not np.isfinite(array).all():
                raise Skip("unusable label")
            return torch.from_numpy(array.reshape(-1).astype(np.float32))
        if array.size != 1 or array.dtype.kind not in "iu":
            raise Skip("unusable label")
        number = int(array.reshape(-1)[0])
    check_class(number, number, wanted, f"sample {raw['__key__']}")
    return torch.tensor(number)


def check_class(lowest, highest, wanted, where):
    """UserError for a class that the network has no embedding of."""
    if not 0 <= lowest <= highest < wanted.num_classes:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"{where} has class {wrong}; --num_classes {wanted.num_classes} allows 0 to {wanted.num_classes - 1}."
        )


class ReadLatent:
    """Callable: raw sample of latents or moments, as `kind` says -> {kind: tensor, "labels": tensor}."""

    def __init__(self, wanted, kind):
        self.wanted, self.kind = wanted, kind

    def __call__(self, raw, rng):
        """Latents (C, h, h) or moments (2, C, h, h), float16 stays float16. Raises Skip, UserError (`read_label`)."""
        channels, size = self.wanted.in_channels, self.wanted.sample_size
        array = read_array(raw, ARRAYS, "no latent")
        if kind_of_shape(array.shape, channels, size) != self.kind or array.dtype.kind != "f":
            raise Skip("wrong latent shape")
        if not np.isfinite(array).all():
            raise Skip("latent not finite")
        shape = (channels, size, size) if self.kind == "latents" else (2, channels, size, size)
        array = np.array(array, np.float16 if array.dtype == np.float16 else np.float32).reshape(shape)
        return {self.kind: torch.from_numpy(array), "labels": read_label(raw, self.wanted)}


def numeric_order(stem):
    """Sort key under which 2 comes before 10."""
    return [int(part) if number % 2 else part for number, part in enumerate(re.split(r"([0-9]+)", stem))], stem


class FeatureRows:
    """Sequence of raw samples from {name}_features/STEM.npy and {name}_labels/STEM.npy, paired by stem, in numeric order."""

    def __init__(self, folder, name, label_type):
        """Reads the two listings only. Raises UserError where they do not pair; without labels for `label_type` none."""
        self.features, self.labels = Path(folder) / f"{name}_features", Path(folder) / f"{name}_labels"
        stems = self._stems(self.features)
        if not stems:
            raise UserError(f"{self.features} holds no .npy file.")
        if label_type == "none":
            self.labels = None
        else:
            if not self.labels.is_dir():
                raise UserError(f"{self.features} has no {self.labels} beside it; only --unsupervised needs no labels.")
            self._check_pairs(stems, self._stems(self.labels))
        self.stems = np.array(sorted(stems, key=numeric_order))  # one block of memory, which workers share

    def _stems(self, folder):
        with os.scandir(folder) as entries:
            return {entry.name[:-4] for entry in entries if entry.name.endswith(".npy")}

    def _check_pairs(self, features, labels):
        for one, other, what in ((features, labels, "label"), (labels, features, "feature")):
            alone = sorted(one - other, key=numeric_order)
            if alone:
                raise UserError(f"{len(alone)} files of {self.features} and {self.labels} have no {what} file of the same name: "
                                f"{some(alone)}.")  # fmt: skip

    def __len__(self):
        return len(self.stems)

    def __getitem__(self, number):
        """Raises Skip."""
        stem = str(self.stems[number])
        try:
            raw = {"__key__": stem, "latent.npy": (self.features / f"{stem}.npy").read_bytes()}
            return raw if self.labels is None else {**raw, "label.npy": (self.labels / f"{stem}.npy").read_bytes()}
        except OSError:
            raise Skip("unreadable array") from None


class ArrayRows:
    """Sequence of raw samples from latents.npy (N, C or 2C, h, h) and labels.npy (N,) or (N, label_dim), memory-mapped."""

    def __init__(self, folder, wanted):
        """Checks shapes, counts and the range of the classes; raises UserError."""
        self.paths, self.arrays = (Path(folder) / "latents.npy", Path(folder) / "labels.npy"), None
        self.has_labels = wanted.label_type != "none"
        if self.has_labels and not self.paths[1].is_file():
            raise UserError(f"{folder} holds latents.npy and no labels.npy; only --unsupervised needs no labels.")
        latents, labels = self._open()
        self.length = len(latents) if latents.ndim else 0
        if not self.length:
            raise UserError(f"{self.paths[0]} holds no sample.")
        if self.has_labels:
            self._check_labels(labels, wanted)

    def _open(self):
        opened = []
        for path in self.paths[: 1 + self.has_labels]:
            try:
                opened.append(np.load(path, mmap_mode="r", allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{path} cannot be read as an array: {error}.") from None
        return opened if self.has_labels else [*opened, None]

    def _check_labels(self, labels, wanted):
        shapes = [(self.length, wanted.label_dim)] if wanted.label_type == "vector" else [(self.length,), (self.length, 1)]
        kinds = "f" if wanted.label_type == "vector" else "iu"
        if labels.shape not in shapes or labels.dtype.kind not in kinds:
            what = "floating-point" if kinds == "f" else "whole"
            raise UserError(f"{self.paths[1]} is {labels.dtype} of shape {labels.shape}; {self.length} latents need "
                            f"{what} numbers of shape {shapes[0]}.")  # fmt: skip
        if wanted.label_type == "class":
            check_class(int(labels.min()), int(labels.max()), wanted, str(self.paths[1]))

    def __getstate__(self):
        return {**self.__dict__, "arrays": None}  # a memory map would be copied whole

    def __len__(self):
        return self.length

    def __getitem__(self, number):
        self.arrays = self.arrays or self._open()
        latents, labels = self.arrays
        raw = {"__key__": str(number), "latent.npy": latents[number]}
        return raw if labels is None else {**raw, "label.npy": labels[number, ...]}


class SyntheticRows:
    """Made-up latents: N(mean of the class, 1/4) with labels 0, 1, ..., K - 1, 0, ...; the same at every call."""

    def __init__(self, wanted):
        self.wanted = wanted

    def __len__(self):
        return self.wanted.synthetic_data

    def __getitem__(self, number):
        wanted = self.wanted
        label = number % wanted.num_classes
        of_class = np.random.default_rng(derive("synthetic class", label))
        mean = of_class.standard_normal((wanted.in_channels, 1, 1))
        noise = np.random.default_rng(derive("synthetic", number)).standard_normal(
            (wanted.in_channels, wanted.sample_size, wanted.sample_size)
        )
        vector = wanted.label_type == "vector"
        told = of_class.standard_normal(wanted.label_dim) if vector else np.array(label)
        return {"__key__": str(number), "latent.npy": (mean + noise / 2).astype(np.float32), "label.npy": told}
