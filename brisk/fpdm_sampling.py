"""Sampling with DiT and FPDM networks: timesteps and their iterations, guidance, reuse, cost, convergence report.

Source: arXiv 2401.08741 (FPDM; smoothing, reallocation and reuse of computation over timesteps). Letters: N sampling steps,
B batch, C channels of the latent, h its side, K classes. Lists by step have index 0 for the least noisy timestep; sampling
starts at the other end.
"""

from typing import NamedTuple

import torch

from brisk import dit, fixed_point, gaussian

FIRST_ITERATIONS = 8  # that the first, cold timestep gets at least where later ones start from a solution


class Plan(NamedTuple):
    """How to sample; made by `make_plan`."""

    timesteps: list  # ascending, what the network is told
    iterations: list | None  # of the fixed-point layer by step; None: a plain DiT
    sampler: str  # ddpm, ddim or flow
    eta: float
    guidance_scale: float
    guided_channels: int
    reuse: bool
    solver: dict  # settings of `fixed_point.solve`, {}: every iteration is done, none measured


class Samples(NamedTuple):
    """What `sample_latents` gives; the records are in sampling order, a guided pair counts as one sample."""

    latents: torch.Tensor  # (B, C, h, h) float32
    iterations: torch.Tensor | None  # (N, B) int64, None for a plain DiT
    residual: torch.Tensor | None  # (N, B) float32, None where it was not measured


class Cost(NamedTuple):
    """Of one image."""

    calls: int  # of the network, one after the other
    rows: int  # of the batch in each: 2 with guidance
    blocks: int  # transformer blocks of one row over all calls, the measure of the paper
    macs: int  # multiply-accumulates over all calls and rows


def read_timesteps(steps, config):
    """The ascending timesteps of a number of steps, "10,15" or "ddimN". ValueError where the network cannot take them."""
    text = str(steps)
    if not all(part.isdecimal() and int(part) for part in text.removeprefix("ddim").split(",")):
        raise ValueError(f"sampling steps '{text}' are no positive number, list like 10,15 or ddimN.")
    if text.startswith("ddim") and "," in text:
        raise ValueError(f"sampling steps '{text}': ddim takes one number.")
    if config.prediction_type == "flow" and not text.isdecimal():
        raise ValueError(f"sampling steps '{text}': a flow network takes equal steps, give their number.")
    try:
        timesteps = gaussian.respaced_timesteps(text)
    except ValueError as error:
        raise ValueError(f"sampling steps '{text}': {error}") from None
    if config.zero_terminal_snr and timesteps[-1] != 999:
        raise ValueError(f"sampling steps '{text}' leave out timestep 999, where a network with zero terminal SNR must start.")
    return timesteps


def plan_iterations(steps, mean, schedule="constant", reuse=False, first=None):
    """Iterations of each step: `steps` x `mean` in total, but at least `first` at the first one that is sampled.

    Args: `first`: None for `FIRST_ITERATIONS` (or `mean` if that is more) with `reuse` and nothing extra without, when every step
    starts cold; 0 for nothing extra.
    """
    counts = fixed_point.iteration_schedule(steps, mean, schedule)
    if first is None:
        first = max(mean, FIRST_ITERATIONS) if reuse else 0
    counts[-1] = max(counts[-1], first)
    return counts


def make_plan(network, steps, sampler="ddpm", eta=0.0, guidance_scale=1.0, guided_channels=None, iterations=None,
              schedule="constant", first_iterations=None, reuse=False, solver=None):  # fmt: skip
    """The `Plan` for `network`. ValueError where network and wishes contradict.

    Args: `steps` as in `read_timesteps`; `guided_channels`: None for all C, 3 as published DiT samples were made; `iterations`:
    mean number per timestep, None for the network's own; `solver`: see `solver_settings`.
    """
    config = network.config
    if config.prediction_type == "flow" and (sampler != "ddpm" or eta):
        raise ValueError("a flow network is sampled by Euler steps, neither by DDIM nor with noise.")
    if guidance_scale < 1:
        raise ValueError(f"a guidance scale of {guidance_scale:g} is below 1, which is no guidance.")
    if config.label_type == "none" and guidance_scale > 1:
        raise ValueError(f"the network knows no labels, the guidance scale must be 1, not {guidance_scale:g}.")
    guided_channels = guided_channels or config.in_channels
    if guided_channels > config.in_channels:
        raise ValueError(f"{guided_channels} channels cannot be guided, the latents have {config.in_channels}.")
    timesteps, counts, settings = read_timesteps(steps, config), None, {}
    if config.fixed_point:
        iterations = iterations or network.default_iterations
        counts = plan_iterations(len(timesteps), iterations, schedule, reuse, first_iterations)
        settings = {**solver, "paired": guidance_scale > 1} if solver else {}
    sampler = "flow" if config.prediction_type == "flow" else sampler
    return Plan(timesteps, counts, sampler, eta, guidance_scale, guided_channels, reuse and config.fixed_point, settings)


def solver_settings(solver="picard", tolerance=0.0, minimum=1, check_every=2, over="mean", per_sample=False, measure=False):
    """What `make_plan` takes as `solver`; {} for plain iteration whose residual nobody asks for (`measure`)."""
    if solver == "picard" and not tolerance and not measure:
        return {}
    return {"solver": solver, "tolerance": tolerance, "minimum": minimum, "check_every": check_every, "over": over,
            "per_sample": per_sample}  # fmt: skip


def cost(network, plan):
    """The `Cost` of an image; with a tolerance the most it can be."""
    config, calls, rows = network.config, len(plan.timesteps), 1 + (plan.guidance_scale > 1)
    if not config.fixed_point:
        return Cost(calls, rows, calls * config.num_layers, rows * calls * dit.forward_macs(config))
    blocks = calls * (config.pre_depth + config.post_depth) + sum(plan.iterations)
    return Cost(calls, rows, blocks, rows * sum(dit.forward_macs(config, count) for count in plan.iterations))


def check_labels(config, labels):
    """ValueError for class numbers (a list) out of the network's range."""
    wrong = [label for label in labels if not 0 <= label < config.num_classes]
    if wrong:
        raise ValueError(f"class {wrong[0]} is out of range, the network knows 0 to {config.num_classes - 1}.")


def null_labels(config, labels):
    """What stands for no label beside `labels`: K for classes, zeros for vectors."""
    return torch.zeros_like(labels) if config.label_type == "vector" else torch.full_like(labels, config.num_classes)


def draw_noise(generators, shape, device):
    """Standard normal noise (B, *shape), float32; each sample's from its own generator (on any device; None: the global one)."""
    rows = [torch.randn(shape, generator=g, device=g.device if g else device) for g in generators]
    return torch.stack(rows).to(device, non_blocking=True)


@torch.no_grad()
def sample_latents(network, labels, generators, plan, device=None, progress=None):
    """Draw `Samples`.

    Args: `network`: `fpdm.FPDMTransformer2DModel`, in any precision, the maths around it is float32; `labels`: (B,) int64 or
    (B, label_dim) on `device`; `generators`: one per sample, which alone decide its noise; `progress()` is called after each
    step. Nothing is read from the device, unless the plan has a tolerance.
    """
    config, device = network.config, device or network.device
    tables = gaussian.make_tables(network.betas(), plan.timesteps).to(device)
    shape = (config.in_channels, config.sample_size, config.sample_size)
    guided = plan.guidance_scale > 1
    if guided:
        labels = torch.cat([labels, null_labels(config, labels)])
    x, state, records = draw_noise(generators, shape, device), False, []  # False: cold
    for step in reversed(range(len(plan.timesteps))):
        inputs = torch.cat([x, x]) if guided else x
        inputs = inputs.to(network.dtype)
        call = {"num_iters": plan.iterations[step], "init_state": state, "solver": plan.solver} if plan.iterations else {}
        output = network(inputs, tables.timesteps[step], labels, **call)
        state = output.state if plan.reuse else False
        records.append((output.num_iters, output.residual))
        predicted = output.sample.float()
        if guided:
            predicted = dit.guide(predicted, plan.guidance_scale, plan.guided_channels)
        x = take_step(tables, predicted, x, step, plan, config, generators)
        if progress is not None:
            progress()
    counts, residuals = zip(*records, strict=True)
    measured = bool(plan.solver)
    return Samples(x, _record(counts, guided) if plan.iterations else None, _record(residuals, guided) if measured else None)


def _record(values, guided):
    values = torch.stack(values)
    return values.unflatten(1, (2, -1)).amax(1) if guided else values


def take_step(tables, predicted, x, step, plan, config, generators):
    """x of the next, less noisy timestep, from the guided output at step `step`."""
    if plan.sampler == "flow":
        return x + predicted[:, : config.in_channels] / len(plan.timesteps)  # towards x0 - noise
    index = torch.full((len(x),), step, device=x.device)
    has_noise = step > 0 and (plan.sampler == "ddpm" or plan.eta > 0)
    noise = draw_noise(generators, x.shape[1:], x.device) if has_noise else torch.zeros_like(x)
    if plan.sampler == "ddim":
        prediction = predicted[:, : config.in_channels]
        return gaussian.ddim_step(tables, prediction, x, index, config.prediction_type, noise, plan.eta)
    if predicted.shape[1] == config.in_channels:  # no learned variance: beta, that is a logit of 1
        predicted = torch.cat([predicted, torch.ones_like(predicted)], 1)
    return gaussian.ddpm_step(tables, predicted, x, index, config.prediction_type, noise)


def convergence(plan, iterations, residual):
    """What the fixed-point layer did: one dict per timestep in sampling order, from records (N, S) over S samples."""
    rows = []
    for place, (timestep, budget) in enumerate(zip(reversed(plan.timesteps), reversed(plan.iterations), strict=True)):
        used, rho = iterations[place].double(), residual[place].double()
        rows.append({"timestep": timestep, "budget": budget, "iterations_min": int(used.min()), "iterations": used.mean().item(),
                     "iterations_max": int(used.max()), "residual_min": rho.min().item(), "residual": rho.mean().item(),
                     "residual_max": rho.max().item()})  # fmt: skip
    return rows


def draw_convergence(path, rows, title):
    """A picture of `convergence`: residual after the last iteration, and iterations, over the timesteps as sampled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def column(name):
        return [row[name] for row in rows]

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2))
    times = column("timestep")
    upper.fill_between(times, column("residual_min"), column("residual_max"), alpha=0.2, label="smallest to largest")
    upper.plot(times, column("residual"), "o-", markersize=3, label="mean over samples")
    upper.set(yscale="log", ylabel="relative residual", title=title)
    lower.plot(times, column("budget"), "--", drawstyle="steps-mid", color="gray", label="allowed")
    lower.plot(times, column("iterations"), "o-", markersize=3, label="used, mean")
    lower.set(ylabel="iterations", xlabel="timestep; sampling goes from left (noise) to right (image)", ylim=(0, None))
    lower.invert_xaxis()
    for plot in (upper, lower):
        plot.grid(alpha=0.3)
        plot.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
