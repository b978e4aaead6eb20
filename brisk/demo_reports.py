"""What the reports of the methods' demos share: rows of samples, points of curves, plain numbers on axes, the files of a report."""

import json

from brisk import report
from brisk.checkpoint import write_atomically


def draw_samples(figure, rows, spacing, columns=(), parted=0):
    """Rows of samples in a matplotlib (sub)figure, their names at the left; returns the axes, one per row.

    Args: `rows` {name: images (N, 3, H, W) in [-1, 1]}, N the same in all; `spacing`: where they are in the figure, as in
    matplotlib's gridspec_kw; `columns`: a name per column; `parted`: so many columns stand apart from the others.
    """
    from torch.nn.functional import pad

    axes = figure.subplots(len(rows), 1, squeeze=False, gridspec_kw={"hspace": 0.05, "right": 0.995, **spacing})[:, 0]
    for place, (name, images) in zip(axes, rows.items(), strict=True):
        strip = pad(images, (0, 1), value=1).permute(2, 0, 3, 1).flatten(1, 2)[:, :-1]  # side by side, white between
        place.imshow((strip + 1) / 2)
        place.set(xticks=[], yticks=[])
        place.spines[:].set_visible(False)
        place.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        if parted:
            place.axvline(parted * (images.shape[-1] + 1) - 1, color="white", linewidth=5)
    if columns:
        pitch = images.shape[-1] + 1
        axes[0].xaxis.tick_top()
        axes[0].tick_params(length=0)
        axes[0].set_xticks([pitch * (number + 0.5) - 1 for number in range(len(columns))], columns)
    return axes


def points(rows, axis, measure):
    """(places, values, spreads), tuples sorted by place, of a curve of `measure` over `axis`, both keys of the measurements."""
    return tuple(zip(*sorted((row[axis], row[measure], row.get("spread", {}).get(measure, 0)) for row in rows), strict=True))


def plain_numbers(axis, between):
    """Write the ticks of a logarithmic matplotlib axis as plain numbers, also at these multiples `between` the powers of ten."""
    from matplotlib.ticker import LogLocator

    axis.set_minor_locator(LogLocator(subs=between))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("{x:,g}")


def write(folder, title, record, tables, facts, notes, conclusions=(), pictures=("report.png",)):
    """Write report.json (`record` and `facts`) and report.html beside report.png; print tables, conclusions and where it all is.

    Args: `tables` {heading: figures}; `notes`: what the figures are, and `conclusions`: what they say, lists of sentences;
    `pictures`: the names of those in `folder`.
    """
    write_atomically(folder / "report.json", json.dumps({**record, **facts}, indent=1) + "\n")
    report.write_page(folder, title, list(tables.values()), facts, [*notes, *conclusions])
    for heading, figures in tables.items():
        print(f"\n{heading}\n{report.text_table(figures)}")
    if conclusions:
        print("\n" + "\n".join(conclusions))
    print(f"\n{folder}/report.html  report.json  {'  '.join(pictures)}")
