#!/usr/bin/env python
"""Put two runs side by side from their metrics.jsonl: loss, images/s, share of time waiting for data, memory.

Every "B/A" is B's number over A's. Rows are the steps that both runs logged.
"""

import json
import math
import statistics
from pathlib import Path

from brisk import options

# name in metrics.jsonl, title, format
COLUMNS = (
    ("loss", "loss", ".4g"), ("images_per_second", "images/s", ".4g"), ("data_wait_share", "data wait", ".3f"),
    ("peak_memory_gib", "peak GiB", ".2f"),
)  # fmt: skip


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    parser.add_argument("a", metavar="A", help="output folder of the first run, or its metrics.jsonl")
    parser.add_argument("b", metavar="B", help="output folder of the second run, or its metrics.jsonl")
    parser.add_argument("--rows", type=options.COUNT, default=20, help="lines to print at most, evenly spaced")
    return options.parse(parser, argv)[0]


def read_run(name):
    """{step: row} of a run's metrics.jsonl; UserError where there is none or nothing in it."""
    path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise options.UserError(f"{name} is neither an output folder with metrics.jsonl nor such a file.")
    rows, lines = {}, path.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[int(row["step"])] = row
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last line may be cut short by a kill
                raise options.UserError(f"{path} line {number} is not a row of metrics: {line[:60]}") from None
    if not rows:
        raise options.UserError(f"{path} is empty: the run has logged nothing yet.")
    return rows


def ratio(first, second):
    """second / first as text, '-' where it says nothing."""
    if not (isinstance(first, (int, float)) and isinstance(second, (int, float))) or not first:
        return "-"
    return f"{second / first:.3f}" if math.isfinite(second / first) else "-"


def cells(title, first, second):
    """The cells of one line: each column's two numbers and their ratio."""
    line = [title]
    for name, _, layout in COLUMNS:
        pair = first.get(name), second.get(name)
        line += ["-" if value is None else format(value, layout) for value in pair] + [ratio(*pair)]
    return line


def over_steps(rows):
    """The row that stands for several: means, the memory's maximum, values that are missing or not finite left out."""
    summary = {}
    for name, _, _ in COLUMNS:
        values = [row[name] for row in rows if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])]
        if values:
            summary[name] = max(values) if name == "peak_memory_gib" else statistics.mean(values)
    return summary


def evenly(steps, count):
    """At most `count` of `steps`, evenly spaced, the first and the last among them (the last where `count` is 1)."""
    if len(steps) <= count:
        return steps
    return [steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)] if count > 1 else steps[-1:]


def table(first, second, count):
    """The comparison as text. Args: two results of `read_run`. UserError where they share no step."""
    common = sorted(set(first) & set(second))
    if not common:
        raise options.UserError(
            f"the runs share no step: A logged {min(first)} to {max(first)}, B {min(second)} to {max(second)}."
        )
    lines = [
        [
            "step",
            *(f"{title} {side}" if side != "B/A" else side for _, title, _ in COLUMNS for side in "A B B/A".split()),
        ]
    ]
    lines += [cells(str(step), first[step], second[step]) for step in evenly(common, count)]
    lines.append(
        cells("all", over_steps([first[step] for step in common]), over_steps([second[step] for step in common]))
    )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.append(f"\n{len(common)} common steps; 'all' is their mean, for memory their maximum.")
    images = first[common[-1]].get("images"), second[common[-1]].get("images")
    if images[0] != images[1]:
        text.append(f"The global batches differ: at step {common[-1]} A has seen {images[0]} images and B {images[1]}.")
    return "\n".join(text)


def main(argv=None):
    args = parse_args(argv)
    first, second = read_run(args.a), read_run(args.b)
    print(f"A {args.a}\nB {args.b}\n")
    print(table(first, second, args.rows))


if __name__ == "__main__":
    options.run(main)
