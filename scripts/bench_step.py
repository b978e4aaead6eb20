#!/usr/bin/env python
"""Time one training step on synthetic data: the plain composition beside ours, one change a row.

"of floor" is the model-FLOPs utilisation against the matrix-product rate measured here: the floor is the time that the
FLOPs of the method's networks alone take at that rate. "TFLOP/s" counts the same FLOPs, to divide by a data sheet's peak.
"""

import functools
import gc
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from brisk import options
from brisk.sampling_cost import synchronize


class Setting(NamedTuple):
    """What a row of a U-Net method does; the defaults are the plain composition."""

    name: str = "plain"
    batched_guidance: bool = False  # SLAM
    lean_features: bool = False  # BK-SDM
    half_frozen: bool = False
    fused_updates: bool = False
    no_host_sync: bool = False
    channels_last: bool = False
    cached: bool = False
    checkpointing: bool = True
    compiled: bool = False


class LayerSetting(NamedTuple):
    """What a row of FPDM, or of the DiT beside it, does; the defaults are the plain FPDM step."""

    name: str = "FPDM, plain"
    fixed_point: bool = True
    true_no_grad: bool = False
    hoisted: bool = False
    fused_updates: bool = False
    no_host_sync: bool = False
    checkpointing: bool = False
    compiled: bool = False


BATCHES = dict.fromkeys(("slam", "bksdm"), {"tiny": 16, "sd15": 16, "sd21": 8, "sdxl": 4}) | {
    "fpdm": {"tiny": 16, "s2": 256, "b2": 128, "xl2": 64}
}  # by method and size
STEPS = {"slam": 10, "bksdm": 10, "fpdm": 24}
OF_METHOD = {
    "slam": [("+ batched guidance", {"batched_guidance": True}), ("+ half frozen networks", {"half_frozen": True})],
    "bksdm": [("+ half teacher", {"half_frozen": True}), ("+ lean feature loss", {"lean_features": True})],
}
OF_ALL = [
    ("+ foreach EMA, fused AdamW", {"fused_updates": True}), ("+ no host sync", {"no_host_sync": True}),
    ("+ channels_last", {"channels_last": True}), ("+ cached latents and text", {"cached": True}),
    ("- gradient checkpointing", {"checkpointing": False}), ("+ compile", {"compiled": True}),
]  # fmt: skip
OF_FPDM = [("+ true no-grad", {"true_no_grad": True}), ("+ hoisting", {"hoisted": True}), *OF_ALL[:2]]
OTHERWISE = {"compiled": {"compiled": True}, "recomputed": {"checkpointing": True}}
COLUMNS = [("s/step", "seconds_per_step", 4), ("images/s", "images_per_second", 2), ("TFLOP/s", "tflops_per_second", 3),
           ("of floor", "share_of_floor", 3), ("peak GiB", "peak_gib", 3), ("ratio", "ratio_to_plain", 2)]  # fmt: skip
COLUMNS_OF_FPDM = [("held GiB", "held_gib", 3), ("at m = 1", "peak_gib_at_one", 3), ("to DiT", "ratio_to_dit", 2)]


def rows(compiled, method="slam"):
    """The settings in order: one change a row, then (U-Nets) less work, then another compiler.

    Of FPDM: the DiT, the FPDM step from the plain one to ours, both compiled and with recomputation.
    """
    is_layer = method == "fpdm"
    listed = [LayerSetting() if is_layer else Setting()]
    for name, change in OF_FPDM if is_layer else OF_METHOD[method] + OF_ALL:
        listed.append(listed[-1]._replace(name=name, **change))
    if is_layer:
        ours, dit = listed[-1], listed[-1]._replace(name="DiT", fixed_point=False)
        others = [[one._replace(name=f"{name}, {what}", **change) for what, change in OTHERWISE.items()]
                  for name, one in (("DiT", dit), ("FPDM", ours))]  # fmt: skip
        listed = [dit, *others[0], *listed, *others[1]]
    return [setting for setting in listed if compiled or not setting.compiled]


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add, sizes = parser.add_argument, tuple(dict.fromkeys(size for batches in BATCHES.values() for size in batches))
    add("--method", choices=tuple(BATCHES), default="slam", help="whose step; fpdm: that of the plain DiT too")
    add("--preset", help="the student of --method bksdm; default bk_small, SDXL small_sd_xl")
    add("--size", choices=sizes, default="tiny",
        help="random weights of this size; tiny is the built-in teacher; of fpdm tiny, s2, b2 or xl2")  # fmt: skip
    add("--batch_size", type=options.COUNT, help="images per step; default 16, SD2.1 8, SDXL 4, S/2 256, B/2 128, XL/2 64")
    add("--mixed_precision", choices=("no", "bf16", "fp16"), default="no", help="autocast type")
    add("--steps", type=options.COUNT, help="timed steps per row; default 10, fpdm 24")
    add("--warmup", type=options.COUNT_OR_ZERO, default=3, help="untimed steps per row")
    add("--repeats", type=options.COUNT, default=1, help="times that all rows are taken in turn; their medians count")
    options.add_flag(parser, "--allow_tf32", "allow TF32 matrix products")
    options.add_flag(parser, "--compile", "add the rows with torch.compile")
    add("--output", help="JSON file for the figures")
    args, given = options.parse(parser, argv)
    check_output(args.output)
    for sentence in options.without_effect(given, {"preset": (args.method == "bksdm", "--method bksdm")}):
        print(sentence)
    check_size(args)
    batches = BATCHES[args.method]
    args.preset = args.preset or ("small_sd_xl" if args.size == "sdxl" else "bk_small")
    args.batch_size, args.steps = args.batch_size or batches[args.size], args.steps or STEPS[args.method]
    return args


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product in `dtype`, the best within a second."""
    import torch

    n = 8192 if device.type == "cuda" else 512  # short enough for a share of a busy core
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 1
    while time.perf_counter() < end:
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def time_row(make, steps, warmup, device):
    """(mean seconds per step, this process' CPU seconds per step, memory figures) of the row that `make()` builds."""
    import torch

    gc.collect()  # the row before: compiled networks refer to themselves
    bench = make()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(warmup):
        bench.step(number)
    synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    for number in range(steps):  # no wait in between, so that a row which waits by itself shows it
        bench.step(warmup + number)
    synchronize(device)
    seconds, cpu_seconds = (time.perf_counter() - started) / steps, (time.process_time() - worked) / steps
    return seconds, cpu_seconds, bench.memory()


def check_size(args, sizes=BATCHES):
    """UserError for a size that the method's networks do not come in. Args: `sizes` by method."""
    if args.size not in sizes[args.method]:
        raise options.UserError(f"--size {args.size} is none of --method {args.method}: {', '.join(sizes[args.method])}.")


def check_output(path):
    """UserError if `--output` names a file in no folder, before any work."""
    if path and not Path(path).absolute().parent.is_dir():
        raise options.UserError(f"--output {path} is in a folder that does not exist.")


def write_json(path, content):
    """Write the figures."""
    Path(path).write_text(json.dumps(content, indent=1) + "\n")


def compared_with(setting, settings):
    """{name of a ratio: the setting it is taken to}: the plain step, and for FPDM the DiT of the same kind."""
    if not isinstance(setting, LayerSetting):
        return {"ratio_to_plain": settings[0]}
    if not setting.fixed_point:
        return {}
    same = (setting.compiled, setting.checkpointing)
    dit = next(one for one in settings if not one.fixed_point and (one.compiled, one.checkpointing) == same)
    return {"ratio_to_plain": next(one for one in settings if one.fixed_point), "ratio_to_dit": dit}


def describe(setting, settings, taken, flops, report):
    """The figures of one row. Args: `taken` {name: what `time_row` returned, each time}, `flops` of a step."""
    medians = {name: statistics.median(row[0] for row in each) for name, each in taken.items() if each}
    seconds, mine = medians[setting.name], taken[setting.name]
    figures = {"row": setting.name, "taken_seconds": [row[0] for row in mine], "seconds_per_step": seconds,
               "cpu_seconds_per_step": statistics.median(row[1] for row in mine),
               "images_per_second": report["batch_size"] / seconds, "flops_per_step": flops,
               "flops_per_second": flops / seconds, "tflops_per_second": flops / seconds / 1e12,
               "share_of_floor": flops / seconds / report["matmul_flops_per_second"], **mine[-1][2]}  # fmt: skip
    ratios = compared_with(setting, settings)
    return figures | {name: medians[other.name] / seconds for name, other in ratios.items()}


def print_row(row, columns):
    """One line of the table."""
    cells = ["-" if row.get(key) is None else f"{row[key]:.{digits}f}" for _, key, digits in columns]
    print(f"{row['row']:30s}" + "".join(f"{cell:>10s}" for cell in cells), flush=True)


def measure(args, report, work, columns, device):
    """Take all rows of a `bench_step_methods.Work`, print them, add them to `report` and write it."""
    import torch

    settings = rows(args.compile, args.method)
    taken = {setting.name: [] for setting in settings}
    for repeat, setting in itertools.product(range(args.repeats), settings):
        if setting.compiled:
            torch.compiler.reset()  # it would count the networks of earlier repeats
        try:
            row = time_row(functools.partial(work.make, setting), args.steps, args.warmup, device)
        except torch.OutOfMemoryError:
            raise options.UserError(f"'{setting.name}' is out of memory: give a smaller --batch_size.", 1) from None
        taken[setting.name].append(row)
        done = [one for one in settings if taken[one.name]]
        report["rows"] = [describe(one, settings, taken, work.flops(one), report) for one in done]
        if repeat == args.repeats - 1:
            print_row(report["rows"][settings.index(setting)], columns)
        if args.output:  # after each row: a later one may fail
            write_json(args.output, report)


def main(argv=None):
    args = parse_args(argv)
    import bench_step_fpdm
    import bench_step_methods
    import torch

    from brisk import runlog

    runlog.quiet_libraries()
    runlog.allow_fast_maths(args.allow_tf32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = runlog.usable_precision(args.mixed_precision)
    half = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    is_layer = args.method == "fpdm"
    work = (bench_step_fpdm if is_layer else bench_step_methods).prepare(args, half, device)
    rate = matmul_rate(device, half)
    print(f"{args.method}, {args.size}, batch {args.batch_size}, {precision}: matrix products reach {rate / 1e12:.4g} TFLOP/s")
    for text, flops in work.counted.items():
        print(f"{text} = {flops / 1e12:.4g} TFLOP per step, the floor is {flops / rate:.4f} s")
    columns = COLUMNS + (COLUMNS_OF_FPDM if is_layer else [])
    print(f"{'row':30s}" + "".join(f"{header:>10s}" for header, *_ in columns))
    report = {"method": args.method, "size": args.size, "batch_size": args.batch_size, "mixed_precision": precision,
              "steps": args.steps, "repeats": args.repeats, "matmul_flops_per_second": rate, **work.facts,
              "environment": runlog.environment(), "rows": []}  # fmt: skip
    measure(args, report, work, columns, device)


if __name__ == "__main__":
    options.run(main)
