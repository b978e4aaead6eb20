#!/usr/bin/env python
"""Measure models and finished images by one protocol: quality, network calls, latency, size, in a table and a report.

Every model draws for the same prompts from the same seeds. Images are kept in OUTPUT_DIR/images: a stopped run goes on where
it was, and any number of processes gives the same figures.
"""

import argparse
import datetime
import json
import os
import re
import time
from pathlib import Path

from brisk import options, protocols

ROOT = Path(__file__).resolve().parent
KEYS = {"nfe": None, "guidance_scale": float, "scheduler": str, "resolution": int, "iterations": int,
        "reuse": options.boolean, "vae": str, "model": str}  # fmt: skip


def parse_args(argv=None):
    """(namespace, `protocols.Protocol`, fields changed by flags); see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument_group("what to measure").add_argument
    add("--model", action="append", default=[], metavar="[NAME=]SOURCE[,KEY=VALUE]",
        help="pipeline (folder or hub id), run of FPDM, predictor of EPD, or a checkpoint of any run; "
        f"keys: {', '.join(KEYS)}; several nfe as in nfe=4/2/1")  # fmt: skip
    add("--teacher", metavar="SOURCE[,KEY=VALUE]",
        help="the model whose images others are compared with, noise by noise; of builtin the teacher that comes with "
        "brisk, with the best of five schedulers at few calls; none: none")  # fmt: skip
    add("--images", action="append", default=[], metavar="[NAME=]FOLDER|FILE.npz", help="finished images")
    add("--pattern", help="which files in a folder of images, as **/*.png")
    add("--watch", metavar="RUN[,KEY=VALUE]", help="measure every finished checkpoint of a training run once, as they come")
    add("--watch_interval", type=options.POSITIVE, default=30, help="seconds between two looks at it")
    add("--watch_timeout", type=options.NOT_NEGATIVE, help="stop after so many seconds without a new one; default never")
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--protocol", default="builtin", help=f"preset of all that decides a figure: {', '.join(protocols.PROTOCOLS)}")
    add("--list_protocols", action=Listing, nargs=0, default=argparse.SUPPRESS, help="print the protocols and stop")
    add("--metrics", help=f"what to report: {', '.join(protocols.METRICS)}, module:function; default: the protocol's; none")
    add("--nfe", nargs="+", help="sampling budgets: network calls one after the other, as in 1 2 4 8")
    add("--samples", type=options.COUNT, help="images of a set")
    add("--seeds", type=options.COUNT, help="number of sets; the spread over them is reported")
    add("--first_seed", type=options.COUNT_OR_ZERO, help="seed of the first image")
    add("--prompt_file", help="captions: one a line, or a table with a column text, prompt or caption; one per image")
    add("--negative_prompt", help="what models of captions are guided away from")
    add("--guidance_scale", type=options.NOT_NEGATIVE, help="guidance; models distilled to few steps have none")
    add("--resolution", type=options.COUNT, help="px at which models draw")
    add("--resize", type=options.COUNT, help="px to which all images are resized before they are measured")
    add("--resize_filter", choices=("bicubic", "bilinear", "lanczos", "box", "nearest"), help="of --resize, by Pillow")
    add("--reference", help="real images (folder or npz), or an npz of their statistics mu and sigma")
    add("--save_reference", metavar="FILE.npz", help="keep the reference's statistics and features for other runs")
    add("--extractor", choices=("inception", "torchscript"), help="whose features distances are in")
    options.add_flag(how, "--clean_resize", "resize to the extractor's 299 px by Pillow, as clean-fid does", None)
    add("--weights", action="append", default=[], metavar="HEAD=FILE",
        help="weights of inception, torchscript, or of a reward (hps, pickscore, imagereward, clip, aesthetic, mps)")
    group = parser.add_argument_group("cost and speed")
    add = group.add_argument
    add("--batch_size", type=options.COUNT, default=50, help="images at a time, per process")
    add("--latency_repeats", type=options.COUNT_OR_ZERO, default=5, help="timed repeats; 0: measure no cost")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of the models")
    options.add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs")
    options.add_flag(group, "--compile", "torch.compile the networks")
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="folder for report.json, .csv, .html, .png and the images")
    add("--shown", type=options.COUNT, default=8, help="samples per row of the picture")
    args, given = options.parse(parser, argv)
    changes = {"samples": args.samples, "seeds": args.seeds, "first_seed": args.first_seed, "resolution": args.resolution,
               "measured_at": args.resize, "resize_filter": args.resize_filter, "guidance_scale": args.guidance_scale,
               "extractor": args.extractor, "clean": args.clean_resize,
               "nfe": args.nfe and tuple(read_nfe(args.nfe))}  # fmt: skip
    if args.metrics is not None:
        changes["metrics"] = () if args.metrics == "none" else protocols.read_metrics(args.metrics)
    protocol, changed = protocols.resolve(args.protocol, **changes)
    without = {"pattern": (args.images, "--images"), "watch_interval": (args.watch, "--watch"),
               "watch_timeout": (args.watch, "--watch"), "save_reference": (args.reference, "--reference"),
               "resize_filter": (protocol.measured_at, "--resize")}  # fmt: skip
    for sentence in options.without_effect(given, without):
        print(sentence)
    return args, protocol, changed


class Listing(argparse.Action):
    """--list_protocols: print and stop."""

    def __call__(self, parser, *rest):
        print(protocols.listing())
        parser.exit()


def read_nfe(words):
    """The budgets of a list of words. UserError."""
    return options.read_counts("--nfe", ",".join(part for word in words for part in re.split(r"[,\s]+", word) if part))


def read_entry(text, flag, name=None):
    """The `eval_run.Entry` of [NAME=]SOURCE[,KEY=VALUE...]. UserError."""
    from brisk import eval_run

    first, *rest = text.split(",")
    given, equals, source = first.partition("=")
    if not equals or "/" in given:
        given, source = None, first
    keys = {}
    for part in rest:
        key, _, value = part.partition("=")
        if key not in KEYS or not value:
            raise options.UserError(f"{flag} '{text}': '{part}' is not KEY=VALUE with KEY one of {', '.join(KEYS)}.")
        try:
            keys[key] = [options.COUNT(count) for count in value.split("/")] if key == "nfe" else KEYS[key](value)
        except (ValueError, argparse.ArgumentTypeError):
            raise options.UserError(f"{flag} '{text}': {key} cannot have the value {value}"
                                     f"{', only numbers from 1 like 4 or 4/2/1' * (key == 'nfe')}.") from None  # fmt: skip
    if not source:
        raise options.UserError(f"{flag} '{text}' names no source: write [NAME=]SOURCE.")
    return eval_run.Entry(given or name or default_name(source), source, keys, flag == "--images")


def default_name(source):
    """The name of a source that was given none: its last part, of a checkpoint with the run's."""
    path = Path(source)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        return f"{path.absolute().parent.name}/{path.name}"
    return (path.stem if path.is_file() else path.name) or source


def read_entries(args):
    """(the teacher's `Entry` or None, [other entries]). UserError for bad names and for sources that are not there."""
    from brisk import eval_run, report

    own = os.path.relpath(ROOT / "assets/tiny-teacher")  # as it is written into the report
    teacher = args.teacher or (own if args.protocol == "builtin" and not args.images and not args.watch else "none")
    teacher = None if teacher == "none" else read_entry(teacher, "--teacher", "teacher")
    if teacher and args.protocol == "builtin":
        teacher.keys.setdefault("scheduler", "best")
    entries = [read_entry(text, "--model") for text in args.model] + [read_entry(text, "--images") for text in args.images]
    names = [entry.name for entry in ([teacher] if teacher else []) + entries]
    folders = [eval_run.slug(name) for name in names]
    for name in names:
        if folders.count(eval_run.slug(name)) > 1:
            raise options.UserError(f"two models are called {name}: give them names, as in --model NAME=SOURCE.")
        if name in report.RESERVED:
            raise options.UserError(f"--model {name}: the report uses this name for something else; give another.")
    if not names and not args.watch:
        raise options.UserError("nothing to measure: give --model, --images, --teacher or --watch.")
    watched = [read_entry(args.watch, "--watch")] if args.watch else []
    if watched and not Path(watched[0].source).is_dir():
        raise options.UserError(f"--watch {watched[0].source} is no folder.")
    for entry in [*([teacher] if teacher else []), *entries]:
        is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", entry.source) and not entry.is_images
        if not Path(entry.source).exists() and not is_hub_id:
            raise options.UserError(f"{entry.name}: '{entry.source}' is neither a file nor a folder.")
    return teacher, entries


def missing_files(args, protocol, weights):
    """What the protocol needs and was not given: [what, with its flag and where to get it]."""
    from brisk import feature_extractors

    missing, distances = [], {"fid", "frechet", "kid", "pr", "is"} & set(protocol.metrics)
    if protocol.extractor == "inception" and distances and "inception" not in weights:
        missing.append(f"the Inception network (--weights inception=FILE, {feature_extractors.INCEPTION_URL})")
    if protocol.extractor != "handwriting" and distances - {"is"} and not args.reference:
        missing.append(f"the reference (--reference, {protocol.reference or 'real images or their statistics'})")
    if protocol.prompts and (args.model or args.teacher or args.watch) and not args.prompt_file:
        missing.append(f"captions (--prompt_file, {protocol.prompts})")
    return missing


def open_session(args, protocol, state):
    """The `eval_run.Session` of the flags: weights, reference and captions are read now. UserError."""
    from brisk import epd_options, eval_measures, eval_run, image_metrics

    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise options.UserError(f"--output_dir {output} cannot be made: {error.strerror}.") from None
    weights = eval_measures.reward_settings(args.weights)
    missing = missing_files(args, protocol, weights)
    if missing:
        raise options.UserError(f"--protocol {args.protocol} needs {', and '.join(missing)}; or give other --metrics.")
    prompts = epd_options.read_prompts(None, args.prompt_file, "--prompt_file")
    if protocol.samples is None and (args.model or args.teacher or args.watch):
        if prompts is None:
            raise options.UserError(f"--protocol {args.protocol} needs --samples, the number of images, or --prompt_file.")
        protocol = protocol._replace(samples=len(prompts))
    instruments = eval_measures.load(protocol.metrics, protocol, weights, args.reference, args.batch_size, state)
    if args.save_reference and state.is_main_process:
        image_metrics.save_statistics(instruments.reference, args.save_reference)
    settings = eval_run.Settings(args.batch_size, args.latency_repeats, args.dtype, args.allow_tf32, args.compile,
                                 args.negative_prompt, args.pattern, args.shown, args.nfe is not None)  # fmt: skip
    return eval_run.Session(settings, protocol, instruments, prompts, state, output)


def record_of(args, session, changed):
    """What decides the figures, for the report."""
    protocol, instruments = session.protocol, session.instruments
    extractor, reference = instruments.extractor, instruments.reference
    conditions = {"classes": "classes in turn", "handwriting": "captions in an order drawn from the set's number"}
    record = {**protocol._asdict(), "changed_by_flags": changed, "class_balance": conditions.get(protocol.conditions),
              "extractor_weights": extractor and extractor.digest, "reference_used": reference and reference.source,
              "reference_images": reference and reference.count, "reference_digest": reference and reference.digest,
              "weights": args.weights, "teacher": args.teacher, "prompt_file": args.prompt_file,
              "negative_prompt": args.negative_prompt, "pattern": args.pattern, "watched": args.watch,
              "dtype": args.dtype, "allow_tf32": args.allow_tf32, "compile": args.compile, "batch_size": args.batch_size,
              "latency_repeats": args.latency_repeats, "processes": session.state.num_processes}  # fmt: skip
    return {"protocol": args.protocol, "record": record}


def notes_of(args, session, found):
    """Sentences that say what was measured and what the columns of the table are; the second is a warning, or empty."""
    protocol, preset = session.protocol, protocols.PROTOCOLS[args.protocol]
    rows = [row for one in found.values() for row in one.figures.values()]
    notes, reference, fewest = [protocol.text, ""], session.instruments.reference, min(row["images"] for row in rows)
    size = len(reference.mean) if reference else 0
    enough = preset.samples * preset.seeds if preset.samples else 10 * size
    if size and fewest < enough:
        should = "the protocol has" if preset.samples else "there should be"
        notes[1] = (f"Warning: {fewest:,} images where {should} {enough:,}: distances in {size:,} dimensions are biased upwards, "
                    "and compare with nothing but rows of as many images.")  # fmt: skip
    if protocol.extractor == "handwriting":
        notes.append("agreement: share of images in which a classifier reads the digit and the colours that were asked for (all: "
                     "in everything). frechet: distance to held-out real images in the classifier's features.")  # fmt: skip
    most = max((int(nfe) for one in found.values() if one.target for nfe in one.figures), default=None)
    if most and any("psnr_to_teacher" in row for row in rows):
        notes.append(f"psnr to teacher: peak signal-to-noise ratio in dB to the teacher's images of {most} calls, from the "
                     "same noise.")  # fmt: skip
    notes.append("±: standard deviation over sets of seeds; of kid and inception score over subsets; of times over repeats; of "
                 "mean scores the standard error.")  # fmt: skip
    if any("total_nfe" in row for row in rows):
        notes.append("nfe: network calls one after the other. total nfe: images through the network for an image, two for a guided "
                     "call. seconds alone: an image at batch 1; seconds per image: in full batches; medians of whole pipeline "
                     "calls, text encoder and decoder included. gmacs per image: billions of multiply-accumulates in the "
                     "network.")  # fmt: skip
    return notes


def write(args, session, changed, found):
    """Write the report of {name: `eval_run.Found`}; returns its table."""
    from brisk import report, runlog

    figures = {name: one.figures for name, one in found.items()}
    captions = next((one.captions for one in found.values() if one.captions), [])
    facts = {**record_of(args, session, changed), "models": {name: one.facts for name, one in found.items()},
             "scores": {name: one.details for name, one in found.items() if any(one.details.values())},
             "captions": captions, "environment": runlog.environment()}  # fmt: skip
    samples = {(name, nfe): images for name, one in found.items() for nfe, images in one.shown.items()}
    notes = notes_of(args, session, found)
    title = f"brisk: {args.protocol}" + " (fewer images than it asks for)" * bool(notes[1])
    table = report.write_report(session.output, title, figures, facts, [note for note in notes if note], samples, captions)
    return f"{table}\n\n{notes[1]}".rstrip()


def finished(run, known):
    """The finished checkpoints of a run that are not `known`, by their steps: [folder]."""
    from brisk import checkpoint

    folders = [folder for folder in Path(run).glob("checkpoint-*") if checkpoint.step_of(folder) is not None]
    folders = [folder for folder in folders if folder.name not in known and checkpoint.damage(folder) is None]
    return sorted(folders, key=checkpoint.step_of)


def restore(session, run, record):
    """{name: `eval_run.Found`} of the checkpoints that an earlier watch of `run` measured under the same record; {} if none."""
    from PIL import Image

    from brisk import checkpoint, eval_run, image_folder

    before, found = image_folder.read_json(session.output / "report.json"), {}
    now = json.loads(json.dumps(record["record"]))
    if {**before.get("record", {}), "processes": None} != {**now, "processes": None}:
        return found
    for name, facts in before.get("models", {}).items():
        if checkpoint.step_of(name) is None or Path(facts["source"]).parent != run:
            continue
        files = {nfe: sorted(eval_run.folder_of(name, nfe, session).glob("[0-9]*/[0-9]*.*")) for nfe in before[name]}
        pictures = {nfe: [Image.open(file) for file in own[: session.settings.shown]] for nfe, own in files.items()}
        found[name] = eval_run.Found(before[name], before.get("scores", {}).get(name, {}), pictures, facts, before["captions"])
    return found


def say_replaced(args, session, changed, entries):
    """Print which models of an earlier report in --output_dir the report of `entries` will not have."""
    from brisk import image_folder

    kept = {entry.name for entry in entries}
    if args.watch:
        kept |= restore(session, Path(read_entry(args.watch, "--watch").source), record_of(args, session, changed)).keys()
    lost = [name for name in image_folder.read_json(session.output / "report.json").get("models", {}) if name not in kept]
    if lost:
        session.say(f"{session.output}/report.json holds the figures of {', '.join(lost)}: the new report replaces it.")


def measure_checkpoint(entry, session, target):
    """(`eval_run.Found` or None, why not): all processes agree, also where one finds the checkpoint gone meanwhile."""
    from accelerate.utils import gather_object

    from brisk import checkpoint, eval_run

    problem = None
    try:
        eval_run.open_model(entry, session, "cpu", choose=False)
    except Exception as error:  # of a file that was pruned while it was read, the libraries raise their own
        if not isinstance(error, options.UserError) and checkpoint.damage(entry.source) is None:
            raise
        problem = str(error)
    problems = [one for one in gather_object([problem]) if one]
    return (None, problems[0]) if problems else (eval_run.measure_model(entry, session, target), None)


def watch(args, session, changed, found, target):
    """Measure every finished checkpoint of --watch once, the report anew after each, until none has come for --watch_timeout."""
    from accelerate.utils import broadcast_object_list

    wanted, last, left_out = read_entry(args.watch, "--watch"), time.monotonic(), {}
    found = restore(session, Path(wanted.source), record_of(args, session, changed)) | found
    if found and session.state.is_main_process:
        print(f"\n{write(args, session, changed, found)}\n", flush=True)
    session.say(f"Watching {wanted.source} for checkpoints; Ctrl-C ends it, {session.output} is whole after each.")
    while True:
        late = args.watch_timeout is not None and time.monotonic() - last >= args.watch_timeout
        news = [finished(wanted.source, {*found, *left_out}), late]
        folders, late = broadcast_object_list(news)  # the main process decides
        for folder in folders:
            one, problem = measure_checkpoint(wanted._replace(name=folder.name, source=str(folder)), session, target)
            if one is None:
                session.say(f"Left out: {problem}")
                left_out[folder.name] = problem
                continue
            found[folder.name], last = one, time.monotonic()
            if session.state.is_main_process:
                print(f"\n{write(args, session, changed, found)}\n", flush=True)
        if late and not folders:
            if not found:
                reason = next(iter(left_out.values()), f"no finished checkpoint came within {args.watch_timeout:g} s")
                raise options.UserError(f"--watch {wanted.source}: nothing was measured: {reason}")
            return
        if not folders:
            time.sleep(args.watch_interval if args.watch_timeout is None else min(args.watch_interval, args.watch_timeout))


def measure_all(args, session, changed, teacher, entries):
    """Every entry in turn, then the checkpoints of --watch; the report."""
    from brisk import eval_run

    # mistakes are said before hours of work: every model is loaded for a moment
    images = {entry.name: eval_run.open_images(entry, session) for entry in entries if entry.is_images}
    models = [entry for entry in ([teacher] if teacher else []) + entries if not entry.is_images]
    for entry in models if len(models) > 1 or args.watch else []:
        eval_run.open_model(entry, session, "cpu", choose=False)
    found, target = {}, None
    if teacher:
        found[teacher.name] = eval_run.measure_model(teacher, session, is_target=True)
        target = found[teacher.name].target
    for entry in entries:
        if entry.is_images:
            found[entry.name] = eval_run.measure_images(entry, images[entry.name], session)
        else:
            found[entry.name] = eval_run.measure_model(entry, session, target)
    if args.watch:
        watch(args, session, changed, found, target)
    elif session.state.is_main_process:
        print(f"\n{write(args, session, changed, found)}\n\n{session.output}/report.html  report.png  report.json  report.csv")


def main(argv=None):
    args, protocol, changed = parse_args(argv)
    teacher, entries = read_entries(args)
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from brisk import runlog

    runlog.quiet_libraries()
    runlog.allow_fast_maths(args.allow_tf32)
    # the others wait while the first measures times
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=datetime.timedelta(days=1))
    runlog.check_processes(state)
    session = open_session(args, protocol, state)
    say_replaced(args, session, changed, [*([teacher] if teacher else []), *entries])
    try:
        measure_all(args, session, changed, teacher, entries)
    except KeyboardInterrupt:
        session.say("Images that were drawn are kept: the same command goes on with them.")
        raise
    except torch.OutOfMemoryError:
        raise options.UserError(f"the device ran out of memory at --batch_size {args.batch_size}: give a smaller one; images that "
                                "were drawn are kept.", 1) from None  # fmt: skip
    state.wait_for_everyone()


if __name__ == "__main__":
    options.run(main)
