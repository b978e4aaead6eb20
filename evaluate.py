#!/usr/bin/env python
"""Measure pipelines side by side: prompt agreement, Frechet distance, size, seconds per image, network evaluations.

Protocol `builtin`: the handwriting set. Every model draws the same captions from the same noise seeds; the oracle reads
digit and colours off the images; the Frechet distance in its features is to held-out real images.
"""

import statistics
import time
from pathlib import Path

from brisk import options

ROOT = Path(__file__).resolve().parent
RESERVED = {"teacher", "protocol", "samples_per_seed", "seeds", "guidance_scale", "batch_size", "environment"}
SHOWN = ((7, 2, 5), (3, 1, 0), (0, 4, 1), (5, 5, 4), (8, 7, 3), (2, 6, 7), (9, 3, 6), (4, 0, 2))


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--protocol", choices=("builtin",), default="builtin", help="what to draw and what to compare with")
    add(
        "--teacher",
        default=str(ROOT / "assets/tiny-teacher"),
        help="pipeline sampled with guidance by its best scheduler",
    )
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="pipeline distilled to few steps, sampled without guidance",
    )
    add(
        "--student",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="pipeline with a smaller U-Net, sampled as the teacher is and compared with it image by image",
    )
    add("--oracle", default=str(ROOT / "assets/handwriting-oracle"), help="the classifier that reads the images")
    add("--output_dir", required=True, help="folder for report.json, report.png and report.html")
    add("--teacher_steps", default="50,4,2,1", help="sampling steps of the teacher")
    add("--model_steps", default="4,2,1", help="sampling steps of the distilled models")
    add("--guidance_scale", type=options.NOT_NEGATIVE, default=2.0, help="guidance of the teacher")
    add("--samples", type=options.number(int, low=50), default=200, help="images per seed")
    add("--seeds", type=options.COUNT, default=3, help="number of seeds; the spread over them is reported")
    add("--batch_size", type=options.COUNT, default=200, help="images per pipeline call")
    args, _ = options.parse(parser, argv)
    args.model, args.student = (dict(entry.partition("=")[::2] for entry in given) for given in (args.model, args.student))
    taken = [*args.model, *args.student]
    if RESERVED & set(taken) or len(set(taken)) < len(taken):
        reserved = ", ".join(sorted(RESERVED))
        raise options.UserError(f"--model and --student need names of their own, and none of {reserved}: the report uses these.")
    for name, folder in {"teacher": args.teacher, **args.model, **args.student}.items():
        if not (Path(folder) / "model_index.json").is_file():
            raise options.UserError(
                f"{name}: '{folder}' is not a pipeline folder (NAME=FOLDER, with model_index.json)."
            )
    return args


def load_pipeline(folder):
    """A pipeline in float32 on the best device, silent."""
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def schedulers(config):
    """The standard samplers that a teacher of few steps is given the choice of: {name: scheduler}."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

    trailing = {"timestep_spacing": "trailing"}
    return {
        "DDIM": DDIMScheduler.from_config(config),
        "DDIM trailing": DDIMScheduler.from_config(config, **trailing),
        "DPM-Solver++ 2M": DPMSolverMultistepScheduler.from_config(config, **trailing),
        "Euler": EulerDiscreteScheduler.from_config(config, **trailing),
        "UniPC": UniPCMultistepScheduler.from_config(config, **trailing),
    }


def wanted_labels(count, seed):
    """(digits, foregrounds, backgrounds), each (count,): all 560 captions in an order drawn from `seed`, repeated."""
    import torch

    from brisk.handwriting import COLOURS

    n = len(COLOURS)
    every = torch.tensor([(d, f, b) for d in range(10) for f in range(n) for b in range(n) if f != b])
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order.repeat(count // len(every) + 1)[:count]].unbind(1)


def draw(pipeline, labels, steps, guidance_scale, seed, batch_size, progress=None):
    """(images (N, 3, 32, 32) in [-1, 1], seconds per image, U-Net evaluations per image) for the labels' captions."""
    import torch

    from brisk.handwriting import caption

    captions = [caption(*item) for item in zip(*(column.tolist() for column in labels), strict=True)]
    generator, rows = torch.Generator(pipeline.device).manual_seed(seed), []
    counter = pipeline.unet.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    started, images = time.perf_counter(), []
    try:
        for first in range(0, len(captions), batch_size):
            chunk = captions[first : first + batch_size]
            images.append(pipeline(chunk, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator,
                                   output_type="pt").images.cpu() * 2 - 1)  # fmt: skip
            if progress is not None:
                progress.update(len(chunk))
    finally:
        counter.remove()
    seconds = time.perf_counter() - started
    return torch.cat(images), seconds / len(captions), sum(rows) / len(captions)


def summarise(by_seed, features, reference):
    """Means over seeds of figures [{name: value}], their spread, and the Frechet distance of all seeds' images together."""
    import torch

    from brisk.metrics import frechet_distance

    row = {name: statistics.mean(figures[name] for figures in by_seed) for name in by_seed[0]}
    row["frechet"] = frechet_distance(torch.cat(features), reference)
    if len(by_seed) > 1:
        row["spread"] = {name: statistics.stdev(figures[name] for figures in by_seed) for name in by_seed[0]}
    return row


def measure(pipeline, oracle, reference, steps, guidance_scale, args, progress, teacher_images=None):
    """(one measurement M over all seeds, with the spread (standard deviation) over them; the images of each seed).

    With `teacher_images`, what the teacher drew from the same noise, M has the distance to them.
    """
    from brisk import macs
    from brisk.metrics import frechet_distance, psnr
    from brisk.scorers import prompt_agreement

    by_seed, features, seconds, drawn = [], [], [], []
    for seed in range(args.seeds):
        labels = wanted_labels(args.samples, seed)
        images, took, calls = draw(pipeline, labels, steps, guidance_scale, seed, args.batch_size, progress)
        features.append(oracle.features(images))
        seconds.append(took)
        by_seed.append(
            {**prompt_agreement(oracle, images, *labels), "frechet": frechet_distance(features[-1], reference)}
        )
        if teacher_images:
            by_seed[-1]["psnr_to_teacher"] = psnr(images, teacher_images[seed], span=2)
        drawn.append(images)
    row = summarise(by_seed, features, reference)
    config = pipeline.unet.config
    size = macs.unet_size(config, config.sample_size, pipeline.tokenizer.model_max_length)
    row |= {"seconds_per_image": statistics.median(seconds), "network_calls": calls, "parameters": size.parameters,
            "gmacs": size.total / 1e9}  # fmt: skip
    return row, drawn


def best_scheduler(pipeline, oracle, steps, args):
    """(name, scheduler) that agrees best with the prompts at `steps` steps, chosen on images of another seed."""
    from brisk.scorers import prompt_agreement

    labels, scores = wanted_labels(args.samples, args.seeds), {}
    choices = schedulers(pipeline.scheduler.config)
    for name, scheduler in choices.items():
        pipeline.scheduler = scheduler
        images, _, _ = draw(pipeline, labels, steps, args.guidance_scale, args.seeds, args.batch_size)
        scores[name] = prompt_agreement(oracle, images, *labels)["all"]
    best = max(scores, key=scores.get)
    return best, choices[best]


def show(pipeline, steps, guidance_scale):
    """PIL images of the captions in `SHOWN`."""
    import torch

    labels = torch.tensor(SHOWN).unbind(1)
    images, _, _ = draw(pipeline, labels, steps, guidance_scale, 12345, len(SHOWN))
    return pipeline.image_processor.postprocess(images, output_type="pil")


def main(argv=None):
    args = parse_args(argv)
    teacher_steps = options.read_counts("--teacher_steps", args.teacher_steps)
    model_steps = options.read_counts("--model_steps", args.model_steps)
    from tqdm import tqdm

    from brisk import handwriting, report, runlog, scorers

    runlog.quiet_libraries()
    try:
        oracle = scorers.load_oracle(args.oracle)
    except FileNotFoundError as error:
        raise options.UserError(f"--oracle: {error}") from None
    held_out = handwriting.draw("test", 2000, seed=0)["images"]
    reference = oracle.features(held_out)
    figures, pictures = {name: {} for name in ("teacher", *args.student)}, {}
    rows = len(teacher_steps) * (1 + len(args.student)) + len(model_steps) * len(args.model)
    progress = tqdm(total=rows * args.samples * args.seeds, desc="measuring", unit="image", dynamic_ncols=True)
    teacher = load_pipeline(args.teacher)
    own, students = teacher.scheduler, {name: load_pipeline(folder) for name, folder in args.student.items()}
    for steps in teacher_steps:
        name, teacher.scheduler = type(own).__name__.removesuffix("Scheduler"), own
        if steps < 20:
            name, teacher.scheduler = best_scheduler(teacher, oracle, steps, args)
        teacher_images = None
        for key, pipeline in {"teacher": teacher, **students}.items():
            pipeline.scheduler = teacher.scheduler
            row, images = measure(pipeline, oracle, reference, steps, args.guidance_scale, args, progress, teacher_images)
            teacher_images = teacher_images or images
            figures[key][str(steps)] = {**row, "scheduler": name}
            pictures[key, str(steps)] = show(pipeline, steps, args.guidance_scale)
    for name, folder in args.model.items():
        pipeline, figures[name] = load_pipeline(folder), {}
        for steps in model_steps:
            row, _ = measure(pipeline, oracle, reference, steps, 1.0, args, progress)
            figures[name][str(steps)] = {
                **row,
                "scheduler": type(pipeline.scheduler).__name__.removesuffix("Scheduler"),
            }
            pictures[name, str(steps)] = show(pipeline, steps, 1.0)
    progress.close()
    facts = {"protocol": args.protocol, "samples_per_seed": args.samples, "seeds": args.seeds,
             "guidance_scale": args.guidance_scale, "batch_size": args.batch_size, "reference": "2000 tinted held-out scans",
             "models": {"teacher": args.teacher, **args.student, **args.model}, "environment": runlog.environment()}  # fmt: skip
    notes = [
        "digit, foreground, background, all: share of images in which the oracle reads what the caption asked for. "
        "frechet: distance to held-out real images in the oracle's features. network calls: U-Net evaluations per image, "
        "two per step under guidance. parameters, gmacs: of the U-Net, billions of multiply-accumulates of one call.",
        f"Below 20 steps the teacher uses whichever standard scheduler agreed best on {args.samples} other images.",
    ]
    if args.student:
        notes.append("psnr to teacher: peak signal-to-noise ratio in dB to the teacher's images from the same noise.")
    captions = [handwriting.caption(*labels) for labels in SHOWN]
    table = report.write_report(
        args.output_dir, "brisk: built-in handwriting protocol", figures, facts, notes, pictures, captions,
        "parameters" if args.student and not args.model else "network_calls",
    )  # fmt: skip
    print(f"\n{table}\n\n{args.output_dir}/report.png  report.html  report.json")


if __name__ == "__main__":
    options.run(main)
