#!/usr/bin/env python
"""Measure tuned tables before and after, on captions and seeds that no training saw; beside them plain solvers and a long run.

Everything starts from the same noise. Standard errors come from drawing the captions anew with replacement, the same ones for all,
so that those of differences are of pairs.
"""

import json
from pathlib import Path
from typing import NamedTuple

from report_epd import SOLVERS, decode, long_run, published

from brisk import options

ROOT = Path(__file__).resolve().parents[1]
FIRST_SEED = 1_000_000  # of the images here; those of training are from 2^31 on, those of its evaluation 0, 1, 2, ...
START, LONG_RUN = "distilled", "long run"
PLAIN = (("DDIM", 1.0), ("UniPC", 1.0), ("UniPC", 2.0))  # solver, guidance
DRAWS = 300  # of captions, for the standard errors
SHOWN = 6  # images of the first seeds, and as many of the least reward at the start
MEASURES = {"reward": "reward", "all": "agreement", "frechet": "Fréchet distance", "end_error": "end error"}
NOTES = [
    "reward: what was maximised, the geometric mean of the probabilities that the oracle gives to the digit and both colours of "
    "the caption. all: share of images in which it reads just these. frechet: distance to held-out real images in the oracle's "
    "features, where less variety costs. end error: root mean square distance of end points (latents) to the long run from the "
    "same noise.",
    "steps: network calls one after the other; the points of an interval are one call, and so is a guided pair. total calls: "
    "images through the network per image, a guided pair twice. gain: reward over the distilled tables, of the same captions and "
    "noise. kl: of the policy to its start, in nats. ±: standard error.",
]  # fmt: skip


class Way(NamedTuple):
    """A way to sample, and what it drew."""

    name: str
    sampler: object  # an `epd_sampling.Sampler`
    guidance: float
    kl: float | None = None  # of a policy to its start


class Drawn(NamedTuple):
    """What a way to sample drew: a row per image."""

    images: object  # (n, 3, 32, 32) in [-1, 1]
    reward: object  # (n,)
    hit: object  # (n,) 0 or 1
    features: object  # (n, D) of the oracle
    error: object  # (n,) squared distance to the long run


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--start", required=True, help="folder of the run of train_epd.py, or predictor file, that was tuned")
    add("--run", action="append", required=True, help="folder of a run of train_epd_rl.py; may be repeated")
    add("--training_prompts", default=str(ROOT / "configs/epd/tiny_digits.txt"), help="captions that trainings read, left out here")
    add("--oracle", help="folder of the classifier that reads the images; default: the built-in one")
    add("--output_dir", required=True, help="folder for report.json, report.png, report.html and table.png")
    add("--images_per_caption", type=options.COUNT, default=5, help="each from a seed of its own")
    add("--reference_steps", type=options.number(int, low=4), default=40, help="steps of the long run")
    return options.parse(parser, argv)[0]


def read_run(folder):
    """(name, tuned `predictor.Predictor`, report.json) of a folder of a run of train_epd_rl.py. UserError."""
    import yaml

    from brisk import predictor_files

    folder = Path(folder)
    try:
        coefficient = yaml.safe_load((folder / "train_config.yaml").read_text())["ppo"]["kl_coef"]
        record = json.loads((folder / "report.json").read_text())
    except (OSError, KeyError, ValueError):
        raise options.UserError(f"--run {folder} is no folder of a finished run of train_epd_rl.py.") from None
    if not record["best"]:
        raise options.UserError(f"--run {folder} was not evaluated: train with --eval_every above 0.")
    return f"tuned, kl_coef {coefficient:g}", predictor_files.load(folder), record


def untrained(start):
    """The `Predictor` `start` with the tables that its distillation began with: points evenly spread, no factors."""
    from brisk import epd, epd_rl

    tables = epd.effective(epd.initial_raw(*start.tables.r.shape))
    return epd_rl.with_tables(start, "untrained", "distilled", epd.Tables(*(table.double() for table in tables)), None)


def make_ways(denoiser, start, tuned, steps):
    """The list of every `Way`, the long run first. Args: `tuned` {name: (`Predictor`, KL)}."""
    from brisk import epd_sampling

    calls, rate = start.nfe.para_nfe, start.model["guidance_rate"]
    ways = [Way(LONG_RUN, long_run(denoiser, steps), rate)]
    for title, guidance in PLAIN:
        name = title + f", guidance {guidance:g}" * (guidance != rate)
        ways.append(Way(name, published(SOLVERS[title], denoiser, calls).sampler, guidance))
    ways += [Way(name, epd_sampling.of_predictor(content), rate) for name, content in
             (("untrained", untrained(start)), (START, start))]  # fmt: skip
    return ways + [Way(name, epd_sampling.of_predictor(content), rate, kl) for name, (content, kl) in tuned.items()]


def draw(denoiser, way, captions, ends, reward, oracle):
    """(what a `Way` `Drawn` for the captions, from the seeds after `FIRST_SEED`; its end points). Args: `ends`: those of the long
    run, None for itself."""
    import torch

    from brisk import denoisers, epd_sampling, solvers

    found = []
    for first in range(0, len(captions), 64):
        part = captions[first : first + 64]
        x, _ = epd_sampling.start(way.sampler, denoiser, range(FIRST_SEED + first, FIRST_SEED + first + len(part)))
        with torch.no_grad():
            direction = denoisers.direction_for(denoiser, part, len(part), "cfg", way.guidance)
            found.append(solvers.last(epd_sampling.states(way.sampler, direction, x)))
    found = torch.cat(found)
    images = decode(denoiser, found)
    scores = reward.score((images + 1) / 2, captions)
    error = (found - (found if ends is None else ends)).flatten(1).square().sum(1).cpu()
    return Drawn(images, scores["handwriting"], scores["handwriting_hit"], oracle.features(images), error), found


def statistics(drawn, rows, reference):
    """{measure: value} of the images `rows`. Args: `reference`: (mean, covariance) of real images' features."""
    import numpy as np

    from brisk import metrics

    features = drawn.features[rows].double().numpy()
    return {"reward": drawn.reward[rows].mean().item(), "all": drawn.hit[rows].mean().item(),
            "end_error": drawn.error[rows].mean().sqrt().item(),
            "frechet": metrics.gaussian_frechet(features.mean(0), np.cov(features, rowvar=False), *reference)}  # fmt: skip


def measure(drawn, captions, reference):
    """{way: measurement}, its standard errors in "spread", its differences to the start and theirs in "change".

    Args: `drawn` {way: `Drawn`}; `captions`: how many there are, image i has caption i modulo that.
    """
    import torch
    from tqdm import tqdm

    from brisk import seeding

    count = len(drawn[START].reward)
    every, source = torch.arange(count).reshape(-1, captions), seeding.generator("captions")
    found = {name: statistics(values, slice(None), reference) for name, values in drawn.items()}
    again = {name: [] for name in drawn}
    for _ in tqdm(range(DRAWS), desc="standard errors", unit="draw", dynamic_ncols=True):
        rows = every[:, torch.randint(captions, (captions,), generator=source)].flatten()
        for name, values in drawn.items():
            again[name].append(statistics(values, rows, reference))

    def error(values):
        return torch.tensor(values).std().item()

    for name, row in found.items():
        change = {}
        for measure in MEASURES:
            pairs = [own[measure] - start[measure] for own, start in zip(again[name], again[START], strict=True)]
            change[measure] = [row[measure] - found[START][measure], error(pairs)]
        spread = {measure: error([own[measure] for own in again[name]]) for measure in MEASURES}
        found[name] = row | {"spread": spread | {"gain": change["reward"][1]}, "gain": change["reward"][0], "change": change}
    return found


def conclusion(name, row, start, count, captions):
    """A sentence that compares tuned tables with the distilled ones, from the numbers alone."""
    gain, error = row["change"]["reward"]
    word = "a gain" if gain > 2 * error else "a loss" if gain < -2 * error else "within two standard errors, no proof of a gain"
    others = "; ".join(f"{MEASURES[measure]} {start[measure]:.3g} -> {row[measure]:.3g} ({row['change'][measure][0]:+.2g} ± "
                       f"{row['change'][measure][1]:.2g})" for measure in MEASURES if measure != "reward")  # fmt: skip
    return (f"{name[0].upper()}{name[1:]}: mean reward of {count} images of {captions} captions {start['reward']:.4f} -> "
            f"{row['reward']:.4f}, {gain:+.4f} ± {error:.4f}: {word}. {others}. KL to the start {row['kl']:.3g} nats.")  # fmt: skip


def draw_picture(path, title, samples, courses, rows, colours):
    """Samples beside the course of training, and beside where every way to sample stands in reward and Frechet distance.

    Args: `samples` {way: images (N, 3, 32, 32)}; `courses` {tuned: rows of evaluation}; `rows`: `measure`'s; `colours`
    {way: colour}.
    """
    from matplotlib.figure import Figure

    from brisk import demo_reports

    figure = Figure(figsize=(16, 0.62 * len(samples) + 1.3))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1))
    lines = demo_reports.draw_samples(left, samples, {"left": 0.18, "bottom": 0.02, "top": 0.88}, parted=SHOWN)
    lines[0].set_title("first seeds  |  those that the distilled tables have the least reward for", fontsize=9)
    course, trade = right.subplots(1, 2, gridspec_kw={"left": 0.09, "right": 0.99, "wspace": 0.27, "bottom": 0.1, "top": 0.88})
    for name, history in courses.items():
        values = [[row[key] for row in history] for key in ("step", "reward", "standard_error", "kl")]
        course.errorbar(*values[:3], marker="o", capsize=3, color=colours[name], label=name)
        for step, reward, _, kl in list(zip(*values, strict=True))[1:]:
            course.annotate(f"KL {kl:.2g}", (step, reward), (0, -13), textcoords="offset points", ha="center", fontsize=7,
                            color=colours[name])  # fmt: skip
    course.set(xlabel="updates", ylabel="reward ± standard error")
    course.set_title("evaluations in training", fontsize=8.5)
    course.legend(loc="lower right")
    for name, row in rows.items():
        place = (row["frechet"], row["reward"])
        trade.errorbar(*place, row["change"]["reward"][1], row["change"]["frechet"][1], marker="o", capsize=2, color=colours[name])
        trade.annotate(name, place, (5, -12 if name == START else 5), textcoords="offset points", fontsize=8, color=colours[name])
    trade.set(xlabel="Fréchet distance to real images", ylabel="reward")
    trade.set_title("other captions and seeds, ± of differences to distilled", fontsize=8.5)
    trade.margins(x=0.3)
    for plot in (course, trade):
        plot.grid(alpha=0.3, which="both")
    figure.suptitle(title, fontsize=12, y=0.995)
    figure.savefig(path, dpi=110)


def main(argv=None):
    args = parse_args(argv)
    import numpy as np  # noqa: I001
    import torch
    from tqdm import tqdm

    from brisk import builtin_protocol, demo_reports, denoiser_sources, epd_pictures, epd_sampling, predictor_files, rewards
    from brisk import runlog

    runlog.quiet_libraries()
    oracle = builtin_protocol.load_oracle(args.oracle)
    start, runs = predictor_files.load(args.start), [read_run(folder) for folder in args.run]
    if len({name for name, _, _ in runs}) < len(runs):
        raise options.UserError("--run: two runs have the same ppo.kl_coef; the report could not tell them apart.")
    captions = builtin_protocol.unseen_captions(args.training_prompts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser = denoiser_sources.load(epd_sampling.complete(denoiser_sources.ModelOptions(), start), device)
    reward = rewards.load(rewards.RewardSettings(type="handwriting", batch_size=64), device)
    real = builtin_protocol.held_out(oracle).double().numpy()
    reference = (real.mean(0), np.cov(real, rowvar=False))

    tuned = {name: (content, record["best"]["kl"]) for name, content, record in runs}
    ways = make_ways(denoiser, start, tuned, args.reference_steps)
    wanted, drawn, ends = captions * args.images_per_caption, {}, None
    for way in tqdm(ways, desc="Sampling", unit="way", dynamic_ncols=True):
        drawn[way.name], found = draw(denoiser, way, wanted, ends, reward, oracle)
        ends = found if ends is None else ends
    rows = measure(drawn, len(captions), reference)
    figures, notes = {}, []
    for way in ways:
        cost = epd_sampling.cost(way.sampler, way.guidance != 1)
        row = rows[way.name] | {"total_calls": cost.total_nfe * (1 + (way.guidance != 1))}
        if way.kl is not None:
            row["kl"] = way.kl
            notes.append(conclusion(way.name, row, rows[START], len(wanted), len(captions)))
        figures[way.name] = {str(cost.para_nfe): row}

    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    shown = [*range(SHOWN), *drawn[START].reward.argsort()[:SHOWN].tolist()]
    samples = {name: values.images[shown] for name, values in drawn.items()}
    names, greys = list(tuned), {way.name: "dimgray" for way in ways}
    colours = greys | {START: "black", LONG_RUN: "C2"} | {name: f"C{3 + place}" for place, name in enumerate(names)}
    courses = {name: record["history"] for name, _, record in runs}
    title = "brisk: EPD tables tuned by a reward, on the built-in teacher"
    compared = {name: row for name, row in rows.items() if name != "untrained"}  # that one is far below
    draw_picture(output / "report.png", title, samples, courses, compared, colours)
    predictors = {"untrained": untrained(start), START: start} | {name: content for name, (content, _) in tuned.items()}
    epd_pictures.draw_tables(output / "table.png", list(predictors.values()), list(predictors))
    facts = {"images": len(wanted), "held_out_captions": len(captions), "first_seed": FIRST_SEED,
             "reference": f"{len(real)} tinted held-out scans", "start": args.start,
             "runs": dict(zip(tuned, args.run, strict=True)), "courses": courses,
             "environment": runlog.environment()}  # fmt: skip
    tables = {"captions and seeds that no training saw": figures}
    demo_reports.write(output, title, {**figures, "conclusions": notes}, tables, facts, NOTES, notes, ("report.png", "table.png"))


if __name__ == "__main__":
    options.run(main)
