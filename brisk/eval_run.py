"""One measurement after another: the images that a model draws at every budget, or finished ones, and what they are worth."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from PIL import Image
from tqdm import tqdm

from brisk import (
    builtin_protocol,
    eval_drawing,
    eval_measures,
    eval_models,
    handwriting,
    image_sets,
    protocols,
    report,
    sampling_cost,
    scorers,
    sd_models,
)
from brisk.options import UserError

BEST_BELOW = 20  # network calls from which on a teacher's own scheduler is as good as any
FEW = 8  # the most network calls that a model distilled to few steps is measured at by default


class Entry(NamedTuple):
    """Something to measure."""

    name: str
    source: str
    keys: dict  # nfe (a list), guidance_scale, scheduler, resolution, iterations, reuse, vae, model: see `eval_models`
    is_images: bool = False


class Settings(NamedTuple):
    """How to measure, as far as the protocol does not say."""

    batch_size: int
    latency_repeats: int  # 0: measure no cost
    dtype: str
    allow_tf32: bool
    compile: bool
    negative_prompt: str | None
    pattern: str | None  # which files of a folder of images
    shown: int  # samples to show of each row
    nfe_given: bool  # whether the protocol's budgets were asked for


class Session(NamedTuple):
    """What all measurements of a run share."""

    settings: Settings
    protocol: protocols.Protocol
    instruments: eval_measures.Instruments
    prompts: list | None
    state: Any  # accelerate's PartialState
    output: Path

    def say(self, text):
        """Print a line, once."""
        if self.state.is_main_process:
            print(text, flush=True)

    def progress(self, total, text):
        """A progress bar in images."""
        return tqdm(total=total, desc=text, unit="image", leave=False, dynamic_ncols=True, disable=not self.state.is_main_process)


class Found(NamedTuple):
    """What measuring an entry gave, by network calls as text, or under "images"."""

    figures: dict  # rows of figures
    details: dict  # all statistics of the scores of images
    shown: dict  # the first few images, `PIL.Image`s
    facts: dict  # for the report
    captions: list  # of the first few images
    target: tuple | None = None  # (files, conditions) of all images at the most calls


def budgets(entry, model, protocol, asked):
    """Network calls one after the other at which a model is measured; None: its own default. `asked`: see `Settings.nfe_given`."""
    if "nfe" in entry.keys:
        return entry.keys["nfe"]
    if model.fixed_nfe:
        return [model.fixed_nfe]
    if model.few_steps and not asked:
        return [count for count in protocol.nfe if count <= FEW] or [4]
    return protocol.nfe or [None]


def calls(nfe):
    """A number of network calls in words."""
    return f"{nfe} call{'s' * (nfe != 1)}"


def best_scheduler(model, session, nfe, how):
    """The name of the scheduler that agrees best with the captions at `nfe` calls, chosen on images of another seed.

    By the main process, for all.
    """
    scores, protocol, size = {}, session.protocol, session.settings.batch_size
    if session.state.is_main_process:
        labels = builtin_protocol.wanted_labels(protocol.samples, protocol.seeds)
        captions = builtin_protocol.captions_of(labels)
        first = protocol.first_seed + protocol.seeds * protocol.samples
        seeds = list(range(first, first + len(captions)))
        with session.progress(len(eval_models.CHOICES) * len(captions), f"choosing a scheduler for {calls(nfe)}") as bar:
            for name in eval_models.CHOICES:
                plan, drawn = eval_models.plan(model, nfe, scheduler=name, **how), []
                for row in range(0, len(captions), size):
                    drawn.append(plan.draw(captions[row : row + size], seeds[row : row + size]))
                    bar.update(len(drawn[-1]))
                images = torch.from_numpy(np.concatenate(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
                scores[name] = scorers.prompt_agreement(session.instruments.oracle, images, *labels)["all"]
    chosen = [max(scores, key=scores.get, default=None)]
    return broadcast_object_list(chosen)[0]


def plans_of(entry, model, session, choose):
    """The `eval_models.Plan`s at which an entry is measured; budgets that its scheduler cannot meet are said and left out."""
    protocol, settings, keys, plans = session.protocol, session.settings, entry.keys, []
    guidance = None if model.few_steps or model.kind == "epd" or model.takes is None else protocol.guidance_scale
    how = {"guidance_scale": keys.get("guidance_scale", guidance), "resolution": keys.get("resolution", protocol.resolution),
           "iterations": keys.get("iterations"), "reuse": keys.get("reuse"),
           "negative_prompt": settings.negative_prompt}  # fmt: skip
    wanted, reason = budgets(entry, model, protocol, settings.nfe_given), None
    for nfe in wanted:
        name = keys.get("scheduler", None if model.few_steps or model.kind != "pipeline" else protocol.scheduler)
        if name == "best":
            if session.instruments.oracle is None or protocol.conditions != "handwriting":
                raise UserError("scheduler=best is chosen by the oracle of --protocol builtin alone.")
            few = choose and nfe and nfe < BEST_BELOW
            name = best_scheduler(model, session, nfe, how) if few else None
        try:
            plans.append(eval_models.plan(model, nfe, scheduler=name, **how))
        except UserError as error:
            reason = error
            if choose and len(wanted) > 1:
                session.say(f"{entry.name}: left out: {error}")
    if not plans:
        raise reason
    return plans


def open_model(entry, session, device, choose=True):
    """(`eval_models.Model`, `eval_drawing.Wanted`, its plans) of an entry. UserError that names it.

    Args: `choose`: False to find mistakes alone: no scheduler is chosen by drawing with it.
    """
    protocol, dtype = session.protocol, sd_models.DTYPES[session.settings.dtype]
    try:
        model = eval_models.load(entry.source, device, dtype, vae=entry.keys.get("vae"), model=entry.keys.get("model"))
        asked = eval_drawing.wanted(protocol, model.takes, model.classes, session.prompts)
        eval_measures.check_count(protocol.metrics, session.instruments, protocol.samples if asked.labels else len(asked.seeds))
        eval_measures.check_prompts(protocol.metrics, model.takes == "prompts")
        return model, asked, plans_of(entry, model, session, choose)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{entry.name}:") else f"{entry.name}: {text}") from None


def measure_model(entry, session, target=None, is_target=False):
    """The `Found` of a model at all its budgets, the most calls first.

    Args: `target`: `Found.target` of the model to compare with, noise by noise, or None; `is_target`: this is that model.
    """
    settings, protocol, is_main = session.settings, session.protocol, session.state.is_main_process
    held = torch.cuda.memory_allocated() if session.state.device.type == "cuda" else 0
    model, asked, plans = open_model(entry, session, session.state.device)
    if settings.compile:
        model.network.compile()
    facts = {"source": entry.source, "kind": model.kind, "weights": model.digest, "plans": {}}
    found = Found({}, {}, {}, facts, [str(condition) for condition in (asked.conditions or [])[: settings.shown]])
    prompts = asked.conditions if model.takes == "prompts" else None
    for plan in sorted(plans, key=lambda plan: plan.nfe, reverse=True):
        key, words = str(plan.nfe), f"{entry.name}, {calls(plan.nfe)}"
        files = draw(words, folder_of(entry.name, plan.nfe, session), model, plan, asked, session)
        images = eval_measures.open_drawn(files, protocol)
        with session.progress(len(files), f"measuring {words}") as bar:
            row, details, _ = eval_measures.row_of(images, protocol.metrics, session.instruments, protocol, prompts, asked.labels,
                                                   settings.batch_size, session.state, bar.update)  # fmt: skip
        row |= {"nfe": plan.nfe, "parameters": sum(parameter.numel() for parameter in model.network.parameters())}
        if is_main and target:
            eval_measures.add(row, compared(images, asked.conditions, target, protocol))
        elif is_target:
            target = (files, asked.conditions)
        if is_main and settings.latency_repeats:
            eval_measures.add(row, sampling_cost.measure(model, plan, asked.conditions, asked.seeds, settings.batch_size,
                                                         settings.latency_repeats, held_before=held))  # fmt: skip
        session.state.wait_for_everyone()
        row |= {name: plan.facts[name] for name in ("scheduler", "guidance_scale") if plan.facts.get(name) is not None}
        found.figures[key], found.details[key], facts["plans"][key] = row, details, plan.facts
        found.shown[key] = shown(images, settings.shown)
        session.say(f"{words}: {summary(row)}")
    return found._replace(target=target if is_target else None)


def compared(images, conditions, target, protocol):
    """A row with the distance to the images of `target` (see `Found`); an empty one where they cannot be compared."""
    files, others_conditions = target
    others = eval_measures.open_drawn(files, protocol)
    if others.size != images.size or others_conditions != conditions or len(others) != len(images):
        return {}
    return {"psnr_to_teacher": eval_measures.psnr_between(images, others)}  # None where they are equal


def slug(name):
    """A name as that of a folder."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


def folder_of(name, nfe, session):
    """Where the images of an entry are kept."""
    return session.output / "images" / f"{slug(name)}-nfe{nfe}"


def draw(words, folder, model, plan, asked, session):
    """Draw what is not in `folder` yet; the files of all images. Args: `words`: what is drawn, for messages."""
    settings, protocol = session.settings, session.protocol
    made_with = {"weights": model.digest, "dtype": settings.dtype, "allow_tf32": settings.allow_tf32, "jpeg": protocol.jpeg,
                 **plan.facts}  # fmt: skip
    if eval_drawing.prepare(folder, made_with, asked, session.state):
        session.say(f"{words}: {folder} held images of other settings or captions; they are drawn anew.")
    files = eval_drawing.files_of(folder, protocol, asked.seeds)
    there = sum(file.exists() for file in files)
    if there:
        session.say(f"{words}: {there:,} of {len(files):,} images are there already.")
    session.state.wait_for_everyone()
    with session.progress(len(files), f"drawing {words}") as bar:
        eval_drawing.draw(plan, asked, files, settings.batch_size, session.state, protocol.jpeg, bar.update)
    return files


def shown(images, count):
    """The first `count` readable images of an `image_sets.ImageSet`, as `PIL.Image`s."""
    _, values = next(images.batches(count))
    return [Image.fromarray(value) for value in values]


def open_images(entry, session):
    """The `image_sets.ImageSet` of finished images. UserError, also where captions do not fit them."""
    protocol, prompts = session.protocol, session.prompts
    images = image_sets.open_images(entry.source, session.settings.pattern, resize=protocol.measured_at,
                                    resize_filter=protocol.resize_filter)  # fmt: skip
    if prompts is not None and len(prompts) != len(images):
        raise UserError(f"{entry.name}: {len(images):,} images and {len(prompts):,} captions: image i, by the order of paths, "
                        "belongs to caption i, so there must be as many.")  # fmt: skip
    eval_measures.check_count(protocol.metrics, session.instruments, len(images))
    eval_measures.check_prompts(protocol.metrics, prompts is not None)
    return images


def measure_images(entry, images, session):
    """The `Found` of an `image_sets.ImageSet`. UserError."""
    settings, protocol, prompts, labels = session.settings, session.protocol, session.prompts, None
    if protocol.conditions == "handwriting" and prompts is not None:
        try:
            labels = [torch.tensor([handwriting.parse_caption(text) for text in prompts]).unbind(1)]
        except ValueError as error:
            raise UserError(f"--prompt_file: {error}") from None
    metrics = tuple(name for name in protocol.metrics if name != "agreement" or labels)
    with session.progress(len(images), f"measuring {entry.name}") as bar:
        row, details, missing = eval_measures.row_of(images, metrics, session.instruments, protocol._replace(seeds=1), prompts,
                                                     labels, settings.batch_size, session.state, bar.update)  # fmt: skip
    session.say(f"{entry.name}, {row['images']:,} images: {summary(row)}")
    if missing:
        session.say(f"warning: {entry.name}: {len(missing):,} of {len(images):,} images are unreadable: {', '.join(missing[:3])}")
    facts = {"source": entry.source, "kind": "images", "unreadable": missing[:100]}
    captions = (prompts or [])[: settings.shown]
    return Found({"images": row}, {"images": details}, {"images": shown(images, settings.shown)}, facts, captions)


def summary(row):
    """A row in a line: its quality and times."""
    names = [name for name in report.columns_of({"": {"": row}}) if name not in report.MINOR]
    names = [name for name in names if isinstance(row[name], (int, float))]
    return "  ".join(f"{name} {row[name]:{report.COLUMNS.get(name, report.OTHER)}}" for name in names)
