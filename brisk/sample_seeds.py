"""A generator per image: latents and labels that depend on the image's seed alone, not on batches or processes."""

import itertools

import torch


def parse_seeds(text):
    """The integers of a list like "1,2,5-10", in order and each once. ValueError for anything else."""
    seeds = []
    for part in str(text).split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise ValueError(f"seeds '{text}': '{part}' is neither a number nor a rising range like 5-10.")
        seeds.extend(range(int(first), int(last if dash else first) + 1))
    return list(dict.fromkeys(seeds))


def batches(seeds, max_batch, rank=0, world=1):
    """This process's lists of seeds, none longer than `max_batch`; every process gets as many lists, perhaps empty ones.

    (floor((n - 1) / (max_batch world)) + 1) world lists of nearly equal length, longer ones first, dealt out in turn.
    """
    count = ((len(seeds) - 1) // (max_batch * world) + 1) * world
    size, longer = divmod(len(seeds), count)
    starts = [index * size + min(index, longer) for index in range(count + 1)]
    return [seeds[starts[index] : starts[index + 1]] for index in range(rank, count, world)]


def prompts_of(prompts, seeds, index="position"):
    """{seed: its prompt}; `index`: taken in turns along the list of seeds, or "seed": prompt number j for seed j."""
    if index == "seed":
        return {seed: prompts[seed] for seed in seeds}
    return dict(zip(seeds, itertools.cycle(prompts), strict=False))


def generators(seeds, device="cpu"):
    """One generator per seed (taken modulo 2^32); the device decides the numbers, cpu gives the same everywhere."""
    return [torch.Generator(device).manual_seed(seed % 2**32) for seed in seeds]


def draw_latents(sources, shape):
    """Standard normal latents (B, *shape) float32 on the device of the generators `sources`."""
    return torch.stack([torch.randn(shape, generator=source, device=source.device) for source in sources])


def draw_labels(sources, classes):
    """Labels (B,) int64 below `classes`; drawn after the latents, from the same generators."""
    return torch.stack([torch.randint(classes, (), generator=source, device=source.device) for source in sources])
