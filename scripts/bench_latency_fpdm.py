"""The plain DiT and FPDM at several (timesteps x iterations) that bench_latency.py times, on random weights."""

import re

import torch
from bench_latency import Entry
from bench_step_fpdm import make_network, parse

from brisk import fpdm_sampling, options

GUIDANCE = 4.0


def parse_plans(text):
    """[(timesteps, iterations, reuse)] of 20x26,40x6r. UserError."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(r?)", plan.strip()) for plan in text.split(",")]
    if None in found:
        raise options.UserError(f"--plans {text}: write timesteps x iterations, r for reuse of solutions, as in 20x26,40x6r.")
    return [(int(match[1]), int(match[2]), bool(match[3])) for match in found]


def plan_of(network, steps, iterations=None, reuse=False):
    """The `fpdm_sampling.Plan` of guided sampling. UserError."""
    try:
        return fpdm_sampling.make_plan(network, steps, guidance_scale=GUIDANCE, iterations=iterations, reuse=reuse)
    except ValueError as error:
        raise options.UserError(f"--steps, --plans: {error}") from None


def equal_cost_plans(network, plain, steps):
    """Plans for FPDM that take as many multiply-accumulates as `steps` of the `plain` DiT, the nearest below.

    With the network's own number of iterations, and with 12, 6 and 3 where these are fewer; from 6 down with reuse.
    """
    budget, own = fpdm_sampling.cost(plain, plan_of(plain, steps)).macs, network.default_iterations
    plans = []
    for iterations in (own, *(count for count in (12, 6, 3) if count < own)):
        reuse, count = iterations <= 6, 1
        while fpdm_sampling.cost(network, plan_of(network, count + 1, iterations, reuse)).macs <= budget:
            count += 1
        plans.append((count, iterations, reuse))
    return plans


def make_entries(args, device, dtype):
    """(entries, latent side): the DiT and one `Entry` per plan of FPDM. UserError."""
    plain, network = (make_network(parse(args.size, fixed_point)).eval().requires_grad_(False) for fixed_point in (False, True))
    plans = [plan_of(plain, args.steps)]
    wanted = parse_plans(args.plans) if args.plans else equal_cost_plans(network, plain, args.steps)
    names = [f"DiT {args.steps}", *(f"FPDM {steps}x{count}{' reuse' if reuse else ''}" for steps, count, reuse in wanted)]
    plans += [plan_of(network, *plan) for plan in wanted]
    for one in (plain, network):
        one.to(device, dtype)
        if args.compile:
            one.compile_iteration(args.compile_mode)
    labels = torch.arange(args.batch_size, device=device) % plain.config.num_classes

    def sampling(one, plan):
        draws = [torch.Generator(device).manual_seed(number) for number in range(args.batch_size)]
        return lambda: fpdm_sampling.sample_latents(one, labels, draws, plan, device)

    entries = []
    for name, one, plan in zip(names, [plain, *[network] * len(wanted)], plans, strict=True):
        cost = fpdm_sampling.cost(one, plan)
        figures = {"timesteps": cost.calls, "blocks": cost.blocks, "gmacs": cost.macs / 1e9}
        entries.append(Entry(name, one, sampling(one, plan), args.batch_size, figures))
    return entries, plain.config.sample_size
