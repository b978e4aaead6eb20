"""Tuning EPD tables by rewards (arXiv 2512.22796): rollouts, the policy in checkpoints, the run's folder, what it exports.

The policy is a small network in float64 on the CPU; every process draws all actions and learns from all rewards alike, only the
images are shared out. Letters: S intervals, K points, B images of an update = P prompts x k variants, prompt-major.
"""

import functools  # noqa: I001
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

from brisk import checkpoint, epd, epd_policy, epd_run, epd_sampling, predictor
from brisk import predictor_files, sample_seeds, seeding, solvers
from brisk.checkpoint import write_atomically
from brisk.options import UserError, redact

POLICY_FILE = "policy.safetensors"  # of a checkpoint
START_FILE = "configs/start.json"  # of a run: its start predictor on the levels and the model of the run
TRAINING_SEEDS = 2**31  # images of training have seeds from here on, those of evaluation 0, 1, 2, ...


class Policy(NamedTuple):
    """The policy and its optimizer."""

    network: epd_policy.Residual
    base: epd_policy.Factors  # where it starts
    start: epd.Tables  # (S, K) float64, sorted; their scales stay where they are not learned
    optimizer: torch.optim.Optimizer

    def factors(self):
        """Its distributions now, with gradient."""
        return epd_policy.apply_residuals(self.base, self.network())


def make_policy(start, base, learning_rate, seed, hidden=128, blocks=2):
    """The `Policy` whose mean are the tables `start` (S, K), its network drawn from `seed`. Args: `base`: its `Factors`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.derive(seed, "policy"))
        network = epd_policy.Residual(len(start.r), epd_policy.residual_width(base), hidden, blocks).double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.0)
    return Policy(network, base, epd_policy.sanitise(start)[0], optimizer)


def learns_scales(content, wanted):
    """(c learned, a learned) of a `Predictor`. Args: `wanted`: two settings, None: if the predictor's own may differ from 1."""
    ranges = content.raw[4:] if content.raw else [(table - 1).abs().max().item() for table in content.tables[2:]]
    return tuple(span > 0 if own is None else own for own, span in zip(wanted, ranges, strict=True))


def minibatches(count, size, epochs, *key):
    """The rows of each minibatch: `epochs` passes over `count` rows in random orders, functions of `key`."""
    for epoch in range(epochs):
        yield from torch.randperm(count, generator=seeding.generator(*key, epoch)).split(size)


def loss_of(policy, action, old_log_density, advantage, rows, clip, kl_coef, entropy_coef):
    """The `epd_policy.PolicyLoss` of the `rows` of a rollout: its action, their ln pi when drawn (B,), advantages (B,)."""
    part = epd_policy.Action(*(None if values is None else values[rows] for values in action))
    return epd_policy.policy_loss(policy.factors(), policy.base, part, old_log_density[rows], advantage[rows], clip, kl_coef,
                                  entropy_coef)  # fmt: skip


def take_step(policy, loss, max_grad_norm=None):
    """One step of the optimizer down the gradient of `loss`, clipped to `max_grad_norm`; its norm before that."""
    policy.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.network.parameters(), max_grad_norm or float("inf"))
    policy.optimizer.step()
    return norm


def agree(policy, device):
    """Give all processes the first one's network: what they computed alike may differ in the last bit on unlike machines."""
    flat = torch.nn.utils.parameters_to_vector(policy.network.parameters()).detach().to(device)
    torch.distributed.broadcast(flat, 0)
    torch.nn.utils.vector_to_parameters(flat.to("cpu"), policy.network.parameters())


def mean_tables(policy, point="mean", scale_point="mean"):
    """(tables (S, K) that stand for the policy, list of the rows that had to be put in order); see `epd_policy.exported_tables`."""
    with torch.no_grad():
        tables, reordered, adjusted = epd_policy.sanitise(
            epd_policy.exported_tables(policy.factors(), policy.start, point, scale_point)
        )
    return tables, (reordered | adjusted).nonzero().flatten().tolist()


def divergence(policy):
    """KL(policy || its start) in nats."""
    with torch.no_grad():
        return torch.stack(epd_policy.divergences(policy.factors(), policy.base)).sum().item()


def draw_batches(denoiser, prompts, size, variants, shared, seed, update, rows):
    """Yield (noise, prompts or labels or None) of the rows [first, end) of each update from `update` on.

    Prompts come in turns of a new order per pass; a class model gets a drawn label per group. Every row depends on its number
    alone, not on which process has it. Args: `size`: B; `variants`: k; `shared`: those of a group start from one latent.
    """
    groups = size // variants

    @functools.lru_cache(2)
    def order(number):
        return torch.randperm(len(prompts), generator=seeding.generator(seed, "prompts", number)).tolist()

    while True:
        given, own = None, [row // variants for row in range(*rows)]
        if prompts:
            places = [divmod(update * groups + group, len(prompts)) for group in own]
            given = [prompts[order(number)[place]] for number, place in places]
        elif denoiser.takes == "classes":
            given = torch.randint(denoiser.classes, (groups,), generator=seeding.generator(seed, update, "labels"))[own]
        sources = own if shared else range(*rows)
        seeds = [TRAINING_SEEDS + seeding.derive(seed, update, source, "latent") % TRAINING_SEEDS for source in sources]
        yield sample_seeds.draw_latents(sample_seeds.generators(seeds), denoiser.shape).to(denoiser.device), given
        update += 1


def hold_out(prompts, count):
    """(prompts to train on, prompts to evaluate on): at most `count` and a fifth, the same in every run; all where that is none."""
    held = min(count, len(prompts) // 5)
    order = torch.randperm(len(prompts), generator=seeding.generator("held-out prompts")).tolist()
    chosen = set(order[:held])
    rest = [prompt for number, prompt in enumerate(prompts) if number not in chosen]
    return rest, [prompts[number] for number in order[:held]] or prompts


@torch.no_grad()
def sample(sampler, direction, x, tables):
    """The end states of x (B, ...) with `tables`, (S, K) or a table per sample (B, S, K)."""
    return solvers.last(epd_sampling.states(sampler._replace(tables=tables), direction, x))


@torch.no_grad()
def score(reward, denoiser, states, given, size, decode=True):
    """{head: (B,)} scores of end states, `size` at a time. Args: `reward`: a `rewards.Reward`; `given`: prompts, labels or None;
    `decode`: show it images in [0, 1], else the states."""
    parts = []
    for at in range(0, len(states), size):
        rows = slice(at, at + size)
        images = ((denoiser.decode(states[rows]).float() + 1) / 2).clamp(0, 1) if decode else states[rows]
        own = None if given is None else given[rows]
        parts.append(reward.score(images, own if isinstance(own, list) else None, own if torch.is_tensor(own) else None))
    return {head: torch.cat([part[head] for part in parts]) for head in parts[0]}


def gather(accelerator, scores, first, total):
    """{head: (total,) float64 on the CPU} of all processes, of which this one has the rows from `first` on."""
    own = torch.stack(list(scores.values())).float().to(accelerator.device)
    table = own.new_zeros(len(own), total)
    table[:, first : first + own.shape[1]] = own
    return dict(zip(scores, accelerator.reduce(table, "sum").double().to("cpu"), strict=True))


def standard_error(values):
    """Of the mean of (n,) values; 0 of a single one."""
    return values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0


def judge(scores, mixed, start):
    """What an evaluation found, as numbers. Args: `mixed` (n,): rewards; `start` (n,): those of the same images at the start."""
    gain = mixed - start
    found = {"reward": mixed.mean().item(), "standard_error": standard_error(mixed), "gain": gain.mean().item(),
             "gain_standard_error": standard_error(gain)}  # fmt: skip
    return found | {f"{head}_mean": values.mean().item() for head, values in scores.items()}


def choose_folder(parent, name, resume, moment):
    """The run's folder below `parent`: the newest of runs called `name` with checkpoints if `resume`, else <moment>-<name>[-NN].

    Args: `moment`: a datetime.
    """
    if resume:
        pattern = re.compile(rf"\d{{8}}-\d{{6}}-{re.escape(name)}(-\d\d)?")
        same = [path for path in Path(parent).glob("*") if pattern.fullmatch(path.name) and any(path.glob("checkpoint-*"))]
        if same:
            return max(same)
    path = first = Path(parent) / f"{moment:%Y%m%d-%H%M%S}-{name}"
    for number in range(1, 100):
        if not path.exists():
            break
        path = first.with_name(f"{first.name}-{number:02d}")
    return path


def _tensors(policy, best):
    """{name: tensor} of all that a checkpoint holds but the optimizer's moments."""
    found = {f"network.{name}": value for name, value in policy.network.state_dict().items()}
    parts = (("base", policy.base), ("start", policy.start), ("best", best))
    return found | {f"{part}.{name}": value for part, values in parts for name, value in values._asdict().items()
                    if value is not None}  # fmt: skip


def save_policy(folder, accelerator, policy, best):
    """Write the policy, AdamW's moments and the `best` tables into a checkpoint, from the main process."""
    if accelerator.is_main_process:
        tensors = _tensors(policy, best)
        for name, parameter in policy.network.named_parameters():
            tensors |= {f"adam.{name}.{key}": value for key, value in policy.optimizer.state[parameter].items()}
        save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, folder / POLICY_FILE)


def load_policy(folder, accelerator, policy, best):
    """Read what `save_policy` wrote, in place."""
    stored = load_file(folder / POLICY_FILE)
    policy.network.load_state_dict({name: stored[f"network.{name}"] for name in policy.network.state_dict()})
    for name, parameter in policy.network.named_parameters():
        policy.optimizer.state[parameter] = {key: stored[f"adam.{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    for name, table in best._asdict().items():
        table.copy_(stored[f"best.{name}"])


def check_same_start(folder, policy, changed):
    """UserError where the policy in the checkpoint `folder` starts elsewhere than `policy`. Args: `changed`: sentences on settings
    that differ."""
    stored, own = ({name: value for name, value in tensors.items() if name.startswith(("base.", "start."))}
                   for tensors in (load_file(folder / POLICY_FILE), _tensors(policy, policy.start)))  # fmt: skip
    if stored.keys() != own.keys() or not all(torch.equal(stored[name], value) for name, value in own.items()):
        why = next((text for text in changed if text.startswith(("data.", "ppo.dirichlet", "ppo.scale", "ppo.train"))), None)
        raise UserError(f"the policy in {folder} starts from other tables or distributions: "
                        f"{why or 'the file that data.predictor_snapshot names has changed.'}")  # fmt: skip


def make_start(content, denoiser, levels, settings, learned):
    """The start `Predictor` as this run uses it: sorted tables, no analytic first step, the levels and the model of the run.

    Args: `settings`: merged ones; `learned`: (c, a) whether they are; a range holds for all intervals where c is learned.
    """
    document, place = content.document, "model.backend_options."
    config = {name.removeprefix(place): value for name, value in settings.items()
              if name.startswith(place) and isinstance(value, str)}  # fmt: skip
    config.pop("cache_dir", None)
    config = {name: epd_run.from_anywhere(value) if name in ("model_name_or_path", "gmm_file") else redact(value)
              for name, value in config.items()}  # fmt: skip
    config = (content.model.get("backend_config") or {}) | config | {"resolution": denoiser.resolution}
    model = content.model | {"dataset": settings["model.dataset_name"], "backend": denoiser.family, "backend_config": config,
                             "img_resolution": denoiser.resolution, "guidance_type": settings["model.guidance_type"],
                             "guidance_rate": settings["model.guidance_rate"]}  # fmt: skip
    schedule = document["schedule"] | {"type": settings["model.schedule_type"], "rho": settings["model.schedule_rho"],
                                       "sigma_min": levels[-1], "sigma_max": levels[0], "sigmas": levels}  # fmt: skip
    if denoiser.flow:
        schedule["flow"] = {"shift": denoiser.shift, "mu": denoiser.mu}
    solver = content.solver._replace(afs=False, fix_last_scale_dir=content.solver.fix_last_scale_dir and not learned[0])
    content = content._replace(solver=solver, model=model, document=document | {"schedule": schedule})
    return with_tables(content, content.name, document["stage"], epd_policy.sanitise(content.tables)[0], document.get("training"))


def with_tables(start, name, stage, tables, training):
    """The `Predictor` `start` with other `tables` (S, K) and their raw parameters, whose ranges grow where they must."""
    stated = start.raw[4:] if start.raw else (0.0, 0.0)
    ranges = epd_policy.wide_enough(tables, *stated)
    raw = predictor.Raw(*(table.float() for table in epd.raw_parameters(tables, *ranges)), *ranges)
    document = start.document
    return predictor.make(name, stage, start.solver, document["schedule"], start.model, raw=raw, teacher=document.get("teacher"),
                          training=training, source=document.get("source"))  # fmt: skip


def write_export(folder, stem, start, name, tables, facts, rows, manifest=True):
    """Write <folder>/<stem>.json, the tuned predictor, and its manifest; the predictor's path.

    Args: `facts`: section training of the file, {run, checkpoint, step, ...}; `rows`: intervals that had to be put in order.
    """
    path = Path(folder) / f"{stem}.json"
    predictor_files.write(with_tables(start, name, "rl", tables, facts), path)
    if manifest:
        facts = facts | {"predictor": path.name, "sanitised_rows": rows}
        write_atomically(path.with_name(f"{stem.replace('predictor', 'manifest')}.json"), json.dumps(facts, indent=1) + "\n")
    return path


def last_row(path, step):
    """The row of a metrics.jsonl at or before `step`, or None."""
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return next((row for row in reversed(rows) if row["step"] <= step), None)


def export_run(run_dir, wanted=None, folder=None, device="cpu", manifest=True, point="mean", scale_point="mean"):
    """Write the policy of a checkpoint of a run as a predictor; its path. UserError.

    Args: `wanted`: the checkpoint, None for the newest usable one; `folder`: None for the run's export; `device`: where to compute;
    `point`, `scale_point`: see `epd_policy.exported_tables`.
    """
    run_dir = Path(run_dir)
    if not (run_dir / START_FILE).is_file():
        raise UserError(f"--export {run_dir} is no folder of a run of train_epd_rl.py: it has no {START_FILE}.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device} is no device of this machine.") from None
    found = checkpoint.find_checkpoint(run_dir, wanted or "latest", lambda skipped: None, "--checkpoint")
    if found is None:
        raise UserError(f"--export {run_dir} has no whole checkpoint.")
    stored = load_file(found / POLICY_FILE)
    base = epd_policy.Factors(*(stored.get(f"base.{name}") for name in epd_policy.Factors._fields))
    tables = epd.Tables(*(stored[f"start.{name}"] for name in epd.Tables._fields))
    policy = make_policy(tables, base, 0.0, 0)
    policy.network.load_state_dict({name: stored[f"network.{name}"] for name in policy.network.state_dict()})
    policy.network.to(device)
    policy = policy._replace(base=epd_policy.Factors(*(None if factor is None else factor.to(device) for factor in base)))
    tables, rows = mean_tables(policy, point, scale_point)
    step = checkpoint.step_of(found) or checkpoint.read_state(found)["step"]
    facts = {"run": run_dir.name, "checkpoint": found.name, "step": step, "point": point, "scale_point": scale_point,
             "metrics": last_row(run_dir / "metrics.jsonl", step)}  # fmt: skip
    start = predictor_files.read(run_dir / START_FILE)
    tables = epd.Tables(*(table.cpu() for table in tables))
    return write_export(folder or run_dir / "export", f"predictor-{step:06d}", start, run_dir.name, tables, facts, rows, manifest)


def say_gain(record, samples):
    """A sentence on what evaluation found. Args: `record`: {"history", "best": `judge`'s numbers with "step", or None}."""
    if record["best"] is None:
        return "No evaluation measured its reward."
    start, best = record["history"][0], record["best"]
    return (f"Mean reward of {samples} images: {start['reward']:.4g} at the start -> {best['reward']:.4g} (update {best['step']}), "
            f"a gain of {best['gain']:.2g} +- {best['gain_standard_error']:.1g} on the same latents.")  # fmt: skip


CARD = """---
license: apache-2.0
tags:
- epd-solver
- diffusion
- diffusers
---
# {name}

Tables of EPD-Solver tuned by rewards (residual Dirichlet policy optimisation, arXiv 2512.22796) with `train_epd_rl.py`: {steps}
updates of {size} images, reward `{reward}`, from `{start}`. {quality}

```
{description}
```

Sample with it:

```bash
python sample_epd.py --predictor_path {path}
```

{snippet}`export/predictor.json` holds the tables; `train_config.yaml` the options, `metrics.jsonl` the course of the run.
"""


def write_card(output, content, start, settings, denoiser, steps, quality):
    """Write `output`/README.md, which says what the `Predictor` `content` is and how to sample with it."""
    kind, rate, source = (settings[f"model.{name}"] for name in ("guidance_type", "guidance_rate",
                                                                 "backend_options.model_name_or_path"))  # fmt: skip
    guidance = f", guidance_scale={rate:g}" if kind == "cfg" else ""
    call = {"prompts": f'"a prompt"{guidance}, ', "classes": f"class_labels=[0]{guidance}, ", None: ""}[denoiser.takes]
    snippet = epd_run.SNIPPET.format(source=source, path=output, call=call, intervals=content.nfe.intervals)
    card = CARD.format(name=content.name, steps=steps, size=settings["ppo.rollout_batch_size"], reward=settings["reward.type"],
                       start=start.name, quality=quality, path=output, description=predictor.describe(content),
                       snippet=snippet if source and denoiser.family in epd_run.IN_PIPELINES else "")  # fmt: skip
    write_atomically(Path(output) / "README.md", redact(card))
