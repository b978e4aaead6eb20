"""Pictures of an evaluation: quality against cost of several models, samples of every model, and both in one picture.

Figures are {model: {network calls or "images": measurement}}. All places and sizes are in pixels from the top left corner.
"""

import colorsys
import math
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

# what a measure is called in a picture, in the order in which measures are drawn
QUALITY = {
    "all": "agreement with what was asked", "digit": "agreement with the digit", "fid": "FID", "frechet": "Fréchet distance",
    "clip": "CLIP score", "hps": "HPS", "pickscore": "PickScore", "imagereward": "ImageReward", "aesthetic": "aesthetic score",
    "mps": "MPS", "kid": "KID", "inception_score": "Inception Score", "precision": "precision", "recall": "recall",
    "psnr_to_teacher": "PSNR to the teacher, dB",
}  # fmt: skip
COST = {"nfe": "network calls one after the other", "seconds_alone": "seconds per image, one at a time"}
LOWER = frozenset({
    "end_error", "fid", "frechet", "kid", "nfe", "total_nfe", "total_calls", "network_calls", "seconds_alone",
    "seconds_per_image", "blocks", "gmacs_per_image", "gmacs", "parameters", "weights_mib", "activations_mib", "peak_memory_gib",
    "seconds_per_step",
})  # fmt: skip
HIGHER = frozenset({"reward", "gain", "agreement", "foreground", "background", *QUALITY}) - LOWER
LOGARITHMIC = frozenset({"fid", "frechet", "kid"})
SHARES = frozenset({"all", "digit", "precision", "recall"})  # between 0 and 1
MARKERS = "os^Dv<>pP*"

DPI = 110
GAP = 4  # between samples
MOST_COLUMNS = 10  # samples per row
SIDES = (72, 128)  # of samples, smallest and largest
PANEL = (330, 230)
PANEL_BORDER = (14, 58, 96, 26)
LABEL_CHARACTERS, CAPTION_LINES = 22, 6


class Panels(NamedTuple):
    """Plots of every measure of quality over every cost, and where they go."""

    keys: list  # measures of quality
    costs: list  # of `COST`; [None]: models side by side, where no cost is known
    per_line: int  # measures in a line
    size: tuple  # of a panel, without its labels
    border: tuple  # around a panel, with its labels: top, bottom, left, right
    styles: dict  # {model: how it is drawn}
    legend: list  # models with a curve
    legend_columns: int
    width: int
    height: int


class Grid(NamedTuple):
    """Samples with their labels."""

    picture: Image.Image
    labels: list  # per row, wrapped
    captions: list  # per column, wrapped
    pitch: tuple  # pixels from a sample to the next one: to the right, down
    left: int  # space for the labels
    top: int  # space for the captions
    font: float  # of the captions
    width: int
    height: int


def label(model, steps):
    """What the row of a model's samples is called."""
    return model if steps == "images" else f"{model}\n{steps} NFE"


def better(name, values):
    """The best of some values of a measure or cost; None if there is no better or worse."""
    return min(values) if name in LOWER else max(values) if name in HIGHER else None


def is_number(value):
    """Whether a value can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def quality_keys(figures):
    """The measures of quality of any measurement, in the order of `QUALITY`, then others that have a spread."""
    rows = [row for by_steps in figures.values() for row in by_steps.values()]
    others = {name: None for row in rows for name in row.get("spread", {}) if name not in HIGHER | LOWER}
    names = [name for name in [*QUALITY, *others] if any(is_number(row.get(name)) for row in rows)]
    return [name for name in names if name != "digit" or "all" not in names]


def draw_frontier(path, figures, title=""):
    """Quality against cost, two panels per measure. Returns whether there was anything to draw."""
    keys = quality_keys(figures)
    if not keys:
        return False
    panels = _plan(figures, keys, 1 if len(keys) <= 3 else 2, PANEL)
    figure, top = _start(title, panels.width, panels.height)
    _draw_panels(figure, panels, figures, 0, top)
    _save(figure, path)
    return True


def draw_samples(path, rows, captions, title=""):
    """A grid of samples, a line per label. Args: `rows` {label: list of PIL images or None}; `captions` of the columns, or []."""
    grid = _make_grid(rows, captions)
    figure, top = _start(title, grid.width, grid.height)
    _draw_grid(figure, grid, 0, top)
    _save(figure, path)


def draw_report(path, title, figures, samples, captions):
    """Samples beside quality against cost, or above it if they are a few wide rows.

    Args: as `draw_samples` and `draw_frontier` have them; `samples` may be {}. Returns the measures of quality that the picture
    shows; None if there was nothing to draw, and then there is no picture.
    """
    keys = quality_keys(figures)
    if not samples:
        return keys if draw_frontier(path, figures, title) else None
    grid = _make_grid(samples, captions)
    if not keys:
        draw_samples(path, samples, captions, title)
        return keys
    if grid.height >= 440 or grid.width < 800:
        lines = min(len(keys), max(2, grid.height // (PANEL[1] + 80)))
        panels = _plan(figures, keys[:lines], 1, PANEL)
        free = (grid.height - panels.height) // lines
        panels = _plan(figures, keys[:lines], 1, (PANEL[0], min(PANEL[1] + max(free, 0), 330)))
        figure, top = _start(title, grid.width + panels.width, max(grid.height, panels.height))
        _draw_panels(figure, panels, figures, grid.width, top)
    else:
        panels = _plan(figures, keys[:2], 2, PANEL)
        figure, top = _start(title, max(grid.width, panels.width), grid.height + panels.height)
        _draw_panels(figure, panels, figures, 0, top + grid.height)
    _draw_grid(figure, grid, 0, top)
    _save(figure, path)
    return panels.keys


def thumbnail(image, side):
    """`image` in RGB, shrunk by the box filter to `side` pixels at most, or enlarged by a whole number up to them."""
    image = image.convert("RGB")
    longest = max(image.size)
    if longest > side:
        return image.resize([max(1, round(length * side / longest)) for length in image.size], Image.Resampling.BOX)
    return image.resize([length * (side // longest) for length in image.size], Image.Resampling.NEAREST)


def ticks(low, high, room):
    """Round numbers for a logarithmic axis from `low` to `high`. Args: `room(a, b)`: whether both labels fit beside each other."""
    if high / low < 4:
        places = [value for value in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= value <= high]
        return spaced(places, room)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        places = [value for power in decades for digit in leading if low <= (value := float(f"{digit}e{power}")) <= high]
        if spaced(places, room) == places and places:
            return places
    return spaced(places, room)


def spaced(places, room):
    """The `places` that have room beside each other, ascending; those that come first are kept first."""
    kept = []
    for place in places:
        if all(room(min(place, other), max(place, other)) for other in kept):
            kept.append(place)
    return sorted(kept)


def _plan(figures, keys, per_line, size):
    def has_curve(model, cost):
        return any(_points(figures[model], cost, key) for key in keys)

    costs = [cost for cost in COST if any(has_curve(model, cost) for model in figures)]
    legend = [model for model in figures if not costs or any(has_curve(model, cost) for cost in costs)]
    costs, per_line = costs or [None], min(per_line, len(keys))
    top, bottom, left, right = border = PANEL_BORDER if costs != [None] else (14, 14, 96, 26)
    width = per_line * (left + len(costs) * (size[0] + right))
    columns = max(1, min(len(legend), (width - left + right) // (max(_text_width(_short(model), 9) for model in legend) + 72)))
    height = math.ceil(len(keys) / per_line) * (top + size[1] + bottom) + 24 * math.ceil(len(legend) / columns) + 12
    return Panels(keys, costs, per_line, size, border, _styles(figures), legend, columns, width, height)


def _styles(figures):
    count = len(figures)
    colours = [f"C{number}" for number in range(count)] if count <= 10 else [
        colorsys.hsv_to_rgb(0.85 * number / count, 0.9, 0.8) for number in range(count)]  # fmt: skip
    return {model: {"color": colour, "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
            for number, (model, colour) in enumerate(zip(figures, colours, strict=True))}  # fmt: skip


def _points(by_steps, cost, key):
    """[(cost, value, spread or nan)] of one model, ascending, of the measurements that have both."""
    found = []
    for steps, row in by_steps.items():
        place = row.get(cost, int(steps) if cost == "nfe" and steps.isdigit() else None)
        if is_number(place) and place > 0 and is_number(row.get(key)):
            found.append((place, row[key], row.get("spread", {}).get(key, math.nan)))
    return sorted(found)


def _values(figures, key):
    """[(value, spread or nan)] of all measurements."""
    rows = [row for by_steps in figures.values() for row in by_steps.values() if is_number(row.get(key))]
    return [(row[key], row.get("spread", {}).get(key, math.nan)) for row in rows]


def _draw_panels(figure, panels, figures, x, y):
    top, bottom, left, right = panels.border
    (width, height), count = panels.size, len(panels.costs)
    for place, key in enumerate(panels.keys):
        line, column = divmod(place, panels.per_line)
        for number, cost in enumerate(panels.costs):
            across = x + left + column * (left + count * (width + right)) + number * (width + right)
            plot = _axes(figure, across, y + top + line * (top + height + bottom), width, height)
            _scale_quality(plot, key, _values(figures, key), height)
            if cost:
                _draw_curves(plot, panels, figures, key, cost)
                _scale_cost(plot, cost, [point[0] for model in figures for point in _points(figures[model], cost, key)], width)
            else:
                _draw_side_by_side(plot, panels, figures, key)
            plot.grid(alpha=0.3)
            plot.tick_params(labelsize=8, labelleft=number == 0)
            if number == 0:
                direction = f"\n{'lower' if key in LOWER else 'higher'} is better" * (key in LOWER | HIGHER)
                plot.set_ylabel(_plain(QUALITY.get(key, key)) + direction, fontsize=9)
    _draw_legend(figure, panels, x + (panels.width + left - right) / 2, y + panels.height - 6)


def _draw_legend(figure, panels, x, y):
    """All curves' names in lines, the lowest of which ends at `y`, with their middle at `x`."""
    line = "none" if panels.costs == [None] else "solid"
    handles = [figure.axes[0].plot([], [], linestyle=line, **panels.styles[model])[0] for model in panels.legend]
    width, height = figure.get_size_inches() * DPI
    legend = figure.legend(handles, [_short(model) for model in panels.legend], loc="lower center", fontsize=9, frameon=False,
                           ncols=panels.legend_columns, borderaxespad=0, bbox_to_anchor=(x / width, 1 - y / height))  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _draw_curves(plot, panels, figures, key, cost):
    """A curve per model, and a dashed line for every measurement that has no cost."""
    fixed = []
    for model, by_steps in figures.items():
        points = _points(by_steps, cost, key)
        if points:
            plot.errorbar(*zip(*points, strict=True), capsize=2.5, linewidth=1.5, **panels.styles[model])
        elif model not in panels.legend:
            fixed += [(row[key], model) for row in by_steps.values() if is_number(row.get(key))]
    for number, (value, model) in enumerate(sorted(fixed)):
        colour, place = panels.styles[model]["color"], number % 3  # neighbours' names do not meet
        plot.axhline(value, linestyle="--", linewidth=1.2, color=colour)
        plot.annotate(_short(model, 20), (place / 2, value), (3 - 3 * place, 3), xycoords=plot.get_yaxis_transform(),
                      textcoords="offset points", ha=("left", "center", "right")[place], fontsize=8, color=colour,
                      parse_math=False, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})  # fmt: skip


def _draw_side_by_side(plot, panels, figures, key):
    for number, (model, by_steps) in enumerate(figures.items()):
        for value, spread in _values({model: by_steps}, key):
            plot.errorbar(number, value, spread, capsize=2.5, **panels.styles[model])
    plot.set(xticks=[], xlim=(-0.6, len(figures) - 0.4))


def _scale_quality(plot, key, values, height):
    """Limits and ticks of a measure of quality, spreads included."""
    reach = [value + sign * spread for value, spread in values for sign in (-1, 1) if is_number(spread)] + [v for v, _ in values]
    if key in SHARES:
        plot.set_ylim(0, 1.06)
    elif key in LOGARITHMIC and min(value for value, _ in values) > 0:
        low, high = _widened(min(value for value in reach if value > 0), max(reach))
        plot.set_yscale("log")
        plot.set_ylim(low, high)
        _set_ticks(plot.yaxis, ticks(low, high, lambda a, b: math.log(b / a) / math.log(high / low) * height > 18))
    else:
        margin = 0.08 * (max(reach) - min(reach)) or 0.05 * abs(max(reach)) or 1
        plot.set_ylim(min(reach) - margin, max(reach) + margin)
        plot.yaxis.set_major_locator(MaxNLocator(6))


def _scale_cost(plot, cost, places, width):
    """Logarithmic axis of a cost; ticks at the numbers of network calls that there are."""
    low, high = _widened(min(places), max(places))

    def room(a, b):
        return math.log(b / a) / math.log(high / low) * width > 8 + (_text_width(f"{a:g}", 8) + _text_width(f"{b:g}", 8)) / 2

    plot.set_xscale("log")
    plot.set_xlim(low, high)
    calls = sorted(set(places), key=lambda place: (math.log2(place) % 1 != 0, place))  # powers of two first
    _set_ticks(plot.xaxis, spaced(calls, room) if cost == "nfe" else ticks(low, high, room))
    plot.set_xlabel(COST[cost], fontsize=9)


def _widened(low, high):
    """Limits of a logarithmic axis with a margin."""
    factor = max((high / low) ** 0.07, 1.12)
    return low / factor, high * factor


def _set_ticks(axis, places):
    axis.set_ticks(places, [f"{place:,g}" if place < 1e5 else f"{place:g}" for place in places])
    axis.set_minor_locator(NullLocator())


def _make_grid(rows, captions):
    columns = min(MOST_COLUMNS, max(len(images) for images in rows.values()))
    side = max(SIDES[0], min(SIDES[1], 1056 // len(rows)))
    cells = [[image and thumbnail(image, side) for image in images[:columns]] for images in rows.values()]
    sizes = [cell.size for line in cells for cell in line if cell] or [(side, side)]
    across = max(max(width for width, _ in sizes), 84 if captions else 0) + GAP  # captions need some width
    down = max(max(height for _, height in sizes), 52) + GAP  # and labels some height
    picture = Image.new("RGB", (columns * across, len(rows) * down), "white")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            if cell:
                picture.paste(cell, (x * across + (across - cell.width) // 2, y * down + (down - cell.height) // 2))
    labels = []
    for name in rows:
        first, *rest = name.split("\n")
        labels.append("\n".join([_wrap(first, LABEL_CHARACTERS, max(1, down // 18 - len(rest))), *rest]))
    font = 8 if across >= 110 else 6.8
    texts = [_wrap(caption, int(across / (font * DPI / 72 * 0.6)), CAPTION_LINES) for caption in captions[:columns]]
    left = 16 + max(_text_width(text, 9) for text in labels)
    top = 8 + round(max((text.count("\n") + 1 for text in texts if text), default=0) * font * DPI / 72 * 1.25)
    return Grid(picture, labels, texts, (across, down), left, top, font, left + picture.width + 10, top + picture.height + 10)


def _draw_grid(figure, grid, x, y):
    _axes(figure, x + grid.left, y + grid.top, *grid.picture.size).imshow(grid.picture, interpolation="nearest", aspect="auto")
    figure.axes[-1].set_axis_off()
    (across, down), (width, height) = grid.pitch, figure.get_size_inches() * DPI
    for number, text in enumerate(grid.labels):
        place = y + grid.top + (number + 0.5) * down
        figure.text((x + grid.left - 6) / width, 1 - place / height, text, fontsize=9, ha="right", va="center", parse_math=False)
    for number, text in enumerate(grid.captions):
        place = x + grid.left + (number + 0.5) * across
        figure.text(place / width, 1 - (y + grid.top - 3) / height, text, fontsize=grid.font, ha="center", va="bottom",
                    parse_math=False)  # fmt: skip


def _start(title, width, height):
    """(a figure of these pixels below its title, pixels that the title takes)."""
    lines = textwrap.wrap(title, max(20, int(width / 9.6)))
    top = 14 + 22 * len(lines) if lines else 6
    figure = Figure(figsize=(width / DPI, (height + top) / DPI), dpi=DPI)
    figure.text(0.5, 1 - 8 / (height + top), "\n".join(lines), fontsize=11, ha="center", va="top", parse_math=False)
    return figure, top


def _axes(figure, x, y, width, height):
    whole = figure.get_size_inches() * DPI
    return figure.add_axes((x / whole[0], 1 - (y + height) / whole[1], width / whole[0], height / whole[1]))


def _save(figure, path):
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=DPI)
    os.replace(temporary, path)


def _short(name, most=36):
    """`name`, its middle cut out if it is longer than `most`: checkpoints of a run differ at the end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most + most // 2 :]}"


def _plain(text):
    return text.replace("$", r"\$")


def _wrap(text, characters, lines):
    """`text` in lines of so many characters; the last line ends in … where some is cut."""
    wrapped = textwrap.wrap(text, characters)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: characters - 1].rstrip() + "…"]
    return "\n".join(wrapped)


def _text_width(text, size):
    """Pixels of the longest line."""
    widths = [TextPath((0, 0), _plain(line), size=size).get_extents().width for line in text.split("\n") if line.strip()]
    return math.ceil(max(widths, default=0) * DPI / 72)
