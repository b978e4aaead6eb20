#!/usr/bin/env python
"""Time the sampling of networks side by side, random weights: a U-Net and its students, a DiT and FPDM, or EPD and Euler.

One image is all its denoising steps with guidance (the batch doubled), without text encoder and VAE. The rows take turns,
so that a slow moment of the machine hits all of them.
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from bench_step import BATCHES, check_output, check_size, write_json

from brisk import fpdm_options, options
from brisk.sampling_cost import time_once

FAMILY = {"sd": "bk_base,bk_small,bk_tiny",
          "sdxl": "small_sd_xl,tiny_sd_xl,koala_1b,koala_700m,ssd_1b,segmind_vega"}  # fmt: skip
STEPS = {"bksdm": 25, "fpdm": 20, "epd": 10}
SIZES = BATCHES | {"epd": BATCHES["bksdm"]}
COLUMNS = [("s/image", "seconds_per_image", 4), ("min", "min_seconds_per_image", 4), ("max", "max_seconds_per_image", 4),
           ("of first", "ratio_to_first", 3), ("parameters", "parameters", 0), ("GMACs", "gmacs", 4), ("peak GiB", "peak_gib", 2)]
COLUMNS_OF_EPD = [*COLUMNS[:4], ("equal calls", "ratio_to_equal_calls", 3), ("calls", "calls", 0), ("rows", "rows", 0), COLUMNS[-1]]


class Entry(NamedTuple):
    """What one row times."""

    name: str
    network: Any
    call: Callable  # makes a batch of images
    batch_size: int
    figures: dict  # its cost: of a U-Net "gmacs" a call, of a DiT or FPDM "gmacs", "blocks" and "timesteps" an image, of EPD
    #                one after the other "calls", and "rows" through the network an image


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add, sizes = parser.add_argument, tuple(dict.fromkeys(size for method in STEPS for size in SIZES[method]))
    add("--method", choices=tuple(STEPS), default="bksdm", help="U-Nets, DiT and FPDM, or EPD-Solver and Euler on a U-Net")
    add("--size", choices=sizes, default="tiny", help="as in bench_step.py")
    add("--presets", help=f"students separated by commas; default {FAMILY['sd']}, SDXL {FAMILY['sdxl']}")
    add("--plans", help="of FPDM: timesteps x iterations, r for reuse, as in 20x26,40x6r; default: as many MACs as the DiT")
    add("--batch_size", type=options.COUNT, default=1, help="images at a time")
    add("--batch_sizes", help="of epd: several in place of --batch_size, as in 1,2,4,8")
    add("--steps", type=options.COUNT, help="denoising steps per image, of epd intervals; default 25, of the DiT 20, of epd 10")
    add("--num_points", type=options.COUNT, help="of epd: points per interval; default 2")
    options.add_flag(parser, "--afs", "of epd: also a row with the analytic first step")
    add("--guidance_scale", type=options.number(float), help="of epd; default 7.5, 1 for none")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks")
    add("--warmup", type=options.COUNT_OR_ZERO, default=1, help="untimed repeats per row")
    add("--repeats", type=options.COUNT, default=5, help="timed repeats per row")
    options.add_flag(parser, "--channels_last", "channels_last memory format")
    options.add_flag(parser, "--compile", "torch.compile every U-Net (of epd once per number of rows, for fixed shapes: warm up), "
                     "the fixed-point iteration, the DiT's blocks")  # fmt: skip
    add("--compile_mode", choices=fpdm_options.COMPILE_MODES, default="default",
        help="of --method fpdm and epd; reduce-overhead: CUDA graphs")  # fmt: skip
    options.add_flag(parser, "--allow_tf32", "allow TF32 matrix products")
    add("--output", help="JSON file for the figures")
    args, given = options.parse(parser, argv)
    check_output(args.output)
    is_unet, is_epd = args.method == "bksdm", args.method == "epd"
    needs = dict.fromkeys(("batch_sizes", "num_points", "afs", "guidance_scale"), (is_epd, "--method epd"))
    needs |= {"presets": (is_unet, "--method bksdm"), "channels_last": (is_unet or is_epd, "--method bksdm or epd"),
              "plans": (args.method == "fpdm", "--method fpdm"), "batch_size": (not args.batch_sizes, "leaving out --batch_sizes"),
              "compile_mode": (args.compile and not is_unet, "--method fpdm or epd, and --compile")}  # fmt: skip
    for sentence in options.without_effect(given, needs):
        print(sentence)
    check_size(args, SIZES)
    args.batch_sizes = parse_batch_sizes(args.batch_sizes) if args.batch_sizes else [args.batch_size]
    args.steps = args.steps or STEPS[args.method]
    if is_epd:
        args.num_points, args.guidance_scale = args.num_points or 2, 7.5 if args.guidance_scale is None else args.guidance_scale
    args.presets = (args.presets or FAMILY["sdxl" if args.size == "sdxl" else "sd"]).split(",")
    return args


def parse_batch_sizes(text):
    """[1, 2, 4] of 1,2,4. UserError."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in sizes):
        raise options.UserError(f"--batch_sizes {text}: write numbers from 1, as in 1,2,4.")
    return list(dict.fromkeys(map(int, sizes)))


def make_models(teacher, presets, device):
    """{"teacher" or name of a preset: U-Net with random weights}; UserError for presets that do not fit this U-Net."""
    import torch

    from brisk import bksdm, sd_models, students

    config, plans = sd_models.plain_config(teacher), {}
    try:
        for name in (bksdm.resolve_preset(preset.strip(), config) for preset in presets):
            derived = bksdm.derive_student_config(config, name)
            plans[name] = students.make_plan(config, name, derived, teacher.config.sample_size, copies_weights=False)
    except ValueError as error:
        raise options.UserError(f"--presets: {error}") from None
    with torch.device(device):  # billions of random numbers take long on a CPU
        created = {name: students.create(plan, teacher, copies_weights=False) for name, plan in plans.items()}
    return {name: unet.requires_grad_(False).eval() for name, unet in {"teacher": teacher, **created}.items()}


def sample(unet, scheduler, noise, prompts, steps):
    """Latents after `steps` denoising steps with guidance, as StableDiffusionPipeline takes them.

    Args: `noise` (B, 4, h, w); `prompts`: the U-Net's conditions for a batch of 2 B.
    """
    import torch

    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
            without, with_prompt = unet(both, timestep, return_dict=False, **prompts)[0].chunk(2)
            guided = without + 7.5 * (with_prompt - without)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    return latents


def describe(entry, taken, first_median):
    """The figures of one row. Args: `taken` [(seconds, GiB or None)]."""
    seconds, extra, batch_size = [row[0] for row in taken], taken[0][1], entry.batch_size
    weights = sum(p.numel() * p.element_size() for p in entry.network.parameters()) / 2**30
    median = statistics.median(seconds)
    return {"model": entry.name, "batch_size": batch_size, "seconds": seconds, "median_seconds": median,
            "min_seconds": min(seconds), "max_seconds": max(seconds), "seconds_per_image": median / batch_size,
            "min_seconds_per_image": min(seconds) / batch_size, "max_seconds_per_image": max(seconds) / batch_size,
            "ratio_to_first": median / first_median, "parameters": sum(p.numel() for p in entry.network.parameters()),
            **entry.figures, "peak_gib": None if extra is None else weights + max(row[1] for row in taken)}  # fmt: skip


def print_rows(rows, columns):
    """The table of one batch size."""
    print(f"{'model':20s}" + "".join(f"{header:>14s}" for header, *_ in columns))
    for row in rows:
        cells = ["-" if row[key] is None else f"{row[key]:,.{digits}f}" for _, key, digits in columns]
        print(f"{row['model']:20s}" + "".join(f"{cell:>14s}" for cell in cells))


def make_unet_entries(args, device, dtype):
    """(entries, latent side): the U-Net teacher and its students. UserError."""
    from bench_step_methods import make_unet
    from diffusers import DDIMScheduler

    from brisk import macs, sd_models, tiny

    teacher, tokens = make_unet(args.size, device)
    models = make_models(teacher, args.presets, device)
    latent, scheduler = teacher.config.sample_size, DDIMScheduler(**tiny.SCHEDULE)
    sizes = {name: macs.unet_size(sd_models.plain_config(unet), latent, tokens) for name, unet in models.items()}
    prompts = macs.unet_inputs(teacher.config, 2 * args.batch_size, latent, tokens, device=device, dtype=dtype)
    noise = prompts.pop("sample")[: args.batch_size]
    prompts.pop("timestep")
    entries = []
    for name, unet in models.items():
        unet.to(device, dtype)
        sd_models.speed_up(unet, args.channels_last, False, args.compile, print)
        figures = {"gmacs": sizes[name].total / 1e9, "gmacs_published": sizes[name].published / 1e9}
        entries.append(Entry(name, unet, functools.partial(sample, unet, scheduler, noise, prompts, args.steps),
                             args.batch_size, figures))  # fmt: skip
    return entries, latent


def main(argv=None):
    args = parse_args(argv)
    import torch

    from brisk import runlog, sd_models

    runlog.quiet_libraries()
    runlog.allow_fast_maths(args.allow_tf32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.method == "bksdm":
        make_entries = make_unet_entries
    elif args.method == "fpdm":
        from bench_latency_fpdm import make_entries
    else:
        from bench_latency_epd import compare, make_entries
    entries, latent = make_entries(args, device, sd_models.DTYPES[args.dtype])
    for entry in entries:
        for _ in range(args.warmup):
            entry.call()
    taken = [[] for _ in entries]
    for _ in range(args.repeats):
        for entry, times in zip(entries, taken, strict=True):
            times.append(time_once(device, entry.call))
    figures, kind = [], f"intervals of {args.num_points} points" if args.method == "epd" else "steps"
    guidance = "without guidance" if args.guidance_scale == 1 else "with guidance"
    for batch_size in args.batch_sizes:
        own = [(entry, times) for entry, times in zip(entries, taken, strict=True) if entry.batch_size == batch_size]
        first = statistics.median(seconds for seconds, _ in own[0][1])
        rows = [describe(entry, times, first) for entry, times in own]
        print(f"{args.method}, {args.size}, latent {latent}, batch {batch_size}, {args.steps} {kind} {guidance}, {args.dtype}")
        said = compare(rows) if args.method == "epd" else None
        print_rows(rows, COLUMNS_OF_EPD if said else COLUMNS)
        if said:
            print(said)
        figures += rows
    if args.output:
        chosen = {name: value for name, value in vars(args).items() if name not in ("output", "config", "presets")}
        write_json(args.output, {**chosen, "latent": latent, "environment": runlog.environment(), "models": figures})


if __name__ == "__main__":
    options.run(main)
