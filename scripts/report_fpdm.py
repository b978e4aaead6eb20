#!/usr/bin/env python
"""Measure a DiT and an FPDM of the built-in handwriting set: training cost, and quality at equal sampling budgets.

A budget is the multiply-accumulates of some sampling steps of the DiT. The FPDM spends it on as many timesteps as fit, with a
few iterations each, every timestep started afresh or from the one before (reuse).
"""

import json
import statistics
import time
from pathlib import Path

from brisk import options

STATIC_BYTES = 20  # per parameter in training: weight, gradient, two moments of Adam, average
NOTES = [
    "Training. weights mib: weights, gradients, Adam's two moments and the moving average, 20 bytes a parameter. activations "
    "mib: the tensors that one step keeps for its backward pass, at the largest numbers of iterations of the training, counted "
    "by saved-tensor hooks. seconds per step: median over the log, both runs side by side on half of the cores each.",
    "Sampling. digit: share of images in which the oracle reads the digit that was asked for. frechet: distance to held-out "
    "real images in the oracle's features, all seeds together; as many training images have training_images_frechet. ±: standard "
    "deviation over seeds. steps: timesteps. budget: in steps of the DiT, what the timesteps cost at most. blocks: transformer "
    "blocks of one row, the measure of the paper. gmacs per image: billions of multiply-accumulates, both rows of the guidance "
    "and the injection of the input included.",
]


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("--dit", required=True, help="folder of the DiT's training run, with its VAE")
    add("--fpdm", required=True, help="folder of the FPDM's training run")
    add("--oracle", help="folder of the classifier that reads the images; default: the built-in one")
    add("--output_dir", required=True, help="folder for report.json, report.png, report.html and samples_*.png")
    add("--budgets", default="1,2,3,5,10", help="sampling budgets, each in steps of the DiT")
    add("--iterations", default="2,4,8", help="iterations per timestep, started afresh and with reuse")
    add("--cold_iterations", default="26", help="iterations per timestep that are only started afresh")
    add("--shown_budget", type=options.COUNT, default=2, help="the budget whose samples are in the picture")
    add("--guidance_scale", type=options.number(float, low=1), default=3.0, help="guidance of both")
    add("--samples", type=options.number(int, low=50), default=100, help="images per seed")
    add("--seeds", type=options.COUNT, default=3, help="number of seeds; the spread over them is reported")
    args, _ = options.parse(parser, argv)
    for name in ("budgets", "iterations", "cold_iterations"):
        setattr(args, name, options.read_counts(f"--{name}", getattr(args, name)))
    if args.shown_budget not in args.budgets:
        raise options.UserError(f"--shown_budget {args.shown_budget} is not among --budgets.")
    return args


def make_plans(dit, network, args):
    """{(model, timesteps): (budget, sampling plan)} of every measurement."""
    from brisk import fpdm_sampling

    shared = {"sampler": "ddim", "guidance_scale": args.guidance_scale}
    plans = {("DiT", budget): (budget, fpdm_sampling.make_plan(dit, budget, **shared)) for budget in args.budgets}
    ways = [(count, reuse) for count in args.iterations for reuse in (False, True)]
    for count, reuse in [*ways, *((count, False) for count in args.cold_iterations)]:
        for budget in args.budgets:
            most = fpdm_sampling.cost(dit, plans["DiT", budget][1]).macs
            plan = longest_plan(network, most, iterations=count, reuse=reuse, **shared)
            if plan and len(plan.timesteps) > reuse:  # the first timestep has nothing to reuse
                plans[name_of(count, reuse), len(plan.timesteps)] = (budget, plan)
    return plans


def longest_plan(network, most, **how):
    """The plan of as many timesteps as `most` multiply-accumulates allow; None if they do not allow one."""
    from brisk import fpdm_sampling

    steps, found = 1, None
    while fpdm_sampling.cost(network, plan := fpdm_sampling.make_plan(network, steps, **how)).macs <= most:
        steps, found = steps + 1, plan
    return found


def name_of(count, reuse):
    """What the FPDM is called in the report with `count` iterations per timestep."""
    return f"FPDM, {count} iteration{'s' * (count > 1)}{', reuse' * reuse}"


def draw(network, vae, plan, count, seed):
    """(images (N, 3, 32, 32) in [-1, 1] of the digits 0 to 9 in turns, the digits, seconds per image)."""
    import torch

    from brisk import fpdm_sampling, seeding

    labels = torch.arange(count) % network.config.num_classes
    generators = [seeding.generator(seed, "sample", index) for index in range(count)]
    started = time.perf_counter()
    with torch.no_grad():
        latents = fpdm_sampling.sample_latents(network, labels.to(network.device), generators, plan).latents
        images = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1).cpu()
    return images, labels, (time.perf_counter() - started) / count


def measure(network, vae, plan, oracle, reference, args):
    """(one measurement over all seeds, with the spread over them; images of the first seed)."""
    from brisk import builtin_protocol, fpdm_sampling, scorers

    drawn, seconds, read = [], [], []
    for seed in range(args.seeds):
        images, labels, took = draw(network, vae, plan, args.samples, seed)
        drawn.append(images)
        seconds.append(took)
        read.append({"digit": scorers.prompt_agreement(oracle, images, labels)["digit"]})  # their colours are free
    cost = fpdm_sampling.cost(network, plan)
    row = builtin_protocol.measure(oracle, drawn, None, reference, read)
    return {**row, "seconds_per_image": statistics.median(seconds), "network_calls": cost.calls, "blocks": cost.blocks,
            "gmacs_per_image": cost.macs / 1e9, "scheduler": "DDIM"}, drawn[0]  # fmt: skip


def activation_bytes(network, batch):
    """Bytes that a training step on `batch` latents keeps for its backward pass, with the most iterations of the training."""
    import torch

    config, kept = network.config, {}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    latents, labels = torch.zeros(shape, device=network.device), torch.zeros(batch, dtype=torch.long, device=network.device)
    most = (config.no_grad_iters[1], config.with_grad_iters[1]) if config.fixed_point else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network.train()(latents, 500, labels, num_iters=most).sample.square().mean()
    network.eval()
    return sum(kept.values())


def training_row(folder, network):
    """({steps: what training cost}) of a run: parameters, memory, seconds per step."""
    manifest = json.loads((Path(folder) / "run_manifest.json").read_text())
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {str(manifest["max_train_steps"]): {
        "parameters": parameters, "weights_mib": STATIC_BYTES * parameters / 2**20,
        "activations_mib": activation_bytes(network, manifest["global_batch"]) / 2**20,
        "seconds_per_step": statistics.median(1 / row["steps_per_sec"] for row in rows),
    }}  # fmt: skip


def draw_picture(path, training, figures, rows, digits, floor, title):
    """Samples beside what training cost and quality over the sampling budget.

    Args: `rows` {what: images (N, 3, H, W) in [-1, 1], one per number of `digits`}; `floor` the Frechet
    distance of training images.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from brisk import demo_reports

    figure = Figure(figsize=(16, 9))
    left, right = figure.subfigures(1, 2, width_ratios=(8.4, 7.6))
    demo_reports.draw_samples(left, rows, {"left": 0.29, "right": 0.97, "bottom": 0.02, "top": 0.91}, digits)
    spacing = {"hspace": 0.14, "left": 0.2, "right": 0.98, "bottom": 0.1, "top": 0.91, "height_ratios": (1.15, 2, 2)}
    bars, quality, distance = right.subplots(3, 1, gridspec_kw=spacing)
    draw_bars(bars, {model: next(iter(by_steps.values())) for model, by_steps in training.items()})
    quality.sharex(distance)
    for model, by_steps in figures.items():
        draw_curve(quality, distance, model, by_steps.values())
    distance.axhline(floor, color="gray", linestyle="--", linewidth=1)
    distance.text(0.01, floor, "training images", transform=distance.get_yaxis_transform(), va="bottom", fontsize=8, color="gray")
    quality.set(ylabel="share of digits drawn as asked", ylim=(None, 1.02))
    distance.set(ylabel="Fréchet distance to held-out images", yscale="log", xscale="log",
                 xlabel="multiply-accumulates per image, in billions and in steps of the DiT")  # fmt: skip
    budgets = {row["gmacs_per_image"]: int(steps) for steps, row in figures["DiT"].items()}
    distance.set_xticks([*budgets], [f"{gmacs:.2g}\n{steps} step{'s' * (steps > 1)}" for gmacs, steps in budgets.items()])
    distance.xaxis.set_minor_locator(NullLocator())
    demo_reports.plain_numbers(distance.yaxis, (2, 5))
    quality.tick_params(labelbottom=False)
    for plot in (quality, distance):
        plot.grid(alpha=0.3, which="both")
    quality.legend(loc="best", fontsize=8, ncols=2)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_bars(plot, training):
    """The FPDM's cost of training in shares of the DiT's."""
    costs = {"parameters": (("parameters",), "{:,.0f}"), "training memory, MiB": (("weights_mib", "activations_mib"), "{:,.0f}"),
             "seconds per step": (("seconds_per_step",), "{:.2g}")}  # fmt: skip
    for place, (names, form) in enumerate(reversed(costs.values())):
        dit, fpdm = (sum(training[model][name] for name in names) for model in ("DiT", "FPDM"))
        plot.barh([place + 0.2, place - 0.2], [1, fpdm / dit], 0.36, color=["black", "C0"])
        plot.text(1.02, place + 0.2, form.format(dit), va="center", fontsize=8)
        plot.text(fpdm / dit + 0.02, place - 0.2, f"{form.format(fpdm)} ({fpdm / dit - 1:+.0%})", va="center", fontsize=8)
    plot.set(yticks=range(3), yticklabels=[*costs][::-1], xlim=(0, 1.25), xticks=(0, 0.25, 0.5, 0.75, 1))
    plot.set_title("training: DiT (black) and FPDM of the same width (blue), in shares of the DiT", fontsize=9)
    plot.grid(alpha=0.3, axis="x")


def draw_curve(quality, distance, model, rows):
    """One model's agreement and Frechet distance over what an image costs, with the spread over seeds."""
    from brisk import demo_reports

    word = model.split(" ")[1] if " " in model else ""
    colour = f"C{int(word).bit_length()}" if word else "black"
    reuse = model.endswith("reuse")
    style = {"color": colour, "marker": "o" if reuse else "s", "markersize": 5, "capsize": 2, "label": model,
             "linewidth": 1.2 if word else 2.2}  # fmt: skip
    if word and not reuse:
        style |= {"linestyle": ":", "markerfacecolor": "white"}
    for plot, name in ((quality, "digit"), (distance, "frechet")):
        plot.errorbar(*demo_reports.points(rows, "gmacs_per_image", name), **style)


def save_grid(path, images):
    """Write images (N, 3, H, W) in [-1, 1] of the digits in turns as a picture, a column per digit."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    from brisk import image_folder

    rows = len(images) // 10
    pictures = [Image.fromarray(values) for values in image_folder.quantise(images[: rows * 10])]
    make_image_grid(pictures, rows, 10, resize=64).save(path)


def main(argv=None):
    args = parse_args(argv)
    import torch
    from tqdm import tqdm

    from brisk import builtin_protocol, demo_reports, fpdm, handwriting, metrics, runlog

    runlog.quiet_libraries()
    oracle = builtin_protocol.load_oracle(args.oracle)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folders = {"DiT": args.dit, "FPDM": args.fpdm}
    networks = {name: fpdm.load_transformer(folder).to(device) for name, folder in folders.items()}
    vae = fpdm.load_vae(args.dit, networks["DiT"].config).to(device)
    held_out = builtin_protocol.real_images(handwriting.CLASS_PAPER)
    reference = oracle.features(held_out["images"])
    real = handwriting.draw("train", args.samples * args.seeds, seed=0, paper=handwriting.CLASS_PAPER)["images"]
    floor = metrics.frechet_distance(oracle.features(real), reference)
    training = {name: training_row(folder, networks[name]) for name, folder in folders.items()}
    figures, drawn = {}, {}
    plans = make_plans(networks["DiT"], networks["FPDM"], args)
    for (model, steps), (budget, plan) in tqdm(plans.items(), desc="measuring", unit="setting", dynamic_ncols=True):
        row, images = measure(networks[model.split(",")[0]], vae, plan, oracle, reference, args)
        figures.setdefault(model, {})[str(steps)] = {**row, "budget": budget}
        drawn[model, steps, budget] = images
    output, digits = Path(args.output_dir), range(10)
    output.mkdir(parents=True, exist_ok=True)
    first = [held_out["digits"].tolist().index(digit) for digit in digits]
    shown = {"held-out images": held_out["images"][first]}
    shown |= {f"{model}\n{steps} timestep{'s' * (steps > 1)}": images[:10] for (model, steps, budget), images in drawn.items()
              if budget == args.shown_budget}  # fmt: skip
    title = "brisk: DiT and FPDM on the built-in handwriting set"
    draw_picture(output / "report.png", training, figures, shown, digits, floor,
                 f"{title}; left, samples for the cost of {args.shown_budget} DiT steps")  # fmt: skip
    best = {}  # at the largest budget
    for (model, steps, budget), images in drawn.items():
        name, distance = model.split(",")[0].lower(), figures[model][str(steps)]["frechet"]
        if budget == max(args.budgets) and (name not in best or distance < best[name][0]):
            best[name] = (distance, images)
    for name, (_, images) in best.items():
        save_grid(output / f"samples_{name}.png", images)
    facts = {"samples_per_seed": args.samples, "seeds": args.seeds, "guidance_scale": args.guidance_scale,
             "reference": f"{len(reference)} held-out scans in seven inks on {handwriting.CLASS_PAPER} paper", "models": folders,
             "training_images_frechet": floor, "environment": runlog.environment()}  # fmt: skip
    tables = {"training": training, "sampling": figures}
    demo_reports.write(output, title, tables, tables, facts, NOTES)


if __name__ == "__main__":
    options.run(main)
