#!/usr/bin/env python
"""Time how evaluate.py reads images for their features beside a plain loop, on images and a network made here.

Plain: one file after the other, then the network. Here: headers first, the files of a batch side by side, the next batch while
the network works. Both resize as an evaluation does; they take turns.
"""

import statistics
import tempfile
import time
from pathlib import Path

from bench_step import check_output, write_json

from brisk import options


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--images", type=options.COUNT, default=400, help="PNG files")
    add("--side", type=options.COUNT, default=256, help="px of the files")
    add("--resize", type=options.COUNT, default=128, help="px to which they are resized")
    add("--batch_size", type=options.COUNT, default=50, help="images at a time")
    add("--repeats", type=options.COUNT, default=5, help="timed repeats per row, after one untimed")
    add("--output", help="JSON file for the figures")
    args, _ = options.parse(parser, argv)
    check_output(args.output)
    return args


def write_images(folder, count, side):
    """Write `count` smooth random PNG files."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")


def make_network():
    """A function of uint8 arrays (B, H, W, 3): features by a small convolutional network with random weights."""
    import torch

    layers = (torch.nn.Conv2d(3, 32, 7, 4), torch.nn.ReLU(), torch.nn.Conv2d(32, 64, 3, 2), torch.nn.AdaptiveAvgPool2d(1))
    network = torch.nn.Sequential(*layers, torch.nn.Flatten()).requires_grad_(False)
    return lambda values: network(torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255)


def plain(folder, network, args):
    """Features of all images by a loop over files."""
    import numpy as np
    from PIL import Image

    files, size, found = sorted(folder.glob("*.png")), (args.resize, args.resize), []
    for first in range(0, len(files), args.batch_size):
        images = [Image.open(file).convert("RGB") for file in files[first : first + args.batch_size]]
        found.append(network(np.stack([np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images])))
    return found


def ours(folder, network, args):
    """The same by `image_sets`."""
    from brisk import image_sets

    images = image_sets.open_images(folder, resize=args.resize)
    return [network(values) for _, values in images.batches(args.batch_size)]


def main(argv=None):
    args = parse_args(argv)
    import torch

    from brisk import runlog

    runlog.quiet_libraries()
    network, rows = make_network(), {"plain": plain, "evaluate.py": ours}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, args.images, args.side)
        one, other = (torch.cat(read(folder, network, args)) for read in rows.values())
        if not torch.equal(one, other):
            raise options.UserError("the two ways give different features.", 1)
        seconds = {row: [] for row in rows}
        for _ in range(args.repeats):
            for row, read in rows.items():
                started = time.perf_counter()
                read(folder, network, args)
                seconds[row].append(time.perf_counter() - started)
    medians = {row: statistics.median(taken) for row, taken in seconds.items()}
    print(f"{args.images} images of {args.side} px, resized to {args.resize} px, batch {args.batch_size}")
    for row, taken in medians.items():
        print(f"{row:14s}{taken:8.3f} s{args.images / taken:10.1f} images/s{medians['plain'] / taken:8.2f} of plain")
    if args.output:
        figures = {row: {"seconds": taken, "ratio_to_plain": medians["plain"] / taken} for row, taken in medians.items()}
        write_json(args.output, {**vars(args), "rows": figures, "environment": runlog.environment()})


if __name__ == "__main__":
    options.run(main)
