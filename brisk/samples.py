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


def scaled_size(width, height, resolution):
    """(width, height) of an image whose shorter side is scaled to R; the longer one is cut to whole pixels."""
    shorter = min(width, height)
    return width * resolution // shorter, height * resolution // shorter


def resize_and_crop(image, resolution, interpolation, center_crop, rng):
    """Scale the shorter side to R and cut an R x R square, in one resampling of the square alone.

    Returns (RGB image of R x R, (top, left) of the square in the scaled image's pixels).
    """
    width, height = image.size
    scaled_width, scaled_height = scaled_size(width, height, resolution)
    free_top, free_left = scaled_height - resolution, scaled_width - resolution
    top = round(free_top / 2) if center_crop else int(rng.integers(free_top + 1))
    left = round(free_left / 2) if center_crop else int(rng.integers(free_left + 1))
    x, y = width / scaled_width, height / scaled_height
    box = (left * x, top * y, (left + resolution) * x, (top + resolution) * y)
    resample = getattr(Image.Resampling, interpolation.upper())
    return image.resize((resolution, resolution), resample, box=box), (top, left)


class ImageCaptions:
    """Callable: raw sample -> pixels, token ids and sizes, for training with online encoding."""

    def __init__(self, tokenize, resolution, center_crop=False, random_flip=False, interpolation="bilinear",
                 proportion_empty_prompts=0.0, min_size=None, max_pwatermark=None, extra_prompts=None):  # fmt: skip
        """`tokenize(text)` returns a dict of tensors, e.g. of `sd_inputs.Tokenize`.

        Each sample gets one of `extra_prompts` besides its own caption, for random conditioning.
        """
        self.tokenize, self.resolution, self.interpolation = tokenize, resolution, interpolation
        self.center_crop, self.random_flip = center_crop, random_flip
        self.proportion_empty_prompts = proportion_empty_prompts
        self.min_size, self.max_pwatermark, self.extra_prompts = min_size, max_pwatermark, extra_prompts

    def cut(self, image, rng):
        """(uint8 tensor (3, R, R), (top, left), flipped) of an image; the offset is that in the flipped image."""
        square, (top, left) = resize_and_crop(image, self.resolution, self.interpolation, self.center_crop, rng)
        flipped = self.random_flip and rng.random() < 0.5
        if flipped:
            square = ImageOps.mirror(square)
            left = scaled_size(*image.size, self.resolution)[0] - (left + self.resolution)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous(), (top, left), flipped

    def __call__(self, raw, rng):
        """{"pixels" uint8 (3, R, R), "input_ids_0" (L,) ..., "original_size", "crop_top_left" (2,), "flipped", "empty"}."""
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
        pixels, crop, flipped = self.cut(image, rng)
        sample = {"pixels": pixels, **self.tokenize(caption), "flipped": torch.tensor(flipped)}
        sample |= {"original_size": torch.tensor([height, width]), "crop_top_left": torch.tensor(crop)}
        sample["empty"] = torch.tensor(rng.random() < self.proportion_empty_prompts)
        return sample | extra_prompt(self.extra_prompts, self.tokenize, rng)


def extra_prompt(prompts, tokenize, rng):
    """One of `prompts` as tokenized tensors whose names start with "extra_"; {} without prompts."""
    if not prompts:
        return {}
    drawn = tokenize(prompts[int(rng.integers(len(prompts)))])
    return {f"extra_{name}": value for name, value in drawn.items()}


class CachedLatents:
    """Callable: raw sample of a precomputed shard -> latent moments and prompt embeddings."""

    ARRAYS = {
        "latent.npy": "moments",
        "prompt.npy": "prompt_embeds",
        "pooled.npy": "pooled",
        "time_ids.npy": "time_ids",
    }

    def __init__(self, tokenize, proportion_empty_prompts=0.0, extra_prompts=None):
        """`tokenize` as for `ImageCaptions`: shards may hold captions in place of embeddings."""
        self.tokenize, self.proportion_empty_prompts, self.extra_prompts = tokenize, proportion_empty_prompts, extra_prompts

    def __call__(self, raw, rng):
        """{"moments" fp16 (2, 4, h, w), "prompt_embeds" fp16 (L, D), "empty" bool, SDXL: "pooled", "time_ids"}."""
        sample = {}
        for suffix, name in self.ARRAYS.items():
            if suffix in raw:
                try:
                    sample[name] = torch.from_numpy(np.load(io.BytesIO(raw[suffix]), allow_pickle=False))
                except Exception:  # ValueError, EOFError, TypeError, zipfile's own
                    raise Skip("unreadable array") from None
        if "moments" not in sample or not ("prompt_embeds" in sample or "txt" in raw):
            raise Skip("no latent or no prompt")
        if "prompt_embeds" not in sample:
            sample |= self.tokenize(raw["txt"].decode("utf-8", "replace"))
        sample["empty"] = torch.tensor(rng.random() < self.proportion_empty_prompts)
        return sample | extra_prompt(self.extra_prompts, self.tokenize, rng)


def check_manifest(found, wanted):
    """UserError naming what differs between the manifest in a precomputed shard and what this run needs."""
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        details = ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in different)
        raise UserError(
            f"the precomputed shards are stale ({details}); make them again with scripts/precompute_latents.py."
        )


def list_images(folder):
    """The paths of all images below `folder`, sorted. Raises UserError for a missing folder or one without images."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--train_data_dir {folder} is not a folder.")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"--train_data_dir {folder} holds no images ({', '.join(IMAGE_SUFFIXES)}).")
    return paths


def list_folder(folder, image_column=None, caption_column=None):
    """Images below `folder` with captions from metadata.jsonl / .csv / .parquet (file_name, text) or sidecar .txt files.

    Returns [(path, caption, list of captions, or None)], sorted by path. Raises UserError for a missing or useless folder.
    """
    folder, paths = Path(folder), list_images(folder)
    captions = _read_metadata(folder, image_column or "file_name", caption_column)
    found = [(path, captions.get(path) or _sidecar(path)) for path in paths]
    if not any(caption is not None for _, caption in found):
        raise UserError(
            f"--train_data_dir {folder} holds {len(paths)} images and no caption: add metadata.jsonl "
            "(file_name, text), metadata.csv, or a .txt file beside each image."
        )
    return found


def _read_metadata(folder, image_column, caption_column):
    captions = {}
    for path in [path for suffix in ("jsonl", "csv", "parquet") for path in folder.rglob(f"metadata.{suffix}")]:
        try:
            for row in metadata_rows(path):
                text = row[caption_column] if caption_column else row.get("text") or row.get("caption")
                texts = text if isinstance(text, list) else [text] * (text is not None)
                if not all(isinstance(one, str) for one in texts):
                    raise TypeError(f"the caption is {text}")
                captions[path.parent / row[image_column]] = text or None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            needed = f"{image_column} and {caption_column or 'text'}"
            raise UserError(f"{path} cannot be read: every row needs {needed} ({error!r}).") from None
    return captions


def metadata_rows(path):
    """The rows of a .jsonl, .csv or .parquet file as dicts. Raises what its parser raises; UserError without pyarrow."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            raise UserError(f"{path} needs pyarrow: pip install pyarrow") from None
        return parquet.read_table(path).to_pylist()
    with open(path, encoding="utf-8-sig", newline="") as lines:
        return list(csv.DictReader(lines)) if path.suffix == ".csv" else [json.loads(x) for x in lines if x.strip()]


def _sidecar(path):
    for suffix in CAPTION_SUFFIXES:
        text = path.with_suffix(f".{suffix}")
        if text.is_file():
            return text.read_text(encoding="utf-8", errors="replace").strip()
    return None


def _with_caption(raw, caption):
    """`raw` with a caption: a string, or a list in the sample's json, of which each pass draws one."""
    if isinstance(caption, list):
        return {**raw, "json": json.dumps({"caption": caption}).encode()}
    return raw if caption is None else {**raw, "txt": caption.encode("utf-8", "replace")}


def read_image_file(path):
    """The raw sample {suffix: bytes} of an image file. Raises Skip."""
    try:
        return {Path(path).suffix.lower().lstrip("."): Path(path).read_bytes()}
    except OSError:
        raise Skip("unreadable image") from None


class FolderRows:
    """Sequence of raw samples from the (path, caption) pairs of `list_folder`."""

    def __init__(self, files):
        self.files = files

    def first(self, count):
        """The first `count` of them."""
        return FolderRows(self.files[:count])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, number):
        """Raises Skip."""
        path, caption = self.files[number]
        return _with_caption(read_image_file(path), caption)

    def captions(self):
        """The captions in order, None or a list where a file has none or several."""
        return [caption for _, caption in self.files]


class DatasetRows:
    """Sequence of raw samples from a `datasets.Dataset` with columns of images and captions."""

    def __init__(self, dataset, image_column, caption_column):
        self.dataset, self.image_column, self.caption_column = dataset, image_column, caption_column

    def first(self, count):
        """The first `count` of them."""
        kept = self.dataset.select(range(min(count, len(self))))
        return DatasetRows(kept, self.image_column, self.caption_column)

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, number):
        """Raises Skip."""
        row = self.dataset[number]
        image = row[self.image_column]
        try:
            content = image["bytes"] or Path(image["path"]).read_bytes()
        except (OSError, TypeError):
            raise Skip("unreadable image") from None
        return _with_caption({"png": content}, row[self.caption_column])  # decoders look at the content

    def captions(self):
        """The captions in order, None or a list where a row has none or several."""
        return list(self.dataset[self.caption_column])


def open_dataset(name, config_name=None, image_column=None, caption_column=None, cache_dir=None):
    """`DatasetRows` of the training split of a hub dataset, of a folder that `load_dataset` takes, or of `save_to_disk`.

    Raises UserError where the library or a column is missing, or the dataset cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("--dataset_name needs the datasets library: pip install datasets") from None
    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
        dataset = dataset["train"] if isinstance(dataset, dict) else dataset
    except Exception as error:  # the library raises its own, the hub's, pyarrow's and OSError
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--dataset_name {name} cannot be loaded: {reason}") from None
    columns = dataset.column_names
    caption_column = caption_column or next((name for name in ("text", "caption") if name in columns), "text")
    for flag, column in (("--image_column", image_column or "image"), ("--caption_column", caption_column)):
        if column not in columns:
            raise UserError(f"{flag} {column} is no column of {name}; it has {', '.join(columns)}.")
    image_column = image_column or "image"
    try:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except Exception:  # pyarrow raises what its conversion stumbles over
        raise UserError(f"--image_column {image_column} of {name} holds no images.") from None
    kind = dataset.features[caption_column]
    kind = getattr(kind, "feature", kind)  # a list of captions
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise UserError(f"--caption_column {caption_column} of {name} holds no text.")
    return DatasetRows(dataset, image_column, caption_column)
