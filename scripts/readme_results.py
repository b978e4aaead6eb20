#!/usr/bin/env python
"""Write the tables of results in README.md and docs/ from the reports kept in docs/reports/; no figure in them is typed by hand.

A table stands between `<!-- results: NAME -->` and `<!-- end of results -->`. --add takes the report of a run of a demo.
"""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from brisk import options

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs/reports"
MARKED = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
QUALITY = (("digit", "digit", ".3f"), ("foreground", "foreground", ".3f"), ("background", "background", ".3f"),
           ("all three", "all", ".3f"), ("Fréchet", "frechet", ".2f"))  # fmt: skip
TIME = ("ms per image", "seconds_per_image", "ms")


class Table(NamedTuple):
    """What a table shows of a report."""

    command: str  # that made the report
    report: str  # name of its file in docs/reports
    models: dict  # {name in the report: name in the table}
    columns: tuple  # (header, key of the row, format)
    root: str | None = None  # the key under which the report has its figures
    steps: str = "calls"  # header of the second column
    only: tuple | None = None  # (key, value) that rows must have


TABLES = {
    "quickstart": Table(
        "bash scripts/quickstart.sh", "quickstart",
        {"teacher": "teacher", "student": "**SLAM student**", "lcm": "LCM, same budget"}, (*QUALITY, TIME),
    ),
    "bksdm": Table(
        "bash scripts/demo_bksdm.sh", "demo_bksdm",
        {"teacher": "teacher", "before": "student before training", "student": "**BK-SDM student**",
         "random": "same, from random weights"},
        (("parameters", "parameters", ",d"), ("GMACs per image", "gmacs_per_image", ".2f"), *QUALITY[3:],
         ("PSNR to teacher", "psnr_to_teacher", ".1f"), TIME),
    ),
    "stack": Table(
        "bash scripts/demo_stack.sh", "demo_stack",
        {"teacher": "teacher", "bksdm": "BK-SDM", "slam": "SLAM", "epd": "EPD", "bksdm+slam": "**BK-SDM, then SLAM**",
         "bksdm+epd": "**BK-SDM, then EPD**"},
        (("parameters", "parameters", ",d"), *QUALITY[3:], ("GMACs per image", "gmacs_per_image", ".2f"),
         ("ms alone", "seconds_alone", "ms"), TIME),
    ),
    "fpdm": Table(
        "bash scripts/demo_fpdm.sh", "demo_fpdm",
        {"DiT": "DiT", "FPDM, 2 iterations": "FPDM, 2 iterations", "FPDM, 4 iterations, reuse": "FPDM, 4, reuse",
         "FPDM, 8 iterations, reuse": "FPDM, 8, reuse", "FPDM, 26 iterations": "FPDM, 26 iterations"},
        (("GMACs per image", "gmacs_per_image", ".3f"), ("digit", "digit", ".3f"), ("Fréchet", "frechet", ".2f")),
        "sampling", "timesteps", ("budget", 5),
    ),
    "epd": Table(
        "bash scripts/demo_epd.sh", "demo_epd",
        {"EPD, K=2": "**EPD-Solver, K=2**", "EPD for iPNDM, K=2": "**EPD for iPNDM, K=2**", "UniPC, chosen": "UniPC, levels chosen",
         "iPNDM, chosen": "iPNDM, levels chosen", "DDIM, chosen": "DDIM, levels chosen", "DDIM": "DDIM"},
        (("calls in all", "total_calls", "d"), ("distance to the long run", "end_error", ".2f"),
         ("agreement with it", "agreement", ".3f"), ("Fréchet", "frechet", ".2f")),
        "without captions",
    ),
}  # fmt: skip


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    parser.add_argument("--add", action="append", default=[], metavar="NAME=FILE",
                        help="take this report.json as docs/reports/NAME.json")  # fmt: skip
    options.add_flag(parser, "--check", "change nothing; exit with 1 if a table is not what its report says")
    args, _ = options.parse(parser, argv)
    return args


def cell(row, key, form):
    """A figure of a row as it stands in the table, with its spread."""
    if key not in row:
        return ""
    if form == "ms":
        return f"{row[key] * 1000:.1f}"
    spread = row.get("spread", {}).get(key)
    return f"{row[key]:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")


def rows_of(table, report):
    """The rows of a `Table` as lists of text."""
    figures = report[table.root] if table.root else report
    lines = []
    for model, name in table.models.items():
        for steps, row in figures.get(model, {}).items():
            if table.only is None or row.get(table.only[0]) == table.only[1]:
                label = f"{name} ({row['scheduler']})" if model == "teacher" and row.get("scheduler") else name
                lines.append([label, steps, *(cell(row, key, form) for _, key, form in table.columns)])
    return lines


def origin(table, report):
    """The line below a table: which command at which commit on which machine, and how many images."""
    facts, record = report["environment"], report.get("record", {})
    images = record["samples"] * record["seeds"] if record else report["samples_per_seed"] * report["seeds"]
    seeds = record.get("seeds", report.get("seeds"))
    text = (f"`{table.command}`, commit {facts['commit'][:7]}, {facts['cpu_cores']} cores, {facts['device']}, "
            f"torch {facts['packages']['torch']}; {images:,} images per row in {seeds} sets, ± is the standard deviation over "
            "them.")  # fmt: skip
    return textwrap.fill(text, 118)


def render(name):
    """A table in Markdown. UserError for a name or report that is not there."""
    if name not in TABLES:
        raise options.UserError(f"there is no table called {name}, only {', '.join(TABLES)}.")
    table = TABLES[name]
    try:
        report = json.loads((FOLDER / f"{table.report}.json").read_text())
    except (OSError, ValueError) as error:
        raise options.UserError(f"docs/reports/{table.report}.json cannot be read ({error}); run {table.command} and give --add "
                                f"{table.report}=REPORT.") from None  # fmt: skip
    lines = [["model", table.steps, *(header for header, _, _ in table.columns)]]
    lines += [["---"] * len(lines[0]), *rows_of(table, report)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{origin(table, report)}\n"


def update(text):
    """A page with every marked table written anew."""
    return MARKED.sub(lambda match: match[1] + "\n" + render(match[2]) + "\n" + match[3], text)


def main(argv=None):
    args = parse_args(argv)
    for given in args.add:
        name, equals, file = given.partition("=")
        if not equals or name not in {table.report for table in TABLES.values()} or not Path(file).is_file():
            names = ", ".join(dict.fromkeys(table.report for table in TABLES.values()))
            raise options.UserError(f"--add '{given}' is not NAME=FILE with NAME one of {names} and a file that is there.")
        FOLDER.mkdir(exist_ok=True)
        shutil.copy(file, FOLDER / f"{name}.json")
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = path.read_text()
        after = update(before)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if not args.check:
                path.write_text(after)
    print(f"{'Not what the reports say' if args.check else 'Written'}: {', '.join(map(str, stale)) or 'nothing'}")
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    options.run(main)
