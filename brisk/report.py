"""A measurement as people read it: text table, CSV, JSON, pictures, and a page that needs no network.

Figures are {model: {steps, network calls or "images": measurement}}, a measurement {name: value} with the spreads of some values
under "spread".
"""

import base64
import csv
import html
import io
import json
import math
from pathlib import Path

from brisk import report_pictures
from brisk.checkpoint import write_atomically

QUALITY = {
    "reward": ".4g", "gain": ".3g", "kl": ".3g", "end_error": ".3g", "agreement": ".3g", "digit": ".3g", "foreground": ".3g",
    "background": ".3g", "all": ".3g", "frechet": ".4g", "fid": ".4g", "kid": ".3g", "inception_score": ".4g",
    "precision": ".3g", "recall": ".3g", "clip": ".4g", "hps": ".4g", "pickscore": ".4g", "imagereward": ".4g",
    "aesthetic": ".4g", "mps": ".4g", "psnr_to_teacher": ".3g",
}  # fmt: skip
COST = {
    "nfe": ".4g", "total_nfe": ".4g", "total_calls": "d", "network_calls": ".3g", "seconds_alone": ".4g",
    "seconds_per_image": ".4g", "budget": "d", "blocks": ",d", "gmacs_per_image": ".4g", "gmacs": ".3g", "parameters": ",d",
    "weights_mib": ".3g", "activations_mib": ".3g", "peak_memory_gib": ".3g", "seconds_per_step": ".3f", "images": ",d",
    "unreadable": ",d", "guidance_scale": "g", "scheduler": "",
}  # fmt: skip
COLUMNS = QUALITY | COST
# what a terminal has no room for
MINOR = frozenset({"digit", "foreground", "background", "images", "guidance_scale", "peak_memory_gib", "gmacs_per_image"})
OTHER = ".4g"  # of a measure that has a spread, and is none of `COLUMNS`
# what stands beside the models in report.json: no model can have such a name
RESERVED = frozenset({"protocol", "record", "models", "scores", "captions", "environment"})


def rows_of(figures):
    """[(model, steps, measurement)] of {"model": {"steps": measurement}}, the order kept."""
    return [(model, steps, row) for model, by_steps in figures.items() for steps, row in by_steps.items()]


def columns_of(figures):
    """The names in a table's head: those of `COLUMNS` that any measurement has, and measures beside them that have a spread.

    Without nfe where the second column says it, and without unreadable images where there are none.
    """
    rows = rows_of(figures)
    others = dict.fromkeys(name for _, _, row in rows for name in row.get("spread", {}) if name not in COLUMNS)
    found = [name for name in (*QUALITY, *others, *COST) if any(row.get(name) is not None for _, _, row in rows)]
    said = all(row.get("nfe") is None or str(row["nfe"]) == steps for _, steps, row in rows)
    left_out = {"nfe"} if said else set()
    left_out |= set() if any(row.get("unreadable") for _, _, row in rows) else {"unreadable"}
    return [name for name in found if name not in left_out]


def text_table(figures, narrow=False):
    """The measurements as an aligned text table; `narrow`: without `MINOR` columns, for a terminal."""
    columns = [name for name in columns_of(figures) if not narrow or name not in MINOR]
    lines = [["model", _second(figures), *columns]]
    lines += [[model, steps, *_cells(row, columns)] for model, steps, row in rows_of(figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write_csv(path, figures):
    """Write a line per measurement: model, nfe (empty for images), every value in full and its spread as NAME_spread."""
    rows, fields = [], {"model": None, "nfe": None}
    for model, steps, row in rows_of(figures):
        spread = row.get("spread", {})
        line = {"model": model, "nfe": "" if steps == "images" else steps}
        for name in [name for name in COLUMNS if name in row] + [name for name in row if name not in COLUMNS]:
            if isinstance(row[name], (int, float, str)):
                line[name] = row[name]
                if name in spread:
                    line[f"{name}_spread"] = spread[name]
        fields |= dict.fromkeys(line)
        rows.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), text.getvalue())


def write_report(folder, title, figures, facts, notes, samples, captions):
    """Write report.json (`figures` and `facts`), .csv, .png and .html and frontier.png into `folder`; returns the text table.

    Args: `facts`: what is on record beside the figures, under names in `RESERVED`; `notes`: paragraphs, the first of which says
    what was measured; `samples` {(model, steps): list of PIL images, None for one that is missing}; `captions`: of the images of
    a row, or [].
    Raises ValueError for a fact that is not in `RESERVED`, or a model that is.
    """
    wrong = (set(facts) - RESERVED) | (set(figures) & RESERVED)
    if wrong:
        raise ValueError(f"{', '.join(sorted(wrong))}: facts have names in report.RESERVED, models others")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(_finite({**figures, **facts}), indent=1, allow_nan=False) + "\n")
    write_csv(folder / "report.csv", figures)
    for name in ("report.png", "frontier.png"):
        (folder / name).unlink(missing_ok=True)  # of other figures
    samples = {report_pictures.label(*key): images for key, images in samples.items() if images}
    shown = report_pictures.draw_report(folder / "report.png", title, figures, samples, captions)
    report_pictures.draw_frontier(folder / "frontier.png", figures, title)
    more = shown is not None and shown != report_pictures.quality_keys(figures)
    pictures = [] if shown is None else ["report.png", *["frontier.png"] * more]
    write_page(folder, title, [figures], facts, notes, pictures, captions if samples else ())
    return text_table(figures, narrow=True)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 100rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
.table {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin-bottom: 1.5rem; font-size: .85rem; font-variant-numeric: tabular-nums }}
td, th {{ padding: .25rem .5rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: bottom }}
td {{ white-space: nowrap }} small {{ color: #777 }}
td:first-child, th:first-child {{ position: sticky; left: 0; background: #fff }}
td:nth-child(-n+2), th:nth-child(-n+2), td.words, th.words {{ text-align: left }}
img {{ max-width: 100% }} pre {{ background: #f6f6f6; padding: 1rem; white-space: pre-wrap }}
</style></head><body><h1>{title}</h1>{summary}
{tables}{pictures}{captions}{notes}
<h2>How it was measured</h2><pre>{facts}</pre></body></html>
"""


def _finite(value):
    """`value` without the numbers that JSON does not know: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(folder, title, tables, facts, notes, pictures=("report.png",), captions=()):
    """Write report.html into `folder`.

    Args: `tables`: figures, one table each; `notes`: paragraphs, the first goes above the tables; `pictures`: files in `folder`,
    which the page holds; `captions`: of the columns of samples.
    """
    sources = [base64.b64encode((Path(folder) / name).read_bytes()).decode() for name in pictures]
    paragraphs = [f"<p>{html.escape(note)}</p>" for note in notes]
    items = "".join(f"<li>{html.escape(caption)}</li>" for caption in captions)
    page = PAGE.format(
        title=html.escape(title), summary="".join(paragraphs[:1]), notes="".join(paragraphs[1:]),
        tables="".join(map(_html_table, tables)), facts=html.escape(json.dumps(facts, indent=1)),
        pictures="".join(f'<p><img alt="samples and plots" src="data:image/png;base64,{source}"></p>' for source in sources),
        captions=f"<p>Samples from left to right:</p><ol>{items}</ol>" if items else "",
    )  # fmt: skip
    write_atomically(Path(folder) / "report.html", page)


def _second(figures):
    """What the second column is called."""
    return "nfe" if any("nfe" in row or steps == "images" for _, steps, row in rows_of(figures)) else "steps"


def _cells(row, columns):
    return [_cell(row, name) if row.get(name) is not None else "" for name in columns]


def _cell(row, name):
    """A value as text, with its spread in two digits and as many decimals as that."""
    value, spread = row[name], row.get("spread", {}).get(name)
    if spread is None or not math.isfinite(spread) or not math.isfinite(value):
        form = COLUMNS.get(name, OTHER)
        plain = form.endswith("g") and 1e4 <= abs(value) < 1e12  # else they would have an exponent
        return f"{value:{',.0f' if plain else form}}"
    decimals = 3 if spread == 0 else 1 - math.floor(math.log10(abs(spread)))
    if value:
        decimals = min(decimals, 4 - math.floor(math.log10(abs(value))))  # five digits of a value are enough
    decimals = max(decimals, 0)
    return f"{value:.{decimals}f} ± {spread:.{decimals}f}"


def _best(figures, columns):
    """{column: its best value} of the columns in which measurements differ and some are better."""
    found = {}
    for name in columns:
        values = [row[name] for _, _, row in rows_of(figures) if report_pictures.is_number(row.get(name))]
        if len(set(values)) > 1:
            found[name] = report_pictures.better(name, values)
    return found


def _html_table(figures):
    columns = columns_of(figures)
    best = _best(figures, columns)

    def head(name):
        arrow = " ↓" if name in report_pictures.LOWER else " ↑" if name in report_pictures.HIGHER else ""
        return f"<th{_words(name)}>{html.escape(name.replace('_', ' '))}{arrow}</th>"

    def cell(row, name, text):
        value, plus_minus, spread = html.escape(text).partition(" ± ")
        marked = f"<b>{value}</b>" if best.get(name) is not None and row.get(name) == best[name] else value
        marked += f" <small>±{spread}</small>" if plus_minus else ""
        return f"<td{_words(name)}>{marked}</td>"

    lines = "".join(
        f"<tr><td>{html.escape(model)}</td><td>{html.escape(steps)}</td>"
        + "".join(cell(row, name, text) for name, text in zip(columns, _cells(row, columns), strict=True)) + "</tr>"
        for model, steps, row in rows_of(figures)
    )  # fmt: skip
    names = "".join(map(head, columns))
    return f'<div class="table"><table><tr><th>model</th><th>{_second(figures)}</th>{names}</tr>{lines}</table></div>'


def _words(name):
    return ' class="words"' if name == "scheduler" else ""
