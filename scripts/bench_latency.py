#!/usr/bin/env python
"""Time the sampling of networks side by side, random weights: a U-Net and students of fewer blocks, or a DiT and FPDM.

One image is all its denoising steps with guidance (the batch doubled), without text encoder and VAE. The rows take turns,
so that a slow moment of the machine hits all of them.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench_step import BATCHES, check_output, check_size, synchronize, write_json

from brisk import fpdm_options, options

FAMILY = {"sd": "bk_base,bk_small,bk_tiny",
          "sdxl": "small_sd_xl,tiny_sd_xl,koala_1b,koala_700m,ssd_1b,segmind_vega"}  # fmt: skip
STEPS = {"bksdm": 25, "fpdm": 20}
COLUMNS = [("s/image", "seconds_per_image", 4), ("min", "min_seconds_per_image", 4), ("max", "max_seconds_per_image", 4),
           ("of first", "ratio_to_first", 3), ("parameters", "parameters", 0), ("GMACs", "gmacs", 4), ("peak GiB", "peak_gib", 2)]


class Entry(NamedTuple):
    """What one row times."""

    name: str
    network: Any
    call: Callable  # makes a batch of images
    figures: dict  # what it costs: of a U-Net "gmacs" a call, of a DiT or FPDM "gmacs", "blocks" and "timesteps" an image


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add, sizes = parser.add_argument, tuple(dict.fromkeys(size for method in STEPS for size in BATCHES[method]))
    add("--method", choices=tuple(STEPS), default="bksdm", help="U-Nets, or DiT and FPDM")
    add("--size", choices=sizes, default="tiny", help="as in bench_step.py")
    add("--presets", help=f"students separated by commas; default {FAMILY['sd']}, SDXL {FAMILY['sdxl']}")
    add("--plans", help="of FPDM: timesteps x iterations, r for reuse, as in 20x26,40x6r; default: as many MACs as the DiT")
    add("--batch_size", type=options.COUNT, default=1, help="images at a time")
    add("--steps", type=options.COUNT, help="denoising steps per image; default 25, of the DiT 20")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks")
    add("--warmup", type=options.COUNT_OR_ZERO, default=1, help="untimed repeats per row")
    add("--repeats", type=options.COUNT, default=5, help="timed repeats per row")
    options.add_flag(parser, "--channels_last", "channels_last memory format")
    options.add_flag(parser, "--compile", "torch.compile every U-Net, the fixed-point iteration, the DiT's blocks")
    add("--compile_mode", choices=fpdm_options.COMPILE_MODES, default="default",
        help="of --method fpdm; reduce-overhead: CUDA graphs")  # fmt: skip
    options.add_flag(parser, "--allow_tf32", "allow TF32 matrix products")
    add("--output", help="JSON file for the figures")
    args, given = options.parse(parser, argv)
    check_output(args.output)
    is_unet = args.method == "bksdm"
    needs = {"presets": (is_unet, "--method bksdm"), "channels_last": (is_unet, "--method bksdm"),
             "plans": (not is_unet, "--method fpdm"), "compile_mode": (args.compile and not is_unet, "--method fpdm --compile")}
    for sentence in options.without_effect(given, needs):
        print(sentence)
    check_size(args)
    args.steps = args.steps or STEPS[args.method]
    args.presets = (args.presets or FAMILY["sdxl" if args.size == "sdxl" else "sd"]).split(",")
    return args


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


def time_once(device, call):
    """(seconds, GiB on top of what was there before or None off CUDA) of `call()`."""
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    seconds = time.perf_counter() - started
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30 if on_gpu else None


def describe(entry, taken, batch_size, first_median):
    """The figures of one row. Args: `taken` [(seconds, GiB or None)]."""
    seconds, extra = [row[0] for row in taken], taken[0][1]
    weights = sum(p.numel() * p.element_size() for p in entry.network.parameters()) / 2**30
    median = statistics.median(seconds)
    return {"model": entry.name, "seconds": seconds, "median_seconds": median, "min_seconds": min(seconds),
            "max_seconds": max(seconds), "seconds_per_image": median / batch_size,
            "min_seconds_per_image": min(seconds) / batch_size, "max_seconds_per_image": max(seconds) / batch_size,
            "ratio_to_first": median / first_median, "parameters": sum(p.numel() for p in entry.network.parameters()),
            **entry.figures, "peak_gib": None if extra is None else weights + max(row[1] for row in taken)}  # fmt: skip


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
        entries.append(Entry(name, unet, functools.partial(sample, unet, scheduler, noise, prompts, args.steps), figures))
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
    else:
        from bench_latency_fpdm import make_entries
    entries, latent = make_entries(args, device, sd_models.DTYPES[args.dtype])
    for entry in entries:
        for _ in range(args.warmup):
            entry.call()
    taken = {entry.name: [] for entry in entries}
    for _ in range(args.repeats):
        for entry in entries:
            taken[entry.name].append(time_once(device, entry.call))
    print(f"{args.method}, {args.size}, latent {latent}, batch {args.batch_size}, {args.steps} steps with guidance, {args.dtype}")
    first = statistics.median(row[0] for row in taken[entries[0].name])
    figures = [describe(entry, taken[entry.name], args.batch_size, first) for entry in entries]
    print(f"{'model':20s}" + "".join(f"{header:>14s}" for header, *_ in COLUMNS))
    for row in figures:
        cells = ["-" if row[key] is None else f"{row[key]:,.{digits}f}" for _, key, digits in COLUMNS]
        print(f"{row['model']:20s}" + "".join(f"{cell:>14s}" for cell in cells))
    if args.output:
        chosen = {name: value for name, value in vars(args).items() if name not in ("output", "config", "presets")}
        write_json(args.output, {**chosen, "latent": latent, "environment": runlog.environment(), "models": figures})


if __name__ == "__main__":
    options.run(main)
