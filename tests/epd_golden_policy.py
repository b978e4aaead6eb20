"""Golden numbers of the policy over EPD tables: its parts one by one, and a small learning problem."""

import numpy as np
import torch
from epd_golden import close, tables_of

from brisk import epd, epd_distill, epd_policy, epd_rl, mixture, sigmas, solvers

TOY_SEEDS = 5


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def check_rl(golden, folder):
    check_cold_start(golden["sanitise"], golden["cold_start"])
    policy = golden["policy"]
    tables = tables_of(golden["sanitise"]["input"])
    base = epd_policy.base_factors(tables, golden["cold_start"]["concentration"], True, True)
    close(base.alpha_pos.log(), policy["base"]["log_alpha_pos"])
    close(base.alpha_weight.log(), policy["base"]["log_alpha_weight"])
    close(base.dir_location, policy["base"]["log_scale_dir"])
    close(base.time_location, policy["base"]["log_scale_time"])
    close(base.dir_log_std, torch.full_like(base.dir_log_std, policy["base"]["log_std"]))
    deltas = residuals(policy, base)
    factors = epd_policy.apply_residuals(base, deltas)
    check_policy(policy, base, factors)
    for case in golden["rloo"]:
        found = epd_policy.advantages(tensor(golden["rewards"]), case["k"], case["grouping"], case["normalise"])
        close(found, case["advantages"])
    action = epd_policy.Action(*(tensor(policy["actions"][name]) for name in ("segments", "weights", "scale_dir", "scale_time")))
    for case in golden["ppo"]["cases"]:
        check_loss(case, golden["ppo"], base, deltas, action)
    check_export(golden["export"], factors, tables)
    check_mixing(golden["reward_mix"])


def check_cold_start(sanitised, cold):
    tables, reordered, adjusted = epd_policy.sanitise(tables_of(sanitised["input"]))
    for found, expected in zip(tables, tables_of(sanitised["output"]), strict=True):
        close(found, expected)
    assert (reordered.tolist(), adjusted.tolist()) == (sanitised["output"]["reordered"], sanitised["output"]["adjusted"])
    segments, _, *fallbacks, start = epd_policy.cold_start(tables, cold["concentration"])
    close(segments, cold["segments"])
    close(start.alpha_pos, cold["alpha_pos"])
    close(start.alpha_weight, cold["alpha_weight"])
    assert [fallback.tolist() for fallback in fallbacks] == [cold["fallback_pos"], cold["fallback_weight"]]


def residuals(policy, base):
    """The deltas of the golden network, as a leaf."""
    width = epd_policy.residual_width(base)
    network = epd_policy.Residual(policy["shapes"]["S"], width, policy["shapes"]["hidden"], blocks=2).double()
    close(network(), torch.zeros_like(network()))  # the policy starts as its base
    network.load_state_dict({name: tensor(values) for name, values in policy["weights"].items()})
    close(network(), policy["deltas"])
    return tensor(policy["deltas"]).requires_grad_()


def check_policy(policy, base, factors):
    names = ("alpha_pos", "alpha_weight", "scale_dir_loc", "scale_dir_log_std", "scale_time_loc", "scale_time_log_std")
    for found, name in zip(factors, names, strict=True):
        close(found, policy[name])
    parts = ("pos", "weight", "scale_dir", "scale_time")
    for found, name in zip(epd_policy.entropies(factors), parts, strict=True):
        close(found, policy["entropy"][name])
    for found, name in zip(epd_policy.divergences(factors, base), parts, strict=True):
        close(found, policy["kl_to_base"][name])
    actions = policy["actions"]
    action = epd_policy.Action(*(tensor(actions[name]) for name in ("segments", "weights", "scale_dir", "scale_time")))
    close(epd_policy.action_tables(action, unread_tables(action)).r, actions["positions"])
    for found, name in zip(epd_policy.log_densities(factors, action), parts, strict=True):
        close(found, policy["log_prob_parts"][name])
    close(epd_policy.log_density(factors, action), policy["log_prob"])
    mean = epd_policy.exported_tables(factors, unread_tables(action))
    names = ("mean_positions", "mean_weights", "mean_scale_dir", "mean_scale_time")
    for found, name in zip(mean, names, strict=True):
        close(found, policy[name])


def unread_tables(action):
    """Scales that nothing may read where all are learned."""
    return epd.Tables(*(torch.full_like(action.weight[0], torch.nan) for _ in range(4)))


def check_loss(case, golden, base, deltas, action):
    factors = epd_policy.apply_residuals(base, deltas)
    numbers = (case["clip"], case["kl_coef"], case["entropy_coef"])
    found = epd_policy.policy_loss(factors, base, action, tensor(golden["old_log_prob"]), tensor(golden["advantages"]), *numbers)
    for value, name in zip(found, ("loss", "policy_loss", "kl", "entropy", "ratio", "clip_fraction"), strict=True):
        close(value, case[name])
    close(torch.autograd.grad(found.loss, deltas)[0], case["grad_wrt_deltas"])


def check_export(golden, factors, tables):
    mean = epd_policy.sanitise(epd_policy.exported_tables(factors, tables))[0]
    ranges = (golden["scale_dir_range"], golden["scale_time_range"])
    raw = epd.raw_parameters(mean, *ranges)
    for found, expected in zip(raw, tables_of(golden["raw"]), strict=True):
        close(found, expected)
    enlarged = epd_policy.wide_enough(mean, *ranges)  # clipped at those ranges, kept at these
    assert all(wide > given for wide, given in zip(enlarged, ranges, strict=True))
    again = epd.effective(epd.raw_parameters(mean, *enlarged), *enlarged)
    for found, expected in zip(again, mean, strict=True):
        close(found, expected, 2e-6)


def check_mixing(golden):
    scores = {head: tensor(values) for head, values in golden["raw"].items()}
    for head, values in scores.items():
        expected = golden["normalised"].get(head, golden["normalised"].get(f"{head}_official"))
        close(epd_policy.normalised_reward(head, values), expected)
    close(epd_policy.IMAGE_REWARD_OFFSET, golden["imagereward_offset"])
    close(epd_policy.mixed_reward(scores, golden["weights"]), golden["mixed"])


class Toy:
    """The small learning problem of rl_toy.json: its world, its reward, the error of a table."""

    def __init__(self, golden):
        self.golden = golden
        prompts = golden["prompt_weights"]
        self.world = mixture.from_lists(golden["means"], golden["stds"], prompts[0], prompts)
        grid = golden["schedule"]
        self.ends = (grid["sigma_min"], grid["sigma_max"])
        self.levels = sigmas.time_uniform(grid["num_steps"], *self.ends)
        start = (golden["policy"]["start_r"], golden["policy"]["start_w"])
        r, weight = (tensor(values).expand(grid["num_steps"] - 1, -1) for values in start)
        self.start = epd.Tables(r, weight, torch.ones_like(r), torch.ones_like(r))

    def direction(self, prompts):
        def conditional(x, sigma, rows=None):
            return mixture.direction(self.world, x, sigma, prompts if rows is None else prompts[rows])

        return conditional

    def reference(self, x, prompts):
        return epd_distill.reference_states(self.direction(prompts), x, *self.ends, self.golden["reference"]["num_steps"])

    def sample(self, x, prompts, tables):
        return solvers.last(epd.solve(self.direction(prompts), x, self.levels, epd.rows_of(tables)))

    def reward(self, end, reference, prompts):
        offsets = tensor(self.golden["prompt_reward_offset"])[prompts]
        return 0.5 * offsets + 0.5 * torch.sin(3 * reference.sum(-1)) - (end - reference).norm(dim=-1)

    def error(self, tables):
        evaluation = self.golden["eval"]
        x, prompts, ends = tensor(evaluation["x_init"]), torch.tensor(evaluation["prompt"]), tensor(evaluation["reference_end"])
        return (self.sample(x, prompts, tables) - ends).norm(dim=-1).mean().item()


def train_toy(toy, seed):
    """Error of the mean table after the stated run with same-prompt groups and shared latents, by the parts of train_epd_rl.py."""
    stated, rng = toy.golden["policy"], np.random.default_rng(seed)
    base = epd_policy.base_factors(toy.start, stated["concentration"])
    policy = epd_rl.make_policy(toy.start, base, stated["lr"], seed, stated["hidden"], stated["blocks"])
    count, variants = stated["prompts_per_update"], stated["k"]
    number = len(toy.golden["prompt_weights"])
    passes = [rng.permutation(number) for _ in range(stated["updates"] * count // number + 1)]  # each prompt as often
    prompts = torch.from_numpy(np.concatenate(passes)[: stated["updates"] * count].reshape(-1, count))
    latents = toy.ends[1] * torch.from_numpy(rng.standard_normal((stated["updates"], count, 2)))
    goals = toy.reference(latents.flatten(0, 1), prompts.flatten()).reshape(latents.shape)
    for update in range(stated["updates"]):
        own, x, goal = (part[update].repeat_interleave(variants, 0) for part in (prompts, latents, goals))
        with torch.no_grad():
            action = epd_policy.draw(policy.factors(), len(x), rng)
            old = epd_policy.log_density(policy.factors(), action)
            end = toy.sample(x, own, epd_policy.action_tables(action, toy.start))
        advantage = epd_policy.advantages(toy.reward(end, goal, own), variants)
        for rows in epd_rl.minibatches(len(x), stated["minibatch"], stated["epochs"], seed, update):
            found = epd_rl.loss_of(policy, action, old, advantage, rows, stated["clip"], stated["kl"], stated["entropy"])
            epd_rl.take_step(policy, found.loss, stated["grad_clip"])
    return toy.error(epd_rl.mean_tables(policy)[0])


def check_rl_toy(golden, folder):
    toy = Toy(golden)
    close(toy.error(toy.start), golden["start_error"], 0.01)  # stated for 512 latents, of which the file holds 128
    evaluation = golden["eval"]
    x, prompts = tensor(evaluation["x_init"]), torch.tensor(evaluation["prompt"])
    close(toy.reference(x, prompts), evaluation["reference_end"])
    limit = float(golden["required"].split("<=")[1].split()[0])
    errors = [train_toy(toy, seed) for seed in range(TOY_SEEDS)]
    assert sum(error <= limit for error in errors) >= TOY_SEEDS - 1, errors
