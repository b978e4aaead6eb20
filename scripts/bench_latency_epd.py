"""EPD-Solver beside plain solvers, as bench_latency.py times them: a U-Net with random weights and random prompts."""

import functools

import torch
from bench_latency import Entry
from bench_step_methods import make_unet

from brisk import denoisers, epd, epd_sampling, macs, sd_models, sigmas, solvers, tiny


def make_denoiser(unet, tokens):
    """The `denoisers.Denoiser` of a bare U-Net: every condition is a random embedding of `tokens` tokens, nothing is decoded."""
    from diffusers import DDIMScheduler

    side = unet.config.sample_size

    def call(inputs, timestep, condition):
        return unet(inputs, timestep, return_dict=False, **condition)[0]

    def condition(given, batch):
        inputs = macs.unet_inputs(unet.config, batch, side, tokens, device=unet.device, dtype=unet.dtype)
        return {name: value for name, value in inputs.items() if name not in ("sample", "timestep")}

    direction, table = denoisers.vp_model(unet, DDIMScheduler(**tiny.SCHEDULE), call)
    shape = (unet.config.in_channels, side, side)
    return denoisers.Denoiser("sd", unet, direction, condition, lambda latents: latents, shape, side, *sigmas.sigma_range(table),
                              table=table, takes="prompts", device=unet.device)  # fmt: skip


def make_samplers(denoiser, intervals, points, afs):
    """{name of a row: its `epd_sampling.Sampler`}; the first takes as many sequential calls as EPD with batched branches.

    The last takes as many evaluations as EPD in all. The predictor's tables are those that training begins with.
    """
    raw, levels = epd.initial_raw(intervals, points), denoisers.grid(denoiser, "discrete", intervals + 1)

    def predictor(analytic):
        return epd_sampling.Sampler("epd", levels, solvers.SolverOptions(afs=analytic, max_order=1), epd.effective(raw))

    cost = epd_sampling.cost(predictor(False))
    plain = [epd_sampling.of_solver("euler", denoiser, calls + 1) for calls in (cost.para_nfe, cost.total_nfe)]
    rows = {"Euler, equal calls": plain[0], "EPD, batched": predictor(False), "EPD, looped": predictor(False)}
    return rows | ({"EPD, batched, AFS": predictor(True)} if afs else {}) | {"Euler, equal total": plain[1]}


def compile_network(unet, mode, batch_sizes, points):
    """Compile for fixed shapes, once for each number of rows: those of one point and of all points, per batch size."""
    counts = {batch * factor for batch in batch_sizes for factor in (1, points)}
    torch._dynamo.config.recompile_limit = max(len(counts), torch._dynamo.config.recompile_limit)  # beyond it nothing is compiled
    unet.compile(mode=mode, dynamic=False)


@torch.no_grad()
def sample(sampler, direction, x):
    """Latents of a whole run from `x` (B, 4, h, w), by sample_epd.py's functions."""
    return solvers.last(epd_sampling.states(sampler, direction, x))


def make_entries(args, device, dtype):
    """(entries of every batch size, latent side)."""
    unet, tokens = make_unet(args.size, device)
    unet.to(device, dtype)
    sd_models.speed_up(unet, args.channels_last, False, False, print)
    if args.compile:
        compile_network(unet, args.compile_mode, args.batch_sizes, args.num_points)
    denoiser, scale, entries = make_denoiser(unet, tokens), args.guidance_scale, []
    pairs = epd_sampling.guided_in_pairs(denoiser, "cfg", scale)
    for batch in args.batch_sizes:
        direction = denoisers.direction_for(denoiser, [""] * batch, batch, "cfg", scale)
        for name, sampler in make_samplers(denoiser, args.steps, args.num_points, args.afs).items():
            looped, cost = name == "EPD, looped", epd_sampling.cost(sampler)
            figures = {"calls": cost.total_nfe if looped else cost.para_nfe, "rows": cost.total_nfe * (1 + pairs)}
            x, _ = epd_sampling.start(sampler, denoiser, range(batch))
            taken = epd.in_chunks(direction, batch) if looped else direction
            entries.append(Entry(name, unet, functools.partial(sample, sampler, taken, x), batch, figures))
    return entries, denoiser.shape[-1]


def compare(rows):
    """A sentence on the figures of one batch size; adds to each "ratio_to_equal_calls", its time per call over the first row's."""
    first, batched, *_, last = rows
    for row in rows:
        row["ratio_to_equal_calls"] = row["ratio_to_first"] * first["calls"] / row["calls"]
    share = batched["median_seconds"] / last["median_seconds"]
    return (f"EPD with batched points takes {batched['ratio_to_equal_calls']:.3f} of the time of {first['calls']} plain calls, "
            f"{share:.3f} of that of {last['calls']} plain calls.")  # fmt: skip
