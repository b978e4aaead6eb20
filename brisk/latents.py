"""Training data of class-conditional latent diffusion: cached latents in three formats, an image folder, made-up latents.

Formats, by what is given: `features` (one .npy per image and per label, as fast-DiT writes them), `arrays` (latents.npy
and labels.npy), `shards` (WebDataset tars), `images`, `synthetic`. Raw samples are dicts of bytes or arrays.
Letters: B batch, C latent channels, h latent side, K classes, N samples, R image side in pixels.
"""

import contextlib
import functools
import json
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from brisk import class_images, data, sources
from brisk.fpdm_options import SOURCES
from brisk.latent_rows import PROBED, ArrayRows, FeatureRows, ReadLatent, SyntheticRows, probe
from brisk.options import UserError, redact
from brisk.samples import MANIFEST_KEY, metadata_of
from brisk.seeding import derive

MANIFEST = "manifest.json"  # beside arrays and shards; beside features with the data set's name before it
SAME_IN_ALL_SHARDS = ("size", "resolution", "scaling_factor", "vae", "classes")


class LatentOptions(NamedTuple):
    """What the run trains on (one of `SOURCES`), and the shapes it needs."""

    feature_path: str | None  # folder of features, arrays or shards
    dataset_name: str  # prefix of the folders of features
    train_shards_path_or_url: str | None
    train_data_dir: str | None  # image folder
    synthetic_data: int | None  # how many made-up latents
    in_channels: int
    sample_size: int  # side of the latents
    num_classes: int
    label_type: str  # class, vector (of label_dim numbers) or none
    label_dim: int | None
    image_size: int  # pixels
    random_flip: bool  # of train_data_dir
    num_workers: int


def find_source(wanted):
    """(format, where) of the data that `wanted` names; `where` a folder, shard list or number. Raises UserError."""
    [name] = [name for name in SOURCES if getattr(wanted, name) is not None]
    where = getattr(wanted, name)
    if name != "feature_path":
        return {SOURCES[1]: "shards", SOURCES[2]: "images", SOURCES[3]: "synthetic"}[name], where
    folder, features = Path(where), f"{wanted.dataset_name}_features"
    if not folder.is_dir():
        raise UserError(f"--feature_path {where} is not a folder.")
    present = {"arrays": (folder / "latents.npy").is_file(), "features": (folder / features).is_dir(),
               "shards": any(folder.glob("*.tar"))}  # fmt: skip
    found = [name for name, is_there in present.items() if is_there]
    if len(found) != 1:
        raise UserError(
            f"--feature_path {where} must hold one of latents.npy, {features}/ (named after --dataset_name) and *.tar, "
            f"it holds {' and '.join(found) or 'none of them'}."
        )
    return found[0], where


def open_rows(wanted, say):
    """The samples as a sequence, None for shards. Checks all that can be checked without reading everything.

    Raises UserError; `say` takes a remark on classes that the network has and the data have not.
    """
    kind, where = find_source(wanted)
    rows = None
    _head_of_shard.cache_clear()  # another run in this process may find other data
    if kind == "features":
        rows = FeatureRows(where, wanted.dataset_name, wanted.label_type)
    elif kind == "arrays":
        rows = ArrayRows(where, wanted)
    elif kind == "synthetic":
        rows = SyntheticRows(wanted)
    elif kind == "images":
        if wanted.label_type == "vector":
            raise UserError("--train_data_dir has classes and no label vectors; store those with precomputed latents.")
        rows = class_images.ClassImageRows(*class_images.list_class_images(where, wanted.label_type == "class"))
    _check_facts(read_facts(wanted, rows), wanted, rows, say)
    if kind != "images":
        probe(rows if rows is not None else _head_of_shard(_urls(where)[0])[1], wanted, redact(str(where)))
    return rows


def read_facts(wanted, rows):
    """What the data say of themselves, {} if nothing: count, scaling_factor, vae, vae_name, size (px), classes (names).

    From the manifest of `scripts/precompute_latents.py`, or the class names of an image folder.
    """
    kind, where = find_source(wanted)
    if kind == "images":
        return {"classes": rows.classes} if rows.classes else {}
    if kind == "synthetic":
        return {}
    if kind == "shards":
        urls = _urls(where)
        beside = _read_manifest(Path(urls[0]).parent / MANIFEST) if os.path.isfile(urls[0]) else {}
        return beside | _head_of_shard(urls[0])[0]
    return _read_manifest(Path(where) / (MANIFEST if kind == "arrays" else f"{wanted.dataset_name}_{MANIFEST}"))


def epoch_size(facts, rows):
    """Samples of one epoch: of rows all, of shards what their manifest counts, else None."""
    return len(rows) if rows is not None else facts.get("count")


def find_position(wanted, rows, seed, resume, saved, accelerator, say):
    """Where in the data the run starts; see `sources.find_position`."""
    source = derive(seed, *(getattr(wanted, name) for name in SOURCES), wanted.dataset_name)
    is_folder = rows is not None
    return sources.resume_position(source, is_folder, "skip", wanted.num_workers, resume, saved, accelerator, say)


def open_batches(wanted, rows, batch_size, accelerator, seed, position, say):
    """Endless `data.TrainingBatches` of this process: dicts of stacked tensors, on the CPU.

    One of "latents" (B, C, h, h) scaled, "moments" (B, 2, C, h, h) mean and standard deviation unscaled, "pixels" uint8
    (B, 3, R, R); and "labels" int64 (B,), or float32 (B, label_dim). Args: `rows` of `open_rows`.
    """
    rank, processes = accelerator.process_index, accelerator.num_processes
    kind, where = find_source(wanted)
    if kind == "images":
        decode = class_images.CutClassImage(wanted.image_size, wanted.random_flip)
    else:
        manifest, first = ({}, rows) if rows is not None else _head_of_shard(_urls(where)[0])
        decode = ReadLatent(wanted, probe(first, wanted, redact(str(where))))
    if rows is not None:
        dataset = data.FolderBatches(rows, decode, batch_size, seed, rank, processes, position)
    else:
        same = {name: manifest[name] for name in SAME_IN_ALL_SHARDS if name in manifest} if manifest else None
        dataset = data.ShardBatches(_urls(where), decode, batch_size, seed, rank, position, manifest=same)
    pin_memory = accelerator.device.type == "cuda"
    return data.TrainingBatches(dataset, wanted.num_workers, pin_memory, batch_size * processes, say)


def _urls(where):
    return data.expand_shards(str(where))


@functools.lru_cache(maxsize=1)  # the first shard is asked for several times before the first batch
def _head_of_shard(url):
    """(manifest or {}, the first few samples) of a shard. Raises UserError."""
    facts, first, reading = {}, [], data.read_shard(url)
    try:
        for raw in reading:
            if raw["__key__"] == MANIFEST_KEY:
                facts = metadata_of(raw)
            else:
                first.append(raw)
            if len(first) == PROBED:
                break
    except (OSError, EOFError, tarfile.TarError) as error:
        if not first:
            raise UserError(redact(f"the shard {url} cannot be read: {error}.")) from None
    finally:
        with contextlib.suppress(OSError):  # a pipe that is closed before its end complains
            reading.close()
    return facts, first


def _read_manifest(path):
    if not path.is_file():
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}.") from None
    return facts if isinstance(facts, dict) else {}


def _check_facts(facts, wanted, rows, say):
    """UserError where the data are of another size, incomplete, or have more classes than the network."""
    size = facts.get("size", facts.get("resolution"))
    if size is not None and size != wanted.image_size:
        raise UserError(f"the latents are those of images of {size} pixels; --image_size is {wanted.image_size}.")
    if rows is not None and facts.get("count", len(rows)) != len(rows):
        raise UserError(f"the manifest counts {facts['count']} samples and there are {len(rows)}: the data are incomplete.")
    classes = facts.get("classes") or []
    if wanted.label_type != "class" or not classes:
        return
    if len(classes) > wanted.num_classes:
        raise UserError(f"the data have {len(classes)} classes; --num_classes is {wanted.num_classes}.")
    if len(classes) < wanted.num_classes:
        say(f"--num_classes is {wanted.num_classes}, the data have {len(classes)} classes.")
