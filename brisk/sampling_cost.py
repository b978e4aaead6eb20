"""What an image costs a model that draws: network calls, rows, multiply-accumulates, seconds, memory. One place for timing.

Times are of the whole model: text encoders and VAE included. Letters: R rows of a network call.
"""

import copy
import inspect
import statistics
import time
from pathlib import Path


def synchronize(device):
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


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


def arguments_of(network, args, named):
    """{name: value} of a call of `network` by position and by name."""
    return dict(inspect.signature(network.forward).bind(*args, **named).arguments)


def watch_calls(network, call):
    """(rows of each call of `network` while `call()` runs, arguments of the first one)."""
    rows, first = [], {}

    def note(module, args, named):
        found = arguments_of(module, args, named)
        rows.append(len(next(iter(found.values()))))  # a network's first argument has a row per sample
        if not first:
            first.update(found)

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return rows, first


def one_row(value, rows):
    """`value`, an argument of a call of R = `rows` rows or a nest of them, cut to one row, its tensors on the meta device."""
    import torch

    if isinstance(value, torch.Tensor):
        return (value[:1] if value.ndim and len(value) == rows else value).to("meta")
    if isinstance(value, dict):
        return {name: one_row(part, rows) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(one_row(part, rows) for part in value)
    return value


def call_macs(network, arguments):
    """Multiply-accumulates of one row of the call of `network` with `arguments`, None where they cannot be counted.

    They are counted on a copy whose tensors are on the meta device: it takes no memory, and nothing is computed.
    """
    import torch

    from brisk import macs

    weights = {id(weight): torch.nn.Parameter(weight.to("meta"), False) for weight in network.parameters()}
    empty = copy.deepcopy(network, weights | {id(buffer): buffer.to("meta") for buffer in network.buffers()})
    rows = len(next(iter(arguments.values())))
    try:
        return macs.count(empty, **one_row(arguments, rows)).total
    except (RuntimeError, NotImplementedError):  # a network that reads values, or an operation without shapes
        return None


def reset_peak():
    """Let the process's peak of resident memory begin anew, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def resident_peak():
    """GiB of resident memory at the peak since `reset_peak`; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM")), None)


def measure(model, plan, conditions, seeds, batch_size, repeats=5, warmup=1, held_before=0):
    """The costs of an image as a row of figures, of a model and a plan of `eval_models`.

    nfe: network calls one after the other; total_nfe: rows through the network per image; seconds_alone: median at batch 1;
    seconds_per_image: median at the full batch; both with _min and _max and, in "spread", the standard deviation over repeats;
    parameters and gmacs_per_image of the network, the latter left out where it cannot be counted; peak_memory_gib: at the full
    batch, of device memory on CUDA (above `held_before` bytes, what was allocated before the model), else of this process.

    Args: `conditions` and `seeds` of the first images, of which `batch_size` make the full batch, or all if there are fewer.
    The two sizes take turns, so that a slow moment of the machine hits both.
    """
    import torch

    count, on_gpu = min(batch_size, len(seeds)), model.device.type == "cuda"

    def draw(size):
        return plan.draw(conditions and conditions[:size], seeds[:size])

    alone, arguments = watch_calls(model.network, lambda: draw(1))
    together, _ = watch_calls(model.network, lambda: draw(count))
    for _ in range(warmup):  # again: hooks are gone, which compiled networks notice
        draw(1), draw(count)
    times, extra = {1: [], count: []}, []
    reset_peak()
    for _ in range(repeats):
        for size in times:
            seconds, gib = time_once(model.device, lambda size=size: draw(size))
            times[size].append(seconds / size)
            extra.append(gib)
    peak = (torch.cuda.memory_allocated() - held_before) / 2**30 + max(extra) if on_gpu else resident_peak()
    row = {"nfe": len(alone), "total_nfe": sum(together) / count, "spread": {}}
    for name, size in (("seconds_alone", 1), ("seconds_per_image", count)):
        row |= {name: statistics.median(times[size]), f"{name}_min": min(times[size]), f"{name}_max": max(times[size])}
        if repeats > 1:
            row["spread"][name] = statistics.stdev(times[size])
    row["parameters"] = sum(parameter.numel() for parameter in model.network.parameters())
    macs = plan.macs
    if macs is None:
        each = call_macs(model.network, arguments)
        macs = None if each is None else each * row["total_nfe"]
    return row | {name: value for name, value in (("gmacs_per_image", macs and macs / 1e9), ("peak_memory_gib", peak)) if value}
