"""A measurement as people read it: a text table, one picture, and a page that needs no network."""

import base64
import html
import json
from pathlib import Path

from brisk.checkpoint import write_atomically

COLUMNS = {
    "reward": ".3g", "gain": ".3g", "kl": ".3g",
    "end_error": ".3g", "agreement": ".3g", "digit": ".3g", "foreground": ".3g", "background": ".3g", "all": ".3g",
    "frechet": ".3g", "psnr_to_teacher": ".3g", "total_calls": "d", "seconds_per_image": ".4f", "seconds_alone": ".4f",
    "network_calls": ".3g", "budget": "d", "blocks": ",d", "gmacs_per_image": ".3g", "parameters": ",d",
    "gmacs": ".3g", "weights_mib": ".3g", "activations_mib": ".3g", "seconds_per_step": ".3f", "scheduler": "",
}  # fmt: skip
AXES = {"network_calls": ("U-Net evaluations per image", "log"), "parameters": ("parameters of the U-Net", "linear")}


def rows_of(figures):
    """[(model, steps, measurement)] of {"model": {"steps": measurement}}, the order kept."""
    return [(model, steps, row) for model, by_steps in figures.items() for steps, row in by_steps.items()]


def columns_of(figures):
    """The names of `COLUMNS` that any measurement has."""
    return [name for name in COLUMNS if any(name in row for _, _, row in rows_of(figures))]


def _cells(row, columns):
    cells = []
    for name in columns:
        text = f"{row[name]:{COLUMNS[name]}}" if name in row else ""
        if name in row.get("spread", {}):
            text = f"{row[name]:.3f} ± {row['spread'][name]:.3f}"
        cells.append(text)
    return cells


def text_table(figures):
    """The measurements as an aligned text table."""
    columns = columns_of(figures)
    lines = [["model", "steps", *columns]]
    lines += [[model, steps, *_cells(row, columns)] for model, steps, row in rows_of(figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def draw_picture(path, figures, pictures, prompts, title, axis):
    """Samples of every row beside plots of agreement and Frechet distance.

    Args: `pictures` {(model, steps): list of PIL images}, one per prompt of `prompts`; `axis`: what the plots are over,
    a name in `AXES`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    rows = [(model, steps) for model, steps, _ in rows_of(figures)]
    columns = len(prompts)
    tall = max(0.66 * len(rows) + 1.2, 5.2)  # room for the labels of the plots
    figure = plt.figure(figsize=(0.66 * columns + 7.6, tall))
    left, right = figure.subfigures(1, 2, width_ratios=(0.66 * columns + 1.4, 6.2))
    spacing = {"wspace": 0.05, "hspace": 0.05, "left": 0.19, "right": 0.99, "bottom": 0.03, "top": 1 - 1.0 / tall}
    axes = left.subplots(len(rows), columns, squeeze=False, gridspec_kw=spacing)
    for line, key in zip(axes, rows, strict=True):
        for cell, image in zip(line, pictures[key], strict=True):
            cell.imshow(image)
            cell.set_xticks([])
            cell.set_yticks([])
        steps = f"{key[1]} step" + "s" * (key[1] != "1")
        line[0].set_ylabel(f"{key[0]}\n{steps}", rotation=0, ha="right", va="center", fontsize=9)
    for cell, prompt in zip(axes[0], prompts, strict=True):
        words = prompt.split()
        cell.set_title(f"{words[1]}\n{words[3]}\non {words[6]}", fontsize=8)
    quality, distance = right.subplots(2, 1, sharex=True, gridspec_kw={"top": 1 - 0.7 / tall, "bottom": 0.09})
    for model, by_steps in figures.items():
        points = sorted((row[axis], row["all"], row["frechet"]) for row in by_steps.values())
        places, agreement, frechet = zip(*points, strict=True)
        quality.plot(places, agreement, "o-", label=model)
        distance.plot(places, frechet, "o-", label=model)
    label, scale = AXES[axis]
    quality.set(ylabel="agreement with the prompt", ylim=(0, 1.03), xscale=scale)
    distance.set(ylabel="Fréchet distance to real images", yscale="log", xlabel=label)
    for plot in (quality, distance):
        plot.grid(alpha=0.3)
        plot.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        plot.xaxis.set_minor_formatter("")
    # plain numbers on the logarithmic scale too, at 2 and 5 as well for ranges below a decade
    distance.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    for set_formatter in (distance.yaxis.set_major_formatter, distance.yaxis.set_minor_formatter):
        set_formatter("{x:g}")
    quality.legend(loc="center right")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem; font-variant-numeric: tabular-nums }}
td, th {{ padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }}
td:nth-child(-n+2), th:nth-child(-n+2), td:last-child, th:last-child {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto }}
</style></head><body><h1>{title}</h1>{notes}
{tables}<p><img alt="samples and plots" src="data:image/png;base64,{picture}"></p>
<h2>How it was measured</h2><pre>{facts}</pre></body></html>
"""


def write_report(folder, title, figures, facts, notes, pictures, prompts, axis="network_calls"):
    """Write report.json (`figures` and `facts`), report.png and report.html into `folder`; returns the text table."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_picture(folder / "report.png", figures, pictures, prompts, title, axis)
    write_atomically(folder / "report.json", json.dumps({**figures, **facts}, indent=1) + "\n")
    write_page(folder, title, [figures], facts, notes)
    return text_table(figures)


def write_page(folder, title, tables, facts, notes):
    """Write report.html into `folder` beside report.png, which it holds. Args: `tables`: figures, one table each."""
    page = PAGE.format(
        title=html.escape(title), notes="".join(f"<p>{html.escape(note)}</p>" for note in notes),
        tables="".join(map(_html_table, tables)), facts=html.escape(json.dumps(facts, indent=1)),
        picture=base64.b64encode((Path(folder) / "report.png").read_bytes()).decode(),
    )  # fmt: skip
    write_atomically(Path(folder) / "report.html", page)


def _html_table(figures):
    columns = columns_of(figures)
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in ("model", "steps", *columns))
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in (model, steps, *_cells(row, columns))) + "</tr>"
        for model, steps, row in rows_of(figures)
    )
    return f"<table><tr>{head}</tr>{body}</table>"
