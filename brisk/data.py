"""Training batches for ever: tar shards read in a stream, or an image folder; the exact position saved and restored.

A position is a small JSON dict. Resuming from it decodes nothing that was already seen: a folder's order is
arithmetic, a stream reopens the shard it was in and skips the headers of what was used.
"""

import atexit
import contextlib
import itertools
import math
import os
import queue
import re
import signal
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from brisk.options import UserError, redact
from brisk.samples import MANIFEST_KEY, Skip, check_manifest, metadata_of
from brisk.seeding import derive

FIRST_BLOCK = 128  # samples shuffled together at the start; doubles up to the shuffle buffer
HOPELESS = 1000  # samples seen without a usable one before the run stops


def expand_shards(spec):
    """The shard URLs of a `::`-separated list, each brace-expanded with zero padding kept; of a folder, all its tars."""
    import braceexpand

    try:
        urls = []
        for part in spec.split("::"):
            inside = sorted(str(path) for path in Path(part).glob("*.tar")) if os.path.isdir(part) else None
            urls += [url for url in inside or braceexpand.braceexpand(part) if url]
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"the shard list '{redact(spec)}' has unbalanced braces.") from None
    if not urls:
        raise UserError(f"the shard list '{spec}' names no shard.")
    return urls


def read_shard(url):
    """Raw samples {suffix: bytes, "__key__": key} of one tar: a path, a URL, or `pipe:COMMAND` writing to stdout.

    A new sample starts where the key changes, a suffix repeats, or the shard begins. Raises OSError or TarError.
    """
    import webdataset

    with webdataset.gopen(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        sample = {}
        for member in tar:
            named = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]+)", member.name)
            if not member.isfile() or not named:
                continue
            key, suffix = named.group(1), named.group(2).lower()
            if sample and (sample["__key__"] != key or suffix in sample):
                yield sample
                sample = {}
            sample |= {"__key__": key, suffix: tar.extractfile(member).read()}
        if sample:
            yield sample


def read_first_manifest(urls):
    """The manifest at the head of the first of the precomputed shards `urls`; UserError if there is none."""
    try:
        first = next(read_shard(urls[0]), {})
    except (OSError, tarfile.TarError) as error:
        raise UserError(redact(f"the precomputed shard {urls[0]} cannot be read: {error}.")) from None
    if first.get("__key__") != MANIFEST_KEY:
        raise UserError(redact(f"{urls[0]} holds no manifest: it was not made by scripts/precompute_latents.py."))
    return metadata_of(first)


def prefetch(items, size):
    """The items of a generator, produced ahead in a thread, so that reading overlaps with decoding."""
    ready, stop = queue.Queue(maxsize=size), threading.Event()

    def hand_over(item, error=None):
        while not stop.is_set():
            try:
                return ready.put((item, error), timeout=1)
            except queue.Full:
                continue

    def produce():
        try:
            for item in items:
                hand_over(item)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer
            hand_over(None, error)
        finally:
            with contextlib.suppress(OSError):  # a pipe that is closed before its end complains
                items.close()

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()


def collate(samples):
    """Stack the tensors of a list of samples into a batch."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class BatchMaker:
    """Turns raw samples into full batches, counting why samples were skipped."""

    def __init__(self, decode, batch_size):
        self.decode, self.batch_size = decode, batch_size
        self.samples, self.skipped, self.seen, self.usable = [], Counter(), 0, 0
        self.reasons = Counter()

    def add(self, read, rng):
        """Decode what `read()` returns; a full batch or None. Raises UserError when no sample is ever usable."""
        self.seen += 1
        try:
            self.samples.append(self.decode(read(), rng))
            self.usable += 1
        except Skip as reason:
            self.skipped[str(reason)] += 1
            self.reasons[str(reason)] += 1
        if not self.usable and self.seen >= HOPELESS:
            why = ", ".join(f"{count} x {reason}" for reason, count in self.reasons.most_common())
            raise UserError(f"0 of {self.seen} samples usable: {why}.")
        if len(self.samples) < self.batch_size:
            return None
        batch = {**collate(self.samples), "skipped": dict(self.skipped)}
        self.samples, self.skipped = [], Counter()
        return batch


def total_steps(epochs, images_per_epoch, batch_size, processes, workers, accumulation):
    """Optimizer steps of `epochs` passes over `images_per_epoch` images, each worker giving equally many batches."""
    workers = max(workers, 1)
    batches = math.ceil(images_per_epoch / (batch_size * processes * workers)) * workers
    return epochs * math.ceil(batches / accumulation)


def start_position(source=None):
    """The position of a run that has seen nothing of `source` (a hash of where the data is and of the seed)."""
    return {"batches": 0, "samples": 0, "workers": None, "cursors": {}, "fresh_from": 0, "source": source}


def _guard(batches):
    """Errors of the user's travel as a batch: a worker's exception would arrive as a traceback."""
    try:
        yield from batches
    except UserError as error:
        yield {"error": str(error)}


class FolderBatches(IterableDataset):
    """Batches of a folder or dataset: a new permutation per epoch, the same at any number of workers.

    Global sample g stands at place g mod n of the permutation of epoch g // n; rank r takes every r-th batch.
    """

    def __init__(self, rows, decode, batch_size, seed, rank, world_size, position):
        """`rows`: a sequence of raw samples, e.g. `samples.FolderRows`."""
        self.rows, self.decode, self.batch_size = rows, decode, batch_size
        self.seed, self.rank, self.world_size, self.position = seed, rank, world_size, position
        self.epoch, self.order = None, None

    def _index(self, place):
        epoch, within = divmod(place, len(self.rows))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng(derive(self.seed, "epoch", epoch)).permutation(len(self.rows))
        return int(self.order[within])

    def _batch(self, number, maker):
        first = self.position["samples"] + (number * self.world_size + self.rank) * self.batch_size
        for place in itertools.count(first):
            for attempt in itertools.count():
                rng = np.random.default_rng(derive(self.seed, "sample", place, attempt))
                # an unusable file is replaced by another one, so that places stay arithmetic
                index = int(rng.integers(len(self.rows))) if attempt else self._index(place)
                usable = maker.usable
                batch = maker.add(lambda index=index: self.rows[index], rng)
                if batch:
                    return batch
                if maker.usable > usable:
                    break

    def __iter__(self):
        return _guard(self._batches())

    def _batches(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        maker = BatchMaker(self.decode, self.batch_size)
        for number in itertools.count(worker, workers):
            yield {**self._batch(number, maker), "position": {"workers": workers}}


class ShardBatches(IterableDataset):
    """Batches streamed from tar shards; every worker of every rank reads its own stream.

    A stream passes over all shards in a new order each time, and shuffles blocks of consecutive samples.
    """

    def __init__(self, urls, decode, batch_size, seed, rank, position, shuffle=1000, manifest=None):
        """`manifest`: what precomputed shards must say of themselves, None for shards of images."""
        self.urls, self.decode, self.batch_size, self.shuffle = urls, decode, batch_size, shuffle
        self.seed, self.rank, self.position, self.manifest = seed, rank, position, manifest
        self.notes = []

    def _url(self, stream, ordinal):
        passes, place = divmod(ordinal, len(self.urls))
        return self.urls[np.random.default_rng(derive(*stream, "pass", passes)).permutation(len(self.urls))[place]]

    def _groups(self, stream, ordinal, offset):
        """((shard ordinal, place in shard), raw sample) from that place on, for ever."""
        # the only good shard may come first in one pass and last in the next
        failures, patience = 0, min(100, max(3, 2 * len(self.urls)))
        for number in itertools.count(ordinal):
            url, place, problem = self._url(stream, number), 0, "it holds no sample"
            try:
                for raw in read_shard(url):
                    if raw["__key__"] == MANIFEST_KEY and self.manifest is not None:
                        check_manifest(metadata_of(raw), self.manifest)
                        continue
                    place += 1
                    if number > ordinal or place > offset:
                        yield (number, place - 1), raw
            except (OSError, EOFError, tarfile.TarError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
                self.notes.append(redact(f"shard {url} is broken after {place} samples: {problem}"))
            failures = 0 if place else failures + 1
            if failures >= patience:
                raise UserError(redact(f"{failures} shards in a row gave no sample; the last one is {url}: {problem}."))

    def __iter__(self):
        return _guard(self._batches())

    def _batches(self):
        info = get_worker_info()
        identity, workers = (info.id, info.num_workers) if info else (0, 1)
        # the loader always asks worker 0 first: after a resume it plays the worker whose turn it is
        worker = (identity + self.position["batches"]) % workers
        stream = (self.seed, self.rank, worker, self.position["fresh_from"])
        cursor = self.position["cursors"].get(str(worker), {"ordinal": 0, "offset": 0, "block": 0, "used": 0})
        groups = prefetch(self._groups(stream, cursor["ordinal"], cursor["offset"]), self.shuffle)
        maker, used = BatchMaker(self.decode, self.batch_size), cursor["used"]
        for number in itertools.count(cursor["block"]):
            block = list(itertools.islice(groups, min(self.shuffle, FIRST_BLOCK * 2**number)))
            (ordinal, offset), _ = block[0]
            order = np.random.default_rng(derive(*stream, "block", ordinal, offset)).permutation(len(block))
            for turn in range(used, len(order)):
                place, raw = block[order[turn]]
                batch = maker.add(lambda raw=raw: raw, np.random.default_rng(derive(*stream, "sample", *place)))
                if batch:
                    now = {"ordinal": ordinal, "offset": offset, "block": number, "used": turn + 1}
                    notes, self.notes = self.notes, []
                    yield {**batch, "notes": notes, "position": {"workers": workers, str(worker): now}}
            used = 0


class OnePass(IterableDataset):
    """Every sample of a source once (`copies` times), divided over processes and workers; for preparing data."""

    def __init__(self, sources, decode, copies, seed, rank, world_size):
        """`sources`: rows such as `samples.FolderRows`, or a list of shard URLs."""
        self.sources, self.decode, self.copies, self.seed = sources, decode, copies, seed
        self.rank, self.world_size = rank, world_size

    def _raw(self, number):
        source = self.sources[number]
        if not isinstance(source, str):
            yield source
            return
        try:
            yield from read_shard(source)
        except (OSError, EOFError, tarfile.TarError) as error:
            raise Skip(redact(f"broken shard {source} ({error})")) from None

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        mine = range(self.rank * workers + worker, len(self.sources), self.world_size * workers)
        for number in mine:
            try:
                for place, raw in enumerate(self._raw(number)):
                    for copy in range(self.copies):
                        rng = np.random.default_rng(derive(self.seed, "once", number, place, copy))
                        yield self._decoded(raw, rng)
            except Skip as reason:
                yield {"skip": str(reason)}

    def _decoded(self, raw, rng):
        try:
            return self.decode(raw, rng)
        except Skip as reason:
            return {"skip": str(reason)}


def _outlive_stop(worker):
    """Let a loader process ignore the first SIGTERM or SIGINT: sent to the whole group, it is the main process's to heed."""

    def obey_the_next(number, frame):
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, obey_the_next)


def _end_workers(workers):
    for worker in workers:
        worker.kill()


class TrainingBatches:
    """Iterator over batches that knows its position and counts skipped samples."""

    def __init__(self, dataset, num_workers, pin_memory, samples_per_batch, say, broken_share=None):
        """`samples_per_batch` over all ranks; `say` takes messages about broken shards.

        More than `broken_share` of unreadable samples, of all of this rank's in the epochs begun, is a UserError.
        """
        self.position = {**dataset.position, "cursors": dict(dataset.position["cursors"])}
        self.samples_per_batch, self.say, self.skipped, self.announce_at = samples_per_batch, say, Counter(), 1
        self.told, self.broken_share, self.seen = set(), broken_share, 0
        rows, self.world_size = getattr(dataset, "rows", None), getattr(dataset, "world_size", 1)
        self.epoch = HOPELESS if rows is None else math.ceil(len(rows) / self.world_size)  # of this rank
        loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, pin_memory=pin_memory,
                            prefetch_factor=4 if num_workers else None, worker_init_fn=_outlive_stop)  # fmt: skip
        self.batches = iter(loader)
        if num_workers:  # at exit python sends the SIGTERM that they outlive, then waits for them
            atexit.register(_end_workers, self.batches._workers)

    def __iter__(self):
        return self

    def __next__(self):
        batch = next(self.batches)
        if "error" in batch:
            raise UserError(batch["error"])
        for note in batch.pop("notes", []):
            if note not in self.told:  # the same broken shard comes up in every pass
                self.told.add(note)
                self.say(note)
        self.skipped.update(batch.pop("skipped"))
        if self.skipped.total() >= self.announce_at:
            self.announce_at = 2 * self.skipped.total()
            why = ", ".join(f"{count} x {reason}" for reason, count in self.skipped.most_common())
            self.say(f"Samples skipped so far: {why}.")
        self._check_broken(len(next(iter(batch.values()))))
        moved = batch.pop("position")
        self.position["workers"] = moved.pop("workers")
        self.position["cursors"].update(moved)
        self.position["batches"] += 1
        self.position["samples"] += self.samples_per_batch
        return batch

    def _check_broken(self, usable):
        broken = sum(count for reason, count in self.skipped.items() if reason.startswith("unreadable"))
        self.seen += usable
        total = math.ceil(self.seen / self.epoch) * self.epoch  # broken files may come first in an epoch
        allowed = (self.broken_share or 0.0) * total
        if self.world_size > 1:  # the rank's files are a draw from all: three standard deviations
            allowed += 3 * math.sqrt(allowed)
        if self.broken_share is not None and broken > allowed:
            raise UserError(f"{broken} samples are unreadable, more than {self.broken_share:.0%} of {total}: mend the data.")


def continue_position(saved, step_batches, workers, same_ranks, is_folder, mode, say, source=None):
    """The position to resume from: exact where it can be, else fresh shards.

    Args: `saved` as stored by this rank or None; `step_batches` batches consumed so far; `mode` is `--data_resume`;
    `source` names data and seed. A folder goes on exactly at any number of workers and processes; a stream needs the
    same numbers of both.
    """
    fresh = {**start_position(source), "fresh_from": step_batches}
    if saved is not None and saved.get("source") != source:
        say("The data source or the seed changed: the data starts afresh.")
        return fresh
    exact = saved is not None and (is_folder or (same_ranks and saved["workers"] in (None, max(workers, 1))))
    if exact and (is_folder or mode == "skip"):
        return saved
    if mode == "skip":
        say("The numbers of processes or loader workers changed: the shard stream starts afresh.")
    return fresh
