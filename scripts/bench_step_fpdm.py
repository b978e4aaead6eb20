"""The training step of FPDM and of the DiT beside it that bench_step.py times, on random weights and made-up latents.

The step is that of train_fpdm.py, whose stages it names; a row's setting (`bench_step.LayerSetting`) says which parts are
still the plain composition. Letters: n iterations without gradient, m with it.
"""

import copy
import functools
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_step_methods import Bench, Work

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the training script is not part of the package
import train_fpdm  # noqa: E402
from brisk import dit, fpdm, fpdm_options, gaussian, latents, sd_inputs, sd_models, seeding  # noqa: E402

NETWORKS = {  # flags of train_fpdm.py; tiny has as many blocks as XL and 64 tokens
    "tiny": ["--hidden_size=128", "--num_heads=4", "--image_size=128", "--num_classes=10"],
    "s2": ["--model=DiT-S/2"], "b2": ["--model=DiT-B/2"], "xl2": ["--model=DiT-XL/2"],
}  # fmt: skip
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that looks at the memory would print


def parse(size, fixed_point):
    """The options of a run of train_fpdm.py."""
    return train_fpdm.parse_args([*NETWORKS[size], "--fixed_point", str(fixed_point)])[0]


def stratified_pairs(args, count):
    """`count` pairs (n, m) that stand for training's: both spread over their ranges evenly, in random combination.

    Their means are those of the uniform draws (of an odd `count` within half an iteration over all pairs together); n falls,
    so that the first pair has the most.
    """
    spread = []
    for phase in ("no", "with"):
        low, high = (getattr(args, f"fixed_point_{phase}_grad_{end}_iters") for end in ("min", "max"))
        lower = [low + (2 * place + 1) * (high - low + 1) // (2 * count) for place in range((count + 1) // 2)]
        spread.append(lower + [low + high - value for value in reversed(lower[: count // 2])])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [(n, spread[1][place]) for n, place in zip(reversed(spread[0]), order, strict=True)]


def macs_per_image(config, pairs):
    """Multiply-accumulates of the networks' work on one image in a step: mean over the `pairs`; None: of the plain DiT.

    A backward pass counts as two forward passes; what is made once is counted once, recomputation is no work of the method.
    """
    if pairs is None:
        return 3 * dit.forward_macs(config)
    iteration = dit.forward_macs(config, 1) - dit.forward_macs(config, 0)
    return sum(n * iteration + 3 * dit.forward_macs(config, m) for n, m in pairs) / len(pairs)


@torch.no_grad()
def open_gates(network):
    """Give what starts at zero (gates, modulation, head) small random weights, as after some training.

    Products with zeros would tell little: not on whether two steps are the same, and of the power that a GPU needs.
    """
    draw = torch.Generator().manual_seed(0)
    linears = [module.adaLN_modulation[1] for module in network.modules() if hasattr(module, "adaLN_modulation")]
    for linear in (*linears, network.final_layer.linear):
        linear.weight.normal_(std=0.1, generator=draw)
        linear.bias.normal_(std=0.1, generator=draw)


def make_network(args):
    """The network that `train_fpdm.py --seed 0` starts from, but for `open_gates`; on the CPU."""
    seeding.seed_libraries(0, "start")
    network = fpdm.FPDMTransformer2DModel(**fpdm_options.network_config(args))
    open_gates(network)
    return network


def make_batch(args, batch_size, device):
    """Made-up latents with labels, on the CPU, as a loader of cached latents gives them."""
    config = fpdm_options.network_config(args)
    wanted = latents.LatentOptions(None, None, None, None, batch_size, config["in_channels"], config["sample_size"],
                                   config["num_classes"], "class", None, args.image_size, False, 0)  # fmt: skip
    dataset = latents.open_rows(wanted, print)
    rows = [dataset[number] for number in range(batch_size)]
    batch = {"latents": torch.stack([torch.from_numpy(row["latent.npy"]) for row in rows]),
             "labels": torch.tensor([int(row["label.npy"]) for row in rows])}  # fmt: skip
    return {name: value.pin_memory() if device.type == "cuda" else value for name, value in batch.items()}


def iterate_plainly(network, true_no_grad, injected, condition, state, num_iters, run, solver):
    """`DiT.iterate` as the published code composes it: all of the fusion and of the modulation anew in each iteration.

    Args: `true_no_grad`: record no graph in the first phase; else it is recorded and thrown away after.
    """
    without, with_grad = num_iters
    fixed = network.block_pre_projection(injected)

    def step(z):
        hidden = network.block_fixed_point_projection_fc1(torch.cat([z, fixed], dim=-1))
        fused = network.block_fixed_point_projection_fc2(F.gelu(hidden, approximate="tanh"))
        return network.block_fixed_point(fused, condition)

    with torch.set_grad_enabled(not true_no_grad):
        for _ in range(without):
            state = step(state)
    state = state.detach()
    for _ in range(with_grad):
        state = run(step, state)
    return state, None, None


def peak_on_top(device, call):
    """GiB that tensors took at most during `call()`, on top of those that were there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as noted:
        call()
    events = [event for event in noted.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**30


class Fpdm(Bench):
    """train_fpdm.py with its defaults: with `--fixed_point`, or for a plain DiT without."""

    terms, weight_decay = ("latents", "output", "mse", "vb"), 0.0

    def __init__(self, setting, network, args, pairs, batch_size, half, device):
        """`args` of the run; `pairs` (n, m), the iterations of the steps in turn; without `fixed_point` they do not matter."""
        super().__init__(setting, network, batch_size, half, device)
        self.args, self.pairs, self.batch = args, pairs, make_batch(args, batch_size, device)
        self.tables = gaussian.make_tables(network.betas()).to(device)
        self.make_optimizer()
        if setting.compiled:
            network.compile_iteration()
        if setting.fixed_point and not setting.hoisted:
            network.iterate = functools.partial(iterate_plainly, network, setting.true_no_grad)

    def step(self, number):
        """One training step; returns the loss (a 0-dim tensor)."""
        return self.step_with(number, self.pairs[number % len(self.pairs)])

    def step_with(self, number, iterations):
        """Step `number` with (n, m) iterations, which a plain DiT ignores."""
        args, config, tables = self.args, self.student.config, self.tables
        batch = sd_models.to_device(self.batch, self.device)
        draw = self.draw_of(number)
        # 10b
        x0 = sd_inputs.sample_latents(batch, None, None, None, draw)
        labels = train_fpdm.drop_labels(batch["labels"], args.class_dropout_prob, config.num_classes, draw)
        # 10c
        timesteps = torch.randint(len(tables.betas), (len(x0),), generator=draw, device=self.device)
        noise = torch.randn(x0.shape, generator=draw, device=self.device)
        x_t = gaussian.noised(tables, x0, noise, timesteps)
        target = gaussian.target(tables, x0, noise, timesteps, config.prediction_type)
        # 10e
        with self.autocast():
            output = self.student(x_t, timesteps, labels, num_iters=iterations if config.fixed_point else None)
        prediction = output.sample.float()
        # 10f
        error = gaussian.flat_mean((target - prediction[:, : config.in_channels]) ** 2)
        bound = gaussian.variational_bound(tables, x0, x_t, timesteps, prediction, config.prediction_type)
        weights = gaussian.loss_weights(tables, timesteps, args.loss_weighting, config.prediction_type).to(error.dtype)
        mse, vb = (weights * error).mean(), bound.mean()
        logged = {} if output.residual is None else {"fp/residual": output.residual.mean()}
        return self.finish(mse + vb, (x0, prediction, mse, vb), args.ema_decay, mse=mse, vb=vb, **logged)

    def memory(self):
        """GiB: held between steps (weights, their average, moments), and at the peak of a step with most n and most or least m."""
        held = [*self.student.parameters(), *self.ema.master]
        held += [value for moments in self.optimizer.state.values() for value in moments.values()]
        static = sum(tensor.numel() * tensor.element_size() for tensor in held) / 2**30
        (_, most), (least, many) = ((getattr(self.args, f"fixed_point_{phase}_grad_{end}_iters") for end in ("min", "max"))
                                    for phase in ("no", "with"))  # fmt: skip
        peaks = [static + peak_on_top(self.device, functools.partial(self.step_with, 0, (most, m))) for m in (many, least)]
        return {"held_gib": static, "peak_gib": peaks[0], "peak_gib_at_one": peaks[1]}


def prepare(args, half, device):
    """The `bench_step_methods.Work` of FPDM."""
    runs = {fixed_point: parse(args.size, fixed_point) for fixed_point in (True, False)}
    networks = {fixed_point: make_network(run) for fixed_point, run in runs.items()}
    pairs = stratified_pairs(runs[True], args.steps)
    counted = {fixed_point: 2 * args.batch_size * macs_per_image(network.config, pairs if fixed_point else None)
               for fixed_point, network in networks.items()}  # fmt: skip
    for network in networks.values():
        print(*fpdm.describe(network), sep="\n")

    def make(setting):
        kind = setting.fixed_point
        return Fpdm(setting, copy.deepcopy(networks[kind]), runs[kind], pairs, args.batch_size, half, device)

    means = [sum(column) / len(pairs) for column in zip(*pairs, strict=True)]
    texts = {True: f"FPDM, {means[0]:g} iterations without gradient and {means[1]:g} with it on average", False: "DiT, 3 forwards"}
    parameters = {name: sum(p.numel() for p in networks[kind].parameters()) for name, kind in (("fpdm", True), ("dit", False))}
    return Work(make, lambda setting: counted[setting.fixed_point], {texts[kind]: flops for kind, flops in counted.items()},
                {"pairs": pairs, "parameters": parameters})  # fmt: skip
