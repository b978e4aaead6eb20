#!/usr/bin/env python
"""Measure distilled predictors beside plain solvers, at as many network calls in turn and at as many calls in all.

Per setting (without prompts, or guided) everything starts from the same noise, which no training saw, with captions that are not
in the file that training read. The end point of a solver is compared with that of a run of hundreds of steps.
"""

import statistics
import time
from pathlib import Path
from typing import NamedTuple

from brisk import options

ROOT = Path(__file__).resolve().parents[1]
SOLVERS = {"DDIM": "euler", "Heun": "heun", "DPM-Solver-2": "dpm2", "iPNDM": "ipndm", "DEIS": "deis", "DPM-Solver++": "dpmpp",
           "UniPC": "unipc"}  # fmt: skip
OURS = {"epd": "EPD", "ipndm": "EPD for iPNDM"}
ORDERS = (2, 3)  # of the multistep solvers, where they are chosen; else 3
CHOICES = ("discrete", "polynomial", "logsnr")  # of noise levels
TUNED = ", chosen"  # ends the name of a solver whose levels, order and first step were chosen
SHOWN = 12  # samples per row of the picture
NOTES = [
    "end error: root mean square, over images, of the Euclidean distance between the end point (latents) and that of the long "
    "run from the same noise. agreement: share of images in which the oracle reads the same digit and colours as in the image of "
    "the long run. frechet: distance to held-out real images in the oracle's features, all seeds together. ±: standard deviation "
    "over seeds.",
    "steps: network calls one after the other, counted at the network; a guided pair is one call, and so are the points of an "
    "interval. calls in all: images through the network per image, a guided pair once. seconds per image: in full batches, where "
    "points in parallel cost what they weigh; seconds alone: one image at a time.",
    "A plain solver has the noise levels that it was published with (its first direction in closed form where that alone gives "
    "the number of calls); \"chosen\": those of {choices} levels, orders {orders} and first steps (network or closed form) that "
    "had the least end error on {count} other images.",
]  # fmt: skip


class Plan(NamedTuple):
    """A way to sample."""

    sampler: object  # an `epd_sampling.Sampler`
    levels: str  # its schedule, in words


class Setting(NamedTuple):
    """What all ways to sample share: how the model is conditioned, the noise, and where the long run ends."""

    denoiser: object
    guidance: tuple  # (type, rate)
    prompts: list  # captions that training did not see
    noise: list  # per seed (images, ...) standard normal
    ends: list  # per seed latents
    images: list  # per seed (images, 3, H, W) in [-1, 1]


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--predictor", action="append", required=True, help="folder of a training run, or predictor file; may be repeated")
    add("--training_prompts", default=str(ROOT / "configs/epd/tiny_digits.txt"), help="captions that trainings read, left out here")
    add("--oracle", help="folder of the classifier that reads the images; default: the built-in one")
    add("--output_dir", required=True, help="folder for report.json, report.png, report.html and table.png")
    add("--samples", type=options.number(int, low=50), default=64, help="images per seed")
    add("--seeds", type=options.COUNT, default=3, help="number of seeds; the spread over them is reported")
    add("--reference_steps", type=options.number(int, low=4), default=200, help="steps of the long run")
    add("--solvers", default=",".join(SOLVERS), help="plain solvers to compare with")
    args, _ = options.parse(parser, argv)
    args.solvers = args.solvers.split(",")
    for name in args.solvers:
        if name not in SOLVERS:
            raise options.UserError(f"--solvers: '{name}' is none of {', '.join(SOLVERS)}.")
    return args


def say_guidance(guidance):
    """A setting in words."""
    kind, rate = guidance
    return {None: "with captions, no guidance", "uncond": "without captions"}.get(kind) or f"with captions, guidance {rate:g}"


def direction_of(setting, count):
    """The closure of `count` samples; see `denoisers.direction_for`."""
    from brisk import denoisers

    kind, rate = setting.guidance
    prompts = [setting.prompts[place % len(setting.prompts)] for place in range(count)]
    return denoisers.direction_for(setting.denoiser, prompts, count, kind, rate or 1.0)


def solve(setting, sampler, noise):
    """End points (B, ...) of standard normal `noise` (B, ...)."""
    import torch

    from brisk import epd_sampling, solvers

    with torch.no_grad():
        start = noise * float(sampler.sigmas[0])
        return solvers.last(epd_sampling.states(sampler, direction_of(setting, len(noise)), start))


def long_run(denoiser, steps):
    """The `epd_sampling.Sampler` that others are compared with: iPNDM of order 4 with `steps` steps on polynomial levels."""
    from brisk import epd_sampling, solvers

    return epd_sampling.of_solver("ipndm", denoiser, steps + 1, "polynomial", options=solvers.SolverOptions(max_order=4))


def decode(denoiser, ends):
    """Images (B, 3, H, W) in [-1, 1] on the CPU."""
    import torch

    with torch.no_grad():
        return denoiser.decode(ends).clamp(-1, 1).cpu()


def make_setting(denoiser, guidance, prompts, args):
    """(the `Setting` with noise of all seeds and one more, to choose on; end error of the long run at half its steps)."""
    import torch

    from brisk import epd_distill, seeding

    counts = [*[args.samples] * args.seeds, args.samples // 2]
    noise = [torch.randn(count, *denoiser.shape, generator=seeding.generator(seed, "report", device=denoiser.device),
                         device=denoiser.device) for seed, count in enumerate(counts)]  # fmt: skip
    setting = Setting(denoiser, guidance, prompts, noise, [], [])
    for start in noise:
        setting.ends.append(solve(setting, long_run(denoiser, args.reference_steps), start))
        setting.images.append(decode(denoiser, setting.ends[-1]))
    rough = solve(setting, long_run(denoiser, args.reference_steps // 2), noise[0])
    return setting, epd_distill.end_error(rough, setting.ends[0]).item()


def frechet_of_long_run(setting, oracle, reference, args):
    """The Frechet distance of the long run's images, of the seeds that are measured."""
    import torch

    from brisk import metrics

    return metrics.frechet_distance(oracle.features(torch.cat(setting.images[: args.seeds])), reference)


def plan_of(name, denoiser, calls, kind, order=3, afs=False):
    """The `Plan` of a solver that makes `calls` network calls in turn on levels of `kind` (type, rho); None if none does."""
    from brisk import epd_sampling, solvers

    wanted = solvers.SolverOptions(afs=afs, max_order=order)
    for points in range(2, calls + 3):
        if solvers.network_calls(name, points, wanted) == calls:
            sampler = epd_sampling.of_solver(name, denoiser, points, *kind, options=wanted)
            multistep = solvers.find(name).highest_order is not None
            return Plan(sampler, f"{kind[0]}{f', order {order}' * multistep}{', analytic first step' * afs}")
    return None


def published(name, denoiser, calls):
    """The `Plan` of a solver as it was published, its first direction in closed form if it must be; None if that fails too."""
    from brisk import epd_sampling

    kind = epd_sampling.CUSTOMARY.get(name, ("polynomial", None))
    return plan_of(name, denoiser, calls, kind) or plan_of(name, denoiser, calls, kind, afs=True)


def chosen(name, setting, calls):
    """The `Plan` of least end error on the last seed's noise, among `CHOICES` and `ORDERS`, with and without a closed form."""
    from brisk import epd_distill, solvers

    orders = ORDERS if solvers.find(name).highest_order else ORDERS[:1]
    plans = [plan_of(name, setting.denoiser, calls, (kind, None), order, afs)
             for kind in CHOICES for order in orders for afs in (False, True)]  # fmt: skip
    plans = [plan for plan in plans if plan]
    noise, ends = setting.noise[-1], setting.ends[-1]
    return min(plans, key=lambda plan: epd_distill.end_error(solve(setting, plan.sampler, noise), ends).item(), default=None)


def name_of(content):
    """What a `predictor.Predictor` is called in the report."""
    return f"{OURS[content.solver.student]}, K={content.solver.num_points}"


def make_plans(setting, predictors, solvers):
    """{(model, calls in turn): `Plan`}: the predictors, then every solver with as many calls as they make in turn or in all."""
    from brisk import epd_sampling

    plans, budgets = {}, set()
    for content in predictors:
        levels = f"{content.document['schedule']['type']}{', analytic first step' * content.solver.afs}"
        plans[name_of(content), content.nfe.para_nfe] = Plan(epd_sampling.of_predictor(content), levels)
        budgets |= {content.nfe.para_nfe, content.nfe.total_nfe}
    for title in solvers:
        name = SOLVERS[title]
        plans |= {(title, calls): published(name, setting.denoiser, calls) for calls in sorted(budgets)}
        plans |= {(title + TUNED, calls): chosen(name, setting, calls) for calls in sorted(budgets)}
    return {what: plan for what, plan in plans.items() if plan}


def measure(setting, plan, oracle, reference, args):
    """(one measurement over all seeds, with the spread over them; images of the first seed)."""
    import torch

    from brisk import builtin_protocol, epd_distill, scorers

    rows, compared, seconds, images = [], [], [], []
    counter = setting.denoiser.network.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    try:
        for seed in range(args.seeds):
            started = time.perf_counter()
            ends = solve(setting, plan.sampler, setting.noise[seed])
            seconds.append((time.perf_counter() - started) / args.samples)
            images.append(decode(setting.denoiser, ends))
            with torch.no_grad():
                wanted = [logits.argmax(1) for logits in oracle(setting.images[seed])]
            compared.append({"end_error": epd_distill.end_error(ends, setting.ends[seed]).item(),
                             "agreement": scorers.prompt_agreement(oracle, images[-1], *wanted)["all"]})  # fmt: skip
        calls = len(rows) // args.seeds
        pair = 1 + (setting.guidance[0] == "cfg" and setting.guidance[1] != 1)
        total = sum(rows) // (args.seeds * args.samples * pair)
        alone = [time.perf_counter()]
        for place in range(4):  # the first to warm up
            solve(setting, plan.sampler, setting.noise[0][place : place + 1])
            alone.append(time.perf_counter())
    finally:
        counter.remove()
    apart = [end - start for start, end in zip(alone[1:], alone[2:], strict=False)]
    row = builtin_protocol.measure(oracle, images, None, reference, compared)
    return {**row, "calls": calls, "total_calls": total, "seconds_per_image": statistics.median(seconds),
            "seconds_alone": statistics.median(apart), "scheduler": plan.levels}, images[0]  # fmt: skip


def rivals(figures, calls):
    """{name: measurement} of the plain solvers with `calls` calls in turn."""
    return {name: by_calls[str(calls)] for name, by_calls in figures.items()
            if name.removesuffix(TUNED) in SOLVERS and str(calls) in by_calls}  # fmt: skip


def verdict(row, others, measure):
    """A sentence: where a predictor's measurement stands to the best of `others` {name: measurement} by `measure`."""
    sign = -1 if measure == "agreement" else 1
    name = min(others, key=lambda other: sign * others[other][measure])
    own, best = row[measure], others[name][measure]
    spread = sum(part.get("spread", {}).get(measure, 0) ** 2 for part in (row, others[name])) ** 0.5
    gap = sign * (best - own)
    word = "within the spread of" if abs(gap) <= spread else "better than" if gap > 0 else "worse than"
    return f"{measure.replace('_', ' ')} {own:.3g}, {word} {best:.3g} ({name})"


def conclusions(title, figures):
    """Sentences that compare every predictor of a setting with the best plain solver at equal calls, from the numbers alone."""
    said = []
    for name in (name for name in figures if name.startswith(tuple(OURS.values()))):
        for calls, row in figures[name].items():
            pairs = (("in turn", int(calls)), ("in all", row["total_calls"]))
            for what, count in pairs:
                others = rivals(figures, count)
                if others:
                    parts = [verdict(row, others, measure) for measure in ("end_error", "agreement", "frechet")]
                    said.append(f"{title}, {name}, against plain solvers of as many calls {what} ({count}): {'; '.join(parts)}.")
    return said


def styles(tables):
    """{model: how its curve is drawn} for `epd_pictures.draw_report`: predictors in bold, solvers as published dotted."""
    found, names = {}, list(SOLVERS)
    for model in (model for figures in tables.values() for model in figures):
        title = model.removesuffix(TUNED)
        if title in SOLVERS:
            dotted = {"linestyle": ":", "alpha": 0.5}
            found[model] = {"color": f"C{names.index(title)}", "marker": ".", "linewidth": 1.1} | (dotted if model == title else {})
        else:
            colour = "black" if title.startswith(OURS["ipndm"]) else "crimson"
            found[model] = {"color": colour, "marker": "o", "markersize": 7, "linewidth": 2.2, "zorder": 3}
    return found


def shown_samples(setting, figures, drawn, held_out):
    """{what: images} of one setting: real ones, the long run, every predictor of fewest calls, and the best plain solvers."""
    ours = [(name, int(calls)) for name in figures if name.startswith(tuple(OURS.values())) for calls in figures[name]]
    fewest = min(calls for _, calls in ours)
    others = sorted(rivals(figures, fewest).items(), key=lambda item: item[1]["end_error"])
    best = others[0][0]
    plain = "DDIM" + TUNED
    rows = {"real images, held out": held_out, "the long run": setting.images[0]}
    for name in dict.fromkeys([*(name for name, calls in ours if calls == fewest), best, plain]):
        if (name, fewest) in drawn:
            row = figures[name][str(fewest)]
            rows[f"{name}\n{fewest} calls in turn, {row['total_calls']} in all"] = drawn[name, fewest]
    return {name: images[:SHOWN] for name, images in rows.items()}


def main(argv=None):
    args = parse_args(argv)
    import torch  # noqa: I001
    from tqdm import tqdm

    from brisk import builtin_protocol, demo_reports, denoiser_sources, epd_pictures, epd_sampling, predictor_files, runlog

    runlog.quiet_libraries()
    oracle = builtin_protocol.load_oracle(args.oracle)
    predictors = [predictor_files.load(path) for path in args.predictor]
    kinds = {(content.model["guidance_rate"], name_of(content), content.nfe.para_nfe) for content in predictors}
    if len(kinds) < len(predictors):
        raise options.UserError("--predictor: two predictors agree in guidance, points and calls; the report could not tell them "
                                "apart.")  # fmt: skip
    wanted = epd_sampling.complete(denoiser_sources.ModelOptions(), predictors[0])
    denoiser = denoiser_sources.load(wanted, "cuda" if torch.cuda.is_available() else "cpu")
    prompts = builtin_protocol.unseen_captions(args.training_prompts)
    real = builtin_protocol.real_images()["images"]
    reference = oracle.features(real)
    guidances = [(content.model["guidance_type"], content.model["guidance_rate"]) for content in predictors]
    tables, samples, floor, long_runs, notes = {}, None, {}, {}, []
    for guidance in dict.fromkeys(guidances):
        words = say_guidance(guidance)
        own = [content for content, its in zip(predictors, guidances, strict=True) if its == guidance]
        setting, rough = make_setting(denoiser, guidance, prompts, args)
        figures, drawn = {}, {}
        plans = make_plans(setting, own, args.solvers)
        for (model, calls), plan in tqdm(plans.items(), desc=words, unit="solver", dynamic_ncols=True):
            row, images = measure(setting, plan, oracle, reference, args)
            figures.setdefault(model, {})[str(calls)] = row
            drawn[model, calls] = images
        tables[words] = figures
        samples = samples or shown_samples(setting, figures, drawn, real)
        floor[words] = frechet_of_long_run(setting, oracle, reference, args)
        long_runs[words] = {"steps": args.reference_steps, "frechet": floor[words], "end_error_at_half_the_steps": rough}
        notes += conclusions(words.capitalize(), figures)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    title = "brisk: EPD-Solver on the built-in teacher"
    epd_pictures.draw_report(output / "report.png", tables, styles(tables), samples, floor,
                             f"{title}; samples of the setting {next(iter(tables))}")  # fmt: skip
    titles = [f"{name_of(content)}, {content.nfe.para_nfe} calls\n{say_guidance(guidance)}"
              for content, guidance in zip(predictors, guidances, strict=True)]  # fmt: skip
    epd_pictures.draw_tables(output / "table.png", predictors, titles)
    facts = {"samples_per_seed": args.samples, "seeds": args.seeds, "long_run": long_runs,
             "reference": f"{len(real)} tinted held-out scans", "predictors": args.predictor,
             "environment": runlog.environment()}  # fmt: skip
    words = {"choices": ", ".join(CHOICES), "orders": " and ".join(map(str, ORDERS)), "count": args.samples // 2}
    explained = [note.format(**words) for note in NOTES]
    headed = {f"{words}; a long run of half the steps ends {long_runs[words]['end_error_at_half_the_steps']:.2g} from the long "
              "run": figures for words, figures in tables.items()}  # fmt: skip
    demo_reports.write(output, title, {**tables, "conclusions": notes}, headed, facts, explained, notes,
                       ("report.png", "table.png"))  # fmt: skip


if __name__ == "__main__":
    options.run(main)
