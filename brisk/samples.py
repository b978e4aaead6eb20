"""One raw sample (bytes by suffix) to tensors: images with captions, or cached latents; why a sample is skipped.

Letters: R resolution, L tokens, D text width, h w latent height and width.
"""

import csv
import io
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from brisk.options import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp")
CAPTION_SUFFIXES = ("text", "txt", "caption")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest")
MANIFEST_KEY = "__manifest__"


class Skip(Exception):
    """This sample cannot be used; the message is the reason it is counted under."""


def metadata_of(raw):
    """The sample's KEY.json as a dict, {} if there is none or it is broken."""
    try:
        values = json.loads(raw.get("json", b"{}"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _as_number(kind, value):
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise Skip("unusable metadata") from None


def caption_of(raw, metadata, rng):
    """The caption: first of text, txt, caption, else the json's; of a list, a random element. Raises Skip."""
    for suffix in CAPTION_SUFFIXES:
        if suffix in raw:
            return raw[suffix].decode("utf-8", "replace").strip()
    caption = metadata.get("caption")
    if isinstance(caption, list) and caption:
        caption = caption[int(rng.integers(len(caption)))]
    if not isinstance(caption, str):
        raise Skip("no caption")
    return caption


def decode_image(raw):
    """The sample's image as an upright RGB PIL image. Raises Skip."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in raw), None)
    if suffix is None:
        raise Skip("no image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw[suffix])) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise Skip("image too large") from None
    except Exception:  # Pillow's decoders raise many kinds
        raise Skip("unreadable image") from None


def resize_and_crop(image, resolution, interpolation, center_crop, rng):
    """Scale the shorter side to R and cut an R x R square, in one resampling of the square alone.

    Returns (uint8 tensor (3, R, R), (top, left) of the square in the scaled image's pixels).
    """
    width, height = image.size
    scale = resolution / min(width, height)
    scaled_width, scaled_height = max(resolution, round(width * scale)), max(resolution, round(height * scale))
    free_top, free_left = scaled_height - resolution, scaled_width - resolution
    top = round(free_top / 2) if center_crop else int(rng.integers(free_top + 1))
    left = round(free_left / 2) if center_crop else int(rng.integers(free_left + 1))
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
    resample = getattr(Image.Resampling, interpolation.upper())
    square = image.resize((resolution, resolution), resample, box=box)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), (top, left)


class ImageCaptions:
    """Callable: raw sample -> pixels, token ids and sizes, for training with online encoding."""

    def __init__(self, tokenize, resolution, center_crop=False, random_flip=False, interpolation="bilinear",
                 proportion_empty_prompts=0.0, min_size=None, max_pwatermark=None):  # fmt: skip
        """`tokenize(text)` returns one int64 tensor (L,) per text encoder."""
        self.tokenize, self.resolution, self.interpolation = tokenize, resolution, interpolation
        self.center_crop, self.random_flip = center_crop, random_flip
        self.proportion_empty_prompts = proportion_empty_prompts
        self.min_size, self.max_pwatermark = min_size, max_pwatermark

    def __call__(self, raw, rng):
        """{"pixels" uint8 (3, R, R), "input_ids_0" (L,) ..., "original_size" (2,), "crop_top_left" (2,)}."""
        metadata = metadata_of(raw)
        caption = caption_of(raw, metadata, rng)
        if self.max_pwatermark is not None and metadata.get("pwatermark") is not None:
            if _as_number(float, metadata["pwatermark"]) > self.max_pwatermark:
                raise Skip("pwatermark above the limit")
        image = decode_image(raw)
        height = _as_number(int, metadata.get("original_height") or metadata.get("height") or image.height)
        width = _as_number(int, metadata.get("original_width") or metadata.get("width") or image.width)
        if self.min_size is not None and min(height, width) < self.min_size:
            raise Skip("smaller than the minimum size")
        if self.random_flip and rng.random() < 0.5:
            image = ImageOps.mirror(image)  # before the crop, so that its offset is that of the flipped image
        pixels, crop = resize_and_crop(image, self.resolution, self.interpolation, self.center_crop, rng)
        if rng.random() < self.proportion_empty_prompts:
            caption = ""
        ids = {f"input_ids_{i}": row for i, row in enumerate(self.tokenize(caption))}
        sizes = {"original_size": torch.tensor([height, width]), "crop_top_left": torch.tensor(crop)}
        return {"pixels": pixels, **ids, **sizes}


class CachedLatents:
    """Callable: raw sample of a precomputed shard -> latent moments and prompt embeddings."""

    ARRAYS = {
        "latent.npy": "moments",
        "prompt.npy": "prompt_embeds",
        "pooled.npy": "pooled",
        "time_ids.npy": "time_ids",
    }

    def __init__(self, manifest, proportion_empty_prompts=0.0):
        """`manifest` is what every shard must have been made with (see `check_manifest`)."""
        self.manifest, self.proportion_empty_prompts = manifest, proportion_empty_prompts

    def __call__(self, raw, rng):
        """{"moments" fp16 (2, 4, h, w), "prompt_embeds" fp16 (L, D), "empty" bool, SDXL: "pooled", "time_ids"}."""
        sample = {}
        for suffix, name in self.ARRAYS.items():
            if suffix in raw:
                try:
                    sample[name] = torch.from_numpy(np.load(io.BytesIO(raw[suffix]), allow_pickle=False))
                except Exception:  # ValueError, EOFError, TypeError, zipfile's own
                    raise Skip("unreadable array") from None
        if "moments" not in sample or "prompt_embeds" not in sample:
            raise Skip("no latent or no prompt")
        sample["empty"] = torch.tensor(rng.random() < self.proportion_empty_prompts)
        return sample


def check_manifest(found, wanted):
    """UserError naming what differs between the manifest in a precomputed shard and what this run needs."""
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        details = ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in different)
        raise UserError(
            f"the precomputed shards are stale ({details}); make them again with scripts/precompute_latents.py."
        )


def list_folder(folder):
    """Images below `folder` with captions from metadata.jsonl / metadata.csv (file_name, text) or sidecar .txt files.

    Returns [(path, caption or None)], sorted by path. Raises UserError for a missing or useless folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"--train_data_dir {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    captions = _read_metadata(folder)
    found = [(path, captions.get(path) or _sidecar(path)) for path in paths]
    if not any(caption is not None for _, caption in found):
        raise UserError(
            f"--train_data_dir {folder} holds {len(paths)} images and no caption: add metadata.jsonl "
            "(file_name, text), metadata.csv, or a .txt file beside each image."
        )
    return found


def _read_metadata(folder):
    captions = {}
    for path in [*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")]:
        try:
            with open(path, encoding="utf-8-sig", newline="") as lines:
                is_csv = path.suffix == ".csv"
                rows = list(csv.DictReader(lines)) if is_csv else [json.loads(line) for line in lines if line.strip()]
            for row in rows:
                text = row.get("text") or row.get("caption")
                if not isinstance(text, (str, type(None))):
                    raise TypeError(f"text is {text}")
                captions[path.parent / row["file_name"]] = text
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{path} cannot be read: every row needs file_name and text ({error!r}).") from None
    return captions


def _sidecar(path):
    for suffix in CAPTION_SUFFIXES:
        text = path.with_suffix(f".{suffix}")
        if text.is_file():
            return text.read_text(encoding="utf-8", errors="replace").strip()
    return None


def read_file_sample(path, caption):
    """A raw sample from an image file of `list_folder`. Raises Skip."""
    try:
        raw = {Path(path).suffix.lower().lstrip("."): Path(path).read_bytes()}
    except OSError:
        raise Skip("unreadable image") from None
    return raw if caption is None else {**raw, "txt": caption.encode()}
