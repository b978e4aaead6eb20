"""Drawing the images that a protocol asks for into a folder: what is there is kept, any number of processes, any interruption.

Image number j depends on its seed and condition alone. It is drawn in a batch whose members do not depend on the number of
processes either, so that one process and two write the same bytes.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from brisk import builtin_protocol, image_folder
from brisk.checkpoint import write_atomically
from brisk.options import UserError

RECORD = "images.json"


class Wanted(NamedTuple):
    """The images that every model draws."""

    seeds: list  # one per image, set after set
    conditions: list | None  # captions or class numbers, one per image; None: nothing
    labels: list | None  # of handwriting, per set a tuple of (samples,) tensors: digits, and the two colours if captions


def wanted(protocol, takes, classes=None, prompts=None):
    """The `Wanted` of a `protocols.Protocol` for a model that takes "prompts", "classes" or None. UserError where it cannot.

    Args: `classes`: how many the model has; `prompts`: the captions of the file, the first of which are used.
    """
    count, sets = protocol.samples, protocol.seeds
    seeds = [protocol.first_seed + number for number in range(sets * count)]
    if protocol.conditions == "handwriting":
        if takes != "prompts":
            raise UserError(f"takes {takes or 'no captions'}; the protocol builtin is for models of captions"
                            f"{', builtin_classes for those of classes' * (takes == 'classes')}.")  # fmt: skip
        labels = [builtin_protocol.wanted_labels(count, seed) for seed in range(sets)]
        return Wanted(seeds, [text for one in labels for text in builtin_protocol.captions_of(one)], labels)
    if takes == "prompts":
        if prompts is None:
            raise UserError(f"takes captions: give --prompt_file ({protocol.prompts or 'one caption a line, or a table'}).")
        if len(prompts) < count:
            raise UserError(f"needs {count:,} captions, --prompt_file has {len(prompts):,}; give --samples {len(prompts)}.")
        return Wanted(seeds, prompts[:count] * sets, None)
    if protocol.extractor == "handwriting" and takes != "classes":
        raise UserError("takes no classes, which the protocol builtin_classes needs.")
    if takes == "classes":
        import torch

        chosen = [place % classes for place in range(count)]
        labels = [(torch.tensor(chosen),)] * sets if protocol.extractor == "handwriting" else None
        return Wanted(seeds, chosen * sets, labels)
    return Wanted(seeds, None, None)


def files_of(folder, protocol, seeds):
    """Where the images of `seeds` are, one file each."""
    suffix = ".jpg" if protocol.jpeg else ".png"
    return [image_folder.picture_file(folder, seed).with_suffix(suffix) for seed in seeds]


def prepare(folder, settings, asked, state):
    """Make `folder` ready for the images of `asked` (`Wanted`), made with these `settings`.

    Images made with others are removed, and images of a seed that was drawn for another condition.
    Args: `state`: an accelerate PartialState. Returns whether images were removed, on the main process.
    """
    settings, stale = json.loads(json.dumps(settings)), []
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        before = image_folder.read_json(folder / RECORD)
        drawn_for = before.get("drawn_for", {}) if before.get("settings") == settings else {}
        conditions = asked.conditions or [None] * len(asked.seeds)
        now = {str(seed): _digest(condition) for seed, condition in zip(asked.seeds, conditions, strict=True)}
        for path in (*folder.glob("[0-9]*/[0-9]*.png"), *folder.glob("[0-9]*/[0-9]*.jpg")):
            seed = str(int(path.stem))
            if seed not in drawn_for or now.get(seed, drawn_for[seed]) != drawn_for[seed]:
                stale.append(path)
                path.unlink()
        record = {"settings": settings, "drawn_for": drawn_for | now}
        write_atomically(folder / RECORD, json.dumps(record, allow_nan=False) + "\n")
    state.wait_for_everyone()
    return bool(stale)


def _digest(condition):
    return hashlib.sha256(json.dumps(condition).encode()).hexdigest()[:12]


def draw(plan, asked, files, batch_size, state, jpeg=None, progress=None):
    """Write the images of `asked` (`Wanted`) that are not in `files` yet, this process's share of the batches.

    Args: `plan`: an `eval_models.Plan`; `progress`: called with how many images have been drawn or were there.
    """
    with ThreadPoolExecutor(2) as writers:
        pending = []
        for first in range(0, len(files), batch_size):
            rows = slice(first, first + batch_size)
            if (first // batch_size) % state.num_processes == state.process_index:
                if not all(file.exists() for file in files[rows]):
                    images = plan.draw(asked.conditions and asked.conditions[rows], asked.seeds[rows])
                    for written in pending:
                        written.result()  # an error of the disk is said here
                    pending = [writers.submit(_write, *pair, jpeg) for pair in zip(files[rows], images, strict=True)]
            if progress is not None:
                progress(len(files[rows]))
        for written in pending:
            written.result()
    state.wait_for_everyone()


def _write(file, image, jpeg):
    file.parent.mkdir(parents=True, exist_ok=True)
    image_folder.save(file, image, jpeg)
