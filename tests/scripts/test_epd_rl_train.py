"""Tuning EPD tables by rewards: updates against a plain loop, what a run writes, evaluation and the best table, exports."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from epd_rl_runs import MIXTURE, SCRIPT, flags, run, start_file
from inprocess import train
from torch.distributions import Dirichlet, LogNormal, kl_divergence

import sample_epd
import train_epd_rl
from brisk import denoisers, epd, epd_rl, options, predictor_files, sample_seeds, seeding


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A predictor whose factors may differ from 1."""
    return start_file(tmp_path_factory.mktemp("start"), scale=0.2)


def plain_solve(denoiser, x, tables, levels, labels):
    """End states (B, ...) of EPD with a table per sample, one point after the other (arXiv 2507.14797)."""
    direction = denoisers.direction_for(denoiser, labels, len(x))
    r, weight, scale_dir, scale_time = (table.float() for table in tables)
    for n, (s, t) in enumerate(zip(levels, levels[1:], strict=False)):
        d = direction(x, torch.full((len(x),), s))
        total = 0
        for k in range(r.shape[-1]):
            tau = s ** (1 - r[:, n, k]) * t ** r[:, n, k]
            y = x + (tau - s)[:, None, None, None] * d
            factor = weight[:, n, k] * scale_dir[:, n, k] * scale_time[:, n, k]
            total = total + factor[:, None, None, None] * direction(y, scale_time[:, n, k] * tau)
        x = x + (t - s) * total
    return x


def open_case(args, settings, start, learned):
    """What training by `args` starts from: the tables by rising r, and the parameters of the laws around them."""
    start = predictor_files.read(start)
    order = start.tables.r.argsort(-1)
    fixed = [table.gather(-1, order) for table in start.tables]
    segments = torch.cat([torch.zeros(len(order), 1), fixed[0], torch.ones(len(order), 1)], 1).diff(dim=1)
    base = [settings["ppo.dirichlet_concentration"] * part for part in (segments, fixed[1])]
    locations = [fixed[2 + j].log() for j in range(2) if learned[j]]
    return SimpleNamespace(args=args, settings=settings, start=start, learned=learned, fixed=fixed, base=base, locations=locations,
                           denoiser=denoisers.load_mixture(MIXTURE))  # fmt: skip


def laws_of(deltas, case):
    """The laws of all tables' rows: two Dirichlets, and a log-normal for each factor that is learned."""
    width = case.fixed[0].shape[1]
    parts = list(deltas.split([width + 1, width] + [width] * (2 * len(case.locations)), 1))
    found = [Dirichlet(alpha * part.exp()) for alpha, part in zip(case.base, parts[:2], strict=True)]
    stds = [(math.log(0.05) + parts[3 + 2 * j]).exp() for j in range(len(case.locations))]
    return found + [LogNormal(location + parts[2 + 2 * j], stds[j]) for j, location in enumerate(case.locations)]


def density(laws, drawn):
    """ln p of each drawn action (B,)."""
    return sum(law.log_prob(value).flatten(1).sum(1) for law, value in zip(laws, drawn, strict=True))


def rewards_of(drawn, case, update):
    """How near to the point (0.5, 0.5) the images end that the drawn tables make, (B,) float64."""
    args, size, variants = case.args, case.settings["ppo.rollout_batch_size"], case.settings["ppo.rloo_k"]
    drawn_scales, levels = iter(drawn[2:]), case.start.sigmas.tolist()
    scales = [next(drawn_scales) if own else table.expand(size, -1, -1)
              for own, table in zip(case.learned, case.fixed[2:], strict=True)]  # fmt: skip
    own = [row // variants if args.share_latents else row for row in range(size)]
    seeds = [2**31 + seeding.derive(args.seed, update, source, "latent") % 2**31 for source in own]
    z = sample_seeds.draw_latents(sample_seeds.generators(seeds), case.denoiser.shape)
    labels = torch.randint(3, (size // variants,), generator=seeding.generator(args.seed, update, "labels"))
    ends = plain_solve(case.denoiser, z * levels[0], (drawn[0][..., :-1].cumsum(-1), drawn[1], *scales), levels,
                       labels.repeat_interleave(variants))  # fmt: skip
    return -(ends.flatten(1) - 0.5).norm(dim=1).double()


def advantage_of(reward, variants, group):
    """Each reward less the mean of the others of its group, all together of mean 0 and deviation 1."""
    size = len(reward)
    if group == "prompt":
        groups = [range(first, first + variants) for first in range(0, size, variants)]
    else:
        groups = [range(first, size, size // variants) for first in range(size // variants)]
    advantage = torch.zeros(size, dtype=torch.float64)
    for rows in groups:
        for i in rows:
            advantage[i] = reward[i] - torch.stack([reward[j] for j in rows if j != i]).mean()
    return (advantage - advantage.mean()) / advantage.std(correction=0)


def improve(network, adam, case, drawn, advantage, old, seed):
    """PPO's epochs over the drawn actions, of log density `old` before: the log's terms, each minibatch's mean."""
    settings, clip, sums = case.settings, case.settings["ppo.clip_range"], []
    for epoch in range(settings["ppo.ppo_epochs"]):
        order = torch.randperm(len(old), generator=seeding.generator(*seed, "minibatches", epoch))
        for rows in order.split(settings["ppo.minibatch_size"]):
            laws, start_laws = laws_of(network(), case), laws_of(torch.zeros_like(network()), case)
            ratio = (density(laws, [value[rows] for value in drawn]) - old[rows]).exp()
            inner = torch.minimum(advantage[rows] * ratio, advantage[rows] * ratio.clamp(1 - clip, 1 + clip))
            kl = sum(kl_divergence(law, at).sum() for law, at in zip(laws, start_laws, strict=True))
            entropy = sum(law.entropy().sum() for law in laws)
            loss = -inner.mean() + settings["ppo.kl_coef"] * kl - settings["ppo.entropy_coef"] * entropy
            adam.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings["ppo.max_grad_norm"])
            adam.step()
            outside = ((ratio - 1).abs() > clip).double().mean()
            sums.append({"loss": loss, "policy_loss": -inner.mean(), "kl": kl, "entropy": entropy, "ratio": ratio.mean(),
                         "clip_fraction": outside, "grad_norm": norm})  # fmt: skip
    return {name: torch.stack([each[name] for each in sums]).mean() for name in sums[0]}


def plain_loop(args, settings, start, learned):
    """(rows of the log, tables of the mean policy): training written down anew from arXiv 2512.22796, of torch.distributions."""
    case, log = open_case(args, settings, start, learned), []
    concentration = settings["ppo.dirichlet_concentration"]
    policy = epd_rl.make_policy(epd.Tables(*case.fixed), epd_rl.epd_policy.base_factors(case.start.tables, concentration, *learned),
                                0.0, args.seed)  # fmt: skip
    network = policy.network
    adam = torch.optim.AdamW(network.parameters(), lr=settings["ppo.learning_rate"], weight_decay=0)
    for update in range(args.max_train_steps):
        rng = np.random.default_rng(seeding.derive(args.seed, update, "actions"))
        with torch.no_grad():
            action = epd_rl.epd_policy.draw(policy.factors(), settings["ppo.rollout_batch_size"], rng)
            drawn = [value for value in action if value is not None]
            old = density(laws_of(network(), case), drawn)
        reward = rewards_of(drawn, case, update)
        row = {"mixed_reward_mean": reward.mean(), "mixed_reward_std": reward.std(correction=0), "analytic_mean": reward.mean()}
        advantage = advantage_of(reward, settings["ppo.rloo_k"], args.rloo_group)
        row |= improve(network, adam, case, drawn, advantage, old, (args.seed, update))
        log.append({name: value.item() for name, value in row.items()})
    laws = laws_of(network(), case)
    means = iter(laws[2:])
    scales = [next(means).mean if own else table for own, table in zip(learned, case.fixed[2:], strict=True)]
    return log, torch.stack([laws[0].mean[:, :-1].cumsum(1), laws[1].mean, *scales]).detach()


CASES = {
    "plain": ((), (True, True)),
    "frozen factors": (("ppo.train_scale_dir=false", "ppo.train_scale_time=false"), (False, False)),
    "one factor, more epochs": (("ppo.train_scale_dir=false", "ppo.ppo_epochs=3", "ppo.entropy_coef=0.02", "ppo.clip_range=0.05"),
                                (False, True)),
    "published grouping": (("--rloo_group=mixed", "--share_latents=False", "ppo.rloo_k=2"), (True, True)),
    "separate latents": (("--share_latents=False", "ppo.minibatch_size=8", "ppo.max_grad_norm=0.5"), (True, True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_a_plain_loop(case, start, tmp_path):
    more, learned = CASES[case]
    args, _, settings, _ = train_epd_rl.parse_args(flags(start, *more))
    expected, tables = plain_loop(args, settings, start, learned)
    done = run(tmp_path / "out", start, *more)
    assert {"step", "elapsed_sec", *expected[0]} <= set(done.rows[0])
    for row, wanted in zip(done.rows, expected, strict=True):
        assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=2e-4, abs=1e-5)
    found = predictor_files.load(done.output)
    before = torch.stack(list(predictor_files.read(done.output / "configs/start.json").tables))
    assert (tables - before).abs()[:2].max() > 2e-3, "tables that hardly move prove nothing"
    torch.testing.assert_close(torch.stack(list(found.tables)), tables, atol=2e-6, rtol=0)
    for table, kept, own in zip(found.tables[2:], before[2:], learned, strict=True):
        assert (table - kept).abs().max() < 1e-6 or own


def test_cases_train_differently(start, tmp_path):
    """Guards the comparison above: a setting that did nothing would agree too."""
    found = {tuple(row["loss"] for row in run(tmp_path / str(number), start, *more).rows)
             for number, (more, _) in enumerate(CASES.values())}  # fmt: skip
    assert len(found) == len(CASES)


def test_what_a_run_writes(start, tmp_path):
    done = run(tmp_path / "out", start, "--eval_every=2", "--max_steps=4", "logging.save_interval=2", "run.seed=0x11")
    names = {path.name for path in done.output.iterdir()}
    assert names == {"README.md", "checkpoint-2", "checkpoint-4", "configs", "export", "metrics.jsonl", "predictor-000004.json",
                     "report.json", "run_manifest.json", "train_config.yaml"}  # fmt: skip
    assert predictor_files.find(done.output) == done.output / "export/predictor.json"
    content, report = predictor_files.load(done.output), json.loads((done.output / "report.json").read_text())
    assert content.document["stage"] == "rl" and content.nfe.para_nfe == 6 and content.model["backend"] == "gmm"
    assert [found["step"] for found in report["history"]] == [0, 2, 4] and report["history"][0]["kl"] == 0
    assert report["best"] == max(report["history"], key=lambda found: found["reward"])
    assert content.document["training"]["evaluation"] == report["best"]
    manifest = json.loads((done.output / "export/manifest.json").read_text())
    assert {"run", "checkpoint", "step", "sanitised_rows", "metrics"} <= set(manifest) and manifest["seed"] == 17
    card = (done.output / "README.md").read_text()
    assert f"sample_epd.py --predictor_path {done.output}" in card
    assert f"{report['history'][0]['reward']:.4g} at the start -> {report['best']['reward']:.4g}" in card + done.log


def test_the_written_options_train_the_same_again(start, tmp_path):
    first = run(tmp_path / "one", start, "--rloo_group=mixed", "--max_steps=2", "run.seed=5")
    rows = train(tmp_path / "two", f"--config={first.output / 'train_config.yaml'}", script=SCRIPT)
    assert [row["loss"] for row in rows] == [row["loss"] for row in first.rows]


def test_evaluation_is_of_the_images_that_sampling_gives_and_the_best_table_is_kept(start, tmp_path):
    """A rate that is far too high: a table of the middle is better than the last; its reward is worked out anew."""
    done = run(tmp_path / "out", start, "ppo.learning_rate=0.01", "--max_steps=6", "--eval_every=1", "--eval_samples=12",
               "ppo.train_scale_dir=false", "ppo.train_scale_time=false", "ppo.kl_coef=0")  # fmt: skip
    report = json.loads((done.output / "report.json").read_text())
    assert report["best"]["step"] not in (0, 6), "the case is not one of a best table in the middle"
    denoiser = denoisers.load_mixture(MIXTURE)

    def rewards(content):
        sources = sample_seeds.generators(range(12))
        x = sample_seeds.draw_latents(sources, denoiser.shape) * content.sigmas[0].float()
        tables = [table.expand(12, -1, -1) for table in content.tables]
        ends = plain_solve(denoiser, x, tables, content.sigmas.tolist(), sample_seeds.draw_labels(sources, 3))
        return -(ends.flatten(1) - 0.5).norm(dim=1).double()

    found = [rewards(predictor_files.read(done.output / name)) for name in
             ("export/predictor.json", "configs/start.json", "predictor-000006.json")]  # fmt: skip
    best, origin, last = report["best"], report["history"][0], report["history"][-1]
    assert [each.mean().item() for each in found] == pytest.approx([one["reward"] for one in (best, origin, last)], rel=1e-4)
    assert best["standard_error"] == pytest.approx(found[0].std().item() / 12**0.5, rel=1e-3)
    gain = found[0] - found[1]
    assert best["gain"] == pytest.approx(gain.mean().item(), rel=1e-3)
    assert best["gain_standard_error"] == pytest.approx(gain.std().item() / 12**0.5, rel=1e-3)
    assert best["kl"] > 0 and best["analytic_mean"] == best["reward"]


def test_a_start_that_nothing_improves_on_is_exported_with_a_warning(start, tmp_path):
    done = run(tmp_path / "out", start, "ppo.learning_rate=0.01", "--max_steps=1", "--eval_every=1",
               "ppo.train_scale_dir=false", "ppo.train_scale_time=false", "ppo.kl_coef=0")  # fmt: skip
    assert "No evaluated table was better than the start" in done.log
    document = predictor_files.load(done.output).document
    assert document["training"]["step"] == 0


def test_learned_factors_that_leave_their_range_survive_the_file(start, tmp_path):
    done = run(tmp_path / "out", start, "ppo.learning_rate=0.01", "ppo.scale_std=0.5", "ppo.kl_coef=0")
    content = predictor_files.load(done.output)
    assert (content.tables.scale_time - 1).abs().max() > 0.2 and content.raw.scale_time_range > 0.2


def test_sampling_takes_the_result(start, tmp_path):
    done = run(tmp_path / "out", start)
    sample_epd.main([f"--predictor_path={done.output}", "--seeds=0-3", f"--outdir={tmp_path / 'images'}"])
    assert len(list((tmp_path / "images").rglob("*.png"))) == 4


@pytest.mark.parametrize("point", ["mean", "mode"])
def test_any_checkpoint_can_be_exported(point, start, tmp_path, capsys):
    done = run(tmp_path / "out", start, "logging.save_interval=1", "ppo.scale_std=0.3", "--max_steps=2")
    scale = {"mean": "mean", "mode": "median"}[point]
    train_epd_rl.main([f"--export={done.output}", f"--export_point={point}", f"--export_scale={scale}"])
    path = done.output / "export/predictor-000002.json"
    assert str(path) in capsys.readouterr().out and predictor_files.find(done.output).name == "predictor.json"  # the best
    found, last = (predictor_files.read(each).tables for each in (path, done.output / "predictor-000002.json"))
    same = [torch.allclose(one, other, atol=1e-6) for one, other in zip(found, last, strict=True)]
    assert same == [point == "mean"] * 4
    train_epd_rl.main([f"--export={done.output}", "--checkpoint=checkpoint-1", f"--output_dir={tmp_path / 'own'}", "--no_manifest"])
    assert [file.name for file in (tmp_path / "own").iterdir()] == ["predictor-000001.json"]
    for flag, words in (("--checkpoint=checkpoint-9", "--checkpoint checkpoint-9 is neither"), ("--device=foo", "--device foo")):
        with pytest.raises(options.UserError, match=words):
            train_epd_rl.main([f"--export={done.output}", flag])
    manifest = json.loads((done.output / "export/manifest-000002.json").read_text())
    assert manifest["checkpoint"] == "checkpoint-2" and manifest["metrics"]["step"] == 2


def test_runs_get_folders_of_their_own_that_carry_date_and_name(start, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")  # which the helper reads

    def go(*more):
        train(tmp_path, *flags(start, "--nosubdir=False", *more), script=SCRIPT)
        return sorted(path.name for path in tmp_path.glob("*-*"))

    first = go("--max_steps=1")
    assert len(first) == 1 and re.fullmatch(r"\d{8}-\d{6}-rl_run", first[0])
    assert len(go("--max_steps=1", "run.run_name=other")) == 2 and len(go("--max_steps=1")) == 3
    assert len(go("--resume=latest", "--max_steps=2")) == 3
    newest = max(path for path in tmp_path.glob("*-rl_run*"))
    assert (newest / "checkpoint-2").is_dir() and not (tmp_path / first[0] / "checkpoint-2").exists()


def test_the_place_of_the_model_is_recorded_so_that_it_is_found_from_any_folder(start, tmp_path, monkeypatch):
    file, _, world = MIXTURE.partition(":")
    monkeypatch.chdir(Path(file).parent)
    run(tmp_path / "out", start, f"model.backend_options.gmm_file={Path(file).name}:{world}", "--max_steps=1")
    assert predictor_files.load(tmp_path / "out").model["backend_config"]["gmm_file"] == MIXTURE
