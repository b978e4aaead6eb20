"""Distilling EPD tables: the script's updates against a plain loop, settings that must not matter, what it writes."""

import json
import math

import pytest
import torch
from conftest import ROOT, read_rows
from inprocess import MIXTURES

import train_epd
from brisk import denoisers, epd, epd_distill, epd_run, predictor_files, sigmas, solvers

STEPS = 3
CLASSES = ("--num_steps=4", "--afs=False", "--M=2", "--teacher_substeps=2", "--sampler_tea=heun")


def table_of(output):
    """The raw parameters (4, S, K) in a run's exported predictor."""
    return torch.stack(predictor_files.load(output).raw[:4])


def last_table(output):
    """Those of its last snapshot."""
    return torch.stack(predictor_files.read(max(output.glob("predictor-*.json"))).raw[:4])


def plain_loop(args, levels, dense, denoiser, feature=None, guidance=None, steps=STEPS):
    """(raw tables, their average, losses of each batch): the training written down anew from arXiv 2507.14797, one interval at a
    time and without the bookkeeping of `epd_distill.updates`."""
    raw = epd.Tables(*(table.requires_grad_() for table in epd.initial_raw(args.num_steps - 1, args.num_points)))
    average, logged = torch.stack([table.detach().clone() for table in raw]), []
    adam = torch.optim.Adam(raw, lr=args.learning_rate)
    count = args.num_steps - 1
    for number in range(steps):
        noise, given = epd_run.draw(args.batch, denoiser, None, args.seed, number)
        direction = denoisers.direction_for(denoiser, given, args.batch, *(guidance or ()))
        x = start = noise if denoiser.flow else noise * levels[0]
        goals = epd_distill.teacher_states(args.sampler_tea, direction, start, dense, args.M,
                                           solvers.SolverOptions(max_order=args.max_order or 3), args.teacher_substeps)  # fmt: skip
        if args.coslr:
            final = args.max_train_steps + 1
            adam.param_groups[0]["lr"] = 0.01 + (args.learning_rate - 0.01) * (1 + math.cos(math.pi * number / final)) / 2
        losses, recent = [], []
        for n in range(count):
            x = x.detach() if args.update_mode == "detach" else x
            first = (x / math.sqrt(1 + levels[0] ** 2) if args.afs and n == 0 else direction(x, torch.full((len(x),), levels[n])))
            recent = [first, *recent][: epd.history_order(args.sampler_stu, args.max_order)]
            weights = {1: [1], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12]}[len(recent)]
            predictor = sum(weight * each for weight, each in zip(weights, recent, strict=True))
            recent = [each.detach() for each in recent]
            total, row = 0, epd.effective(raw, args.scale_dir, args.scale_time, args.fcn).row(n)
            for r, weight, c, a in zip(*row, strict=True):
                tau = levels[n] ** (1 - r) * levels[n + 1] ** r
                y = x + (tau - levels[n]) * predictor
                total = total + weight * c * a * direction(y, (a * tau).expand(len(x)))
            x = x + (levels[n + 1] - levels[n]) * total
            loss = ((x - goals[n]) ** 2).sum() / args.batch
            if feature and n == count - 1:
                loss = args.alpha * x[0].numel() * ((feature(x) - feature(goals[n])) ** 2).mean()
            losses.append(loss)
            if args.update_mode in ("per_step", "detach"):
                adam.zero_grad(set_to_none=False)
                loss.backward(retain_graph=True)
                adam.step()
        if args.update_mode in ("joint", "final_only"):
            adam.zero_grad(set_to_none=False)
            (sum(losses) if args.update_mode == "joint" else losses[-1]).backward()
            adam.step()
        average = args.ema_decay * average + (1 - args.ema_decay) * torch.stack([table.detach() for table in raw])
        logged.append(sum(loss.item() for loss in losses))
    return torch.stack([table.detach() for table in raw]), average, logged


def args_of(run_flags):
    return train_epd.parse_args(list(map(str, run_flags)))[0]


@pytest.fixture(scope="module")
def both(run_epd, base_flags):
    """A function: flags -> (the run, what `plain_loop` finds for the same flags)."""

    def run(*flags, feature=None, guidance=None):
        flags = ("--eval_every=0", f"--max_train_steps={STEPS}", *flags)
        args = args_of(base_flags(*flags, script="train_epd"))
        denoiser = denoisers.load_mixture(args.gmm_file)
        points = (args.num_steps, (args.M + 1) * (args.num_steps - 1) + 1)
        grids = [denoisers.grid(denoiser, args.schedule_type, count).tolist() for count in points]
        return run_epd(*flags), plain_loop(args, *grids, denoiser, feature, guidance)

    return run


CASES = {
    "joint": ("--update_mode=joint",),
    "per_step": ("--update_mode=per_step", "--num_steps=4", "--coslr"),
    "detach": ("--update_mode=detach", "--num_steps=4", "--scale_dir=0.2"),
    "final_only": ("--update_mode=final_only", "--num_points=3", "--fcn"),
    "plug-in": ("--update_mode=per_step", "--sampler_stu=ipndm", "--num_steps=5", "--sampler_tea=dpm", "--scale_time=0.2"),
    "plug-in, order 2, ipndm teacher": ("--update_mode=per_step", "--sampler_stu=ipndm", "--max_order=2", "--num_steps=4",
                                        "--sampler_tea=ipndm", "--M=3"),
    "heun": ("--update_mode=joint", *CLASSES, "--ema_decay=0.5"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_a_plain_loop(case, both):
    run, (raw, average, losses) = both(*CASES[case])
    trained = last_table(run.output)
    start = torch.stack(epd.initial_raw(raw.shape[1], raw.shape[2]))
    assert (average - start).abs().max() > 0.04, "tables that hardly move prove nothing"
    torch.testing.assert_close(trained, average, atol=2e-3 * (average - start).abs().max().item(), rtol=0)
    assert [row["loss"] for row in run.rows] == pytest.approx(losses, rel=1e-3)
    assert torch.equal(table_of(run.output), trained), "without validation the last table is the result"


def test_cases_train_differently(both):
    """Guards the comparison above: a flag that did nothing would agree too."""
    found = [tuple(both(*flags)[1][2]) for flags in CASES.values()]
    assert len(set(found)) == len(CASES)


def test_labels_and_guidance_reach_teacher_and_student(both, tmp_path):
    flags = ("--guidance_type=cfg", "--guidance_rate=1.5", "--update_mode=joint", "--num_steps=4")
    run, (raw, _, losses) = both(*flags, guidance=("cfg", 1.5))
    assert [row["loss"] for row in run.rows] == pytest.approx(losses, rel=1e-3)
    assert run.rows[0]["loss"] != pytest.approx(both(*flags[2:])[0].rows[0]["loss"], rel=0.05)
    model = predictor_files.load(run.output).model
    assert (model["guidance_type"], model["guidance_rate"]) == ("cfg", 1.5)


class Feature(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.flatten(1)[:, :2]
        return torch.stack([pixels[:, 0] / 50, pixels[:, 1] / 25, pixels.sum(1) / 100], 1)


class Inception(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pixels = images.flatten(1)[:, :2]
        features = torch.stack([pixels[:, 0] / 50, pixels[:, 1] / 25, pixels.sum(1) / 100], 1)
        return features if return_features else features[:, :1]


@pytest.mark.parametrize("network", [Feature, Inception])
def test_the_last_interval_may_be_compared_in_features(network, both, tmp_path):
    """The plain loop looks at the pixels 127.5 x + 128, clipped, that the first channel shows."""
    torch.jit.script(network()).save(tmp_path / "feature.pt")

    def feature(x):
        return Feature()((127.5 * x.flatten(1) + 128).clamp(0, 255))

    flags = ("--update_mode=joint", f"--feature_model={tmp_path / 'feature.pt'}", "--alpha=3")
    run, (_, average, losses) = both(*flags, feature=feature)
    assert [row["loss"] for row in run.rows] == pytest.approx(losses, rel=1e-3)
    assert (last_table(run.output) - average).abs().max() < 1e-3
    assert run.rows[0]["loss"] != pytest.approx(both("--update_mode=joint")[0].rows[0]["loss"], rel=0.05)


@pytest.mark.parametrize("setting", [
    ("--batch_gpu=2",), ("--gradient_checkpointing",), ("--max_branch_batch=3",),
    ("--batch_gpu=4", "--gradient_checkpointing", "--max_branch_batch=5"),
], ids=" ".join)  # fmt: skip
@pytest.mark.parametrize("mode", ["per_step", "joint", "detach"])
def test_settings_of_memory_change_nothing(mode, setting, run_epd):
    flags = (f"--update_mode={mode}", "--num_steps=4", "--eval_every=1", "--sampler_stu=ipndm", "--learning_rate=0.01")
    expected, run = run_epd(*flags), run_epd(*flags, *setting)
    moved = (last_table(expected.output) - torch.stack(epd.initial_raw(3, 2))).abs().max()
    assert (last_table(run.output) - last_table(expected.output)).abs().max() < 1e-3 * moved
    names = [name for name in expected.rows[0] if name.startswith(("loss", "interval", "grad", "table"))]
    assert len(names) > 20
    for row, other in zip(run.rows, expected.rows, strict=True):
        assert [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-3, abs=1e-6)
    found, wanted = (json.loads((each.output / "report.json").read_text()) for each in (run, expected))
    assert found["best"]["error"] == pytest.approx(wanted["best"]["error"], rel=1e-4)


def test_gradients_through_the_history_are_another_training(run_epd):
    flags = ("--update_mode=joint", "--sampler_stu=ipndm", "--num_steps=4", "--eval_every=0")
    detached, through, epd_alone = (run_epd(*flags, *more).rows for more in ((), ("--detach_history=False",), ("--max_order=1",)))
    assert detached[0]["loss"] == through[0]["loss"] != epd_alone[0]["loss"]
    assert detached[0]["grad_norm"] != pytest.approx(through[0]["grad_norm"], rel=1e-3)


def test_no_call_has_more_rows_than_allowed_and_points_share_one(run_epd, monkeypatch):
    from brisk import mixture

    rows, original = [], mixture.direction

    def counted(world, x, *rest, **named):
        rows.append(len(x))
        return original(world, x, *rest, **named)

    monkeypatch.setattr(mixture, "direction", counted)
    flags = ("--eval_every=0", "--max_train_steps=1", "--sampler_tea=euler", "--M=0", "--num_points=3", "--update_mode=joint")
    run_epd(*flags)
    assert rows == [8, 8] + [24, 8, 24], "two calls of the teacher; points, direction, points of the student"
    rows.clear()
    run_epd(*flags, "--max_branch_batch=10")
    assert rows == [8, 8] + [10, 10, 4, 8, 10, 10, 4]


def test_published_rule_chooses_the_update_mode(run_epd):
    def mode(*flags):
        output = run_epd("--max_train_steps=1", "--eval_every=0", *flags).output
        return json.loads((output / "run_manifest.json").read_text())["update_mode"]

    assert mode() == "per_step" and mode("--dataset_name=cifar10") == "final_only"
    assert mode("--dataset_name=cifar10", "--num_steps=6") == mode("--dataset_name=cifar10", "--sampler_stu=ipndm") == "per_step"
    assert mode("--dataset_name=cifar10", "--update_mode=joint") == "joint"


def test_what_a_run_writes(run_epd):
    run = run_epd("--max_train_steps=4", "--eval_every=2", "--checkpointing_steps=2", "--tick=0.008", "--snap=2", "--desc=x",
                  "--num_steps=4", "--update_mode=joint")  # fmt: skip
    names = {path.name for path in run.output.iterdir()}
    assert names == {"README.md", "checkpoint-2", "checkpoint-4", "export", "metrics.jsonl", "predictor-000000.json", "report.json",
                     "run_manifest.json", "train_config.yaml"}  # fmt: skip
    content = predictor_files.load(run.output)
    assert predictor_files.find(run.output) == run.output / "export/predictor.json"
    assert content.solver[:] == ("epd", 4, 2, True, None, False) and content.nfe.para_nfe == 5
    assert content.sigmas.tolist() == sigmas.time_uniform(4, 0.002, 80.0).tolist()
    document = content.document
    assert document["stage"] == "distilled" and document["name"] == "gmm-4-5-epd-dpm-1-uni1-afs-x"
    assert document["teacher"] == {"solver": "dpm", "M": 1, "num_steps": 7, "substeps_per_interval": 1}
    assert document["model"]["backend"] == "gmm" and document["model"]["backend_config"]["gmm_file"] == str(MIXTURES)
    assert document["raw"]["scale_dir_range"] == document["raw"]["scale_time_range"] == 0.05
    report = json.loads((run.output / "report.json").read_text())
    assert document["training"]["rmse"] == report["best"] and [step for step, _ in report["history"]] == [2, 4]
    assert report["best"]["error"] == min(error for _, error in report["history"])
    row = run.rows[-1]
    assert row["step"] == 4 and row["images"] == 32 and {"interval/0", "interval/1", "interval/2", "lr", "grad_norm"} <= set(row)
    snapshot = predictor_files.read(run.output / "predictor-000000.json")
    for name, table in snapshot.tables._asdict().items():
        logged = torch.tensor([[row[f"table/{name}/{n}.{k}"] for k in range(2)] for n in range(3)])
        assert torch.allclose(logged, table.float(), atol=1e-6)
    card = (run.output / "README.md").read_text()
    assert f"sample_epd.py --predictor_path {run.output}" in card and "4 updates of the batch 8" in card
    assert f"untrained {report['start']['untrained']:.4g} -> trained {report['best']['error']:.4g}" in card + run.log


def test_the_norm_of_each_interval_is_logged(run_epd, base_flags):
    flags = ("--eval_every=0", "--max_train_steps=1", "--update_mode=joint", "--learning_rate=0")
    args = args_of(base_flags(*flags, script="train_epd"))
    denoiser = denoisers.load_mixture(args.gmm_file)
    levels, dense = (sigmas.time_uniform(count, 0.002, 80.0).tolist() for count in (3, 5))
    x = epd_run.draw(8, denoiser, None, 7, 0)[0] * 80
    direction = denoisers.direction_for(denoiser, epd_run.draw(8, denoiser, None, 7, 0)[1], 8)
    goals = epd_distill.teacher_states("dpm", direction, x, dense, 1)
    ends = epd.solve(direction, x, levels, epd.rows_of(epd.effective(epd.initial_raw(2, 2), 0.05, 0.05)), afs=True)
    expected = [((end - goal) ** 2).flatten(1).norm(dim=1).mean().item() for end, goal in zip(ends, goals, strict=True)]
    row = run_epd(*flags).rows[0]
    assert [row["interval/0"], row["interval/1"]] == pytest.approx(expected, rel=1e-4)


def test_the_best_table_is_kept_where_training_goes_wrong(run_epd):
    """A rate that is far too high: the first validation is better than the last."""
    run = run_epd("--max_train_steps=12", "--eval_every=1", "--learning_rate=1.5", "--update_mode=joint", "--eval_samples=64")
    report = json.loads((run.output / "report.json").read_text())
    errors = dict(report["history"])
    assert report["best"]["step"] != 12 and errors[12] > report["best"]["error"] == min(errors.values())
    assert not torch.equal(table_of(run.output), last_table(run.output))
    at = run.rows[report["best"]["step"] - 1]
    best = predictor_files.load(run.output).tables
    assert [at[f"table/r/0.{k}"] for k in range(2)] == pytest.approx(best.r[0].tolist(), rel=1e-6)


def test_validation_is_the_distance_to_a_long_run_on_the_same_latents_whatever_the_seed(run_epd):
    flags = ("--max_train_steps=1", "--eval_every=1", "--eval_samples=16", "--eval_steps=50")
    reports = [json.loads((run_epd(*flags, f"--seed={seed}").output / "report.json").read_text()) for seed in (1, 2)]
    assert reports[0]["start"] == reports[1]["start"] and reports[0]["history"] != reports[1]["history"]
    denoiser = denoisers.load_mixture(MIXTURES)
    noise, given = epd_run.draw(16, denoiser, None, "validation")
    direction = denoisers.direction_for(denoiser, given, 16)
    x = 80 * noise
    reference = solvers.last(solvers.heun(direction, x, sigmas.polynomial(50, 0.002, 80.0)))
    levels, options = sigmas.polynomial(5, 0.002, 80.0), solvers.SolverOptions(afs=True, max_order=4)
    for name, solver in (("ddim", solvers.euler), ("ipndm", solvers.ipndm)):
        calls = solvers.network_calls(name, len(levels), options)
        assert calls == reports[0]["para_nfe"] == 3
        end = solvers.last(solver(direction, x, levels, options))
        assert reports[0]["start"][name] == pytest.approx(((end - reference) ** 2).sum((1, 2, 3)).mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("init", ["normal", "thirds"])
def test_other_starts(init, run_epd):
    run = run_epd(f"--init={init}", "--learning_rate=0", "--eval_every=0", "--max_train_steps=1")
    content = predictor_files.load(run.output)
    if init == "thirds":
        assert content.tables.r.tolist() == [[pytest.approx(0.335), pytest.approx(0.665)]] * 2
    else:
        again = predictor_files.load(run_epd("--init=normal", "--learning_rate=0", "--max_train_steps=1", "--seed=8").output)
        assert not torch.equal(again.raw.r, content.raw.r) and content.raw.r.std() > 0.1


def test_seed_random_is_drawn_recorded_and_repeats_the_run(run_epd):
    import yaml

    first, second = (run_epd("--seed=random", "--eval_every=0") for _ in range(2))
    seeds = [yaml.safe_load((run.output / "train_config.yaml").read_text())["seed"] for run in (first, second)]
    assert seeds[0] != seeds[1] and first.rows[0]["loss"] != second.rows[0]["loss"]
    again = run_epd(f"--seed={seeds[0]}", "--eval_every=0")
    assert torch.equal(table_of(again.output), table_of(first.output))


def test_runs_are_numbered_and_named_by_their_settings(run_epd, tmp_path):
    def names(*flags):
        run_epd("--nosubdir=False", "--eval_every=0", "--max_train_steps=1", *flags, output=tmp_path)
        return sorted(path.name for path in tmp_path.iterdir())

    assert names() == ["00001-gmm-3-3-epd-dpm-1-uni1-afs"]
    (tmp_path / "00041-something").mkdir()
    assert names("--dataset_name=cifar10", "--schedule_type=polynomial", "--afs=False", "--desc=d")[-1] == (
        "00042-cifar10-3-4-epd-dpm-1-poly7-d")  # fmt: skip
    assert names("--dataset_name=ms_coco", "--schedule_type=logsnr", "--sampler_stu=ipndm", "--M=2")[-1] == (
        "00043-ms_coco-3-6-ipndm-dpm-2-logsnr-afs")  # fmt: skip


def test_a_number_that_another_run_took_meanwhile_is_not_shared(tmp_path):
    chosen = epd_run.choose_folder(tmp_path, "gmm-3", False)
    assert epd_run.claim_folder(chosen) == tmp_path / "00001-gmm-3"
    assert epd_run.claim_folder(chosen) == tmp_path / "00002-gmm-3" and (tmp_path / "00002-gmm-3").is_dir()


def test_a_new_run_in_the_same_folder_leaves_no_old_table_to_be_found(run_epd, tmp_path):
    run_epd("--max_train_steps=1", output=tmp_path)
    old = (tmp_path / "export/predictor.json").read_bytes()
    run = run_epd("--max_train_steps=1", "--seed=8", "--eval_every=0", output=tmp_path)
    assert (tmp_path / "earlier-1/export/predictor.json").read_bytes() == old
    assert list((tmp_path / "earlier-1").glob("predictor-*.json")) and run.rows[-1]["step"] == 1


def test_a_prompt_on_the_command_line_replaces_the_file_of_the_recipe():
    args, _ = train_epd.parse_args(["--config=ms_coco", "--prompt=a fox"])
    assert args.prompt == "a fox" and args.prompt_path is None


def test_dry_run_prints_the_plan_and_leaves_nothing(run_epd, tmp_path):
    run = run_epd("-n", "--num_steps=4", output=tmp_path / "out")
    assert "5 sequential, 8 evaluations in all, 3 intervals" in run.log and "teacher_levels 7" in run.log
    assert "nothing was trained" in run.log and not (tmp_path / "out").exists()


def test_length_is_counted_in_latents(run_main, base_flags, tmp_path):
    flags = [flag for flag in base_flags("--eval_every=0", "--coslr", script="train_epd") if "max_train_steps" not in flag]
    train_epd.main([*flags, "--total_kimg=0.044", "--learning_rate=0.2", f"--output_dir={tmp_path / 'out'}"])
    rows = read_rows(tmp_path / "out")
    assert [row["images"] for row in rows] == [8, 16, 24, 32, 40, 48], "the batch that passes 44 is the last"
    expected = [0.01 + 0.19 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert [row["lr"] for row in rows] == pytest.approx(expected)


def test_flow_matching_starts_from_plain_noise(run_epd, tmp_path):
    world = json.loads(MIXTURES.read_text())["world"]["gmm2d"]
    (tmp_path / "flow.json").write_text(json.dumps({**world, "flow": True, "class_weights": None}))
    flags = (f"--gmm_file={tmp_path / 'flow.json'}", "--schedule_type=flowmatch", "--num_steps=4", "--update_mode=joint")
    run = run_epd(*flags, "--max_train_steps=60", "--eval_every=20", "--batch=32", "--log_every=60", "--eval_samples=64")
    content = predictor_files.load(run.output)
    assert content.document["schedule"]["flow"] == {"shift": 3.0, "mu": None}
    assert content.sigmas.tolist() == sigmas.flowmatch(4).tolist()
    report = json.loads((run.output / "report.json").read_text())
    assert report["best"]["error"] < min(report["start"].values()), "it beats Euler and iPNDM of as many calls"


def test_tensorboard_shows_losses_and_the_table(run_epd):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_epd("--report_to=tensorboard", "--eval_every=1")
    file = min((run.output / "logs").rglob("events*"), key=lambda path: len(path.parts))
    events = EventAccumulator(str(file.parent))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"train/loss", "interval/1", "table/r/0.0", "table/weight/1.1", "table/scale_time/1.0", "validation/rmse"} <= set(tags)
    shown = [event.value for event in events.Scalars("table/r/1.1")]
    assert shown == pytest.approx([row["table/r/1.1"] for row in read_rows(run.output)])


def test_a_pipeline_of_prompts_is_trained_on_captions_with_guidance(run_epd, calls_of, tmp_path, monkeypatch):
    """The built-in Stable Diffusion: discrete levels, a random caption per sample, the unconditional half beside it."""
    calls = calls_of(denoisers, "direction_for")
    (tmp_path / "captions.csv").write_text("image,caption\n1,a red handwritten two\n2,a blue handwritten one\n3,\n")
    monkeypatch.chdir(ROOT)
    run = run_epd("--pretrained_model_name_or_path=assets/tiny-teacher", f"--prompt_path={tmp_path / 'captions.csv'}",
                  "--schedule_type=discrete", "--num_steps=3", "--afs", "--sampler_tea=ipndm", "--M=1", "--batch=4",
                  "--guidance_type=cfg", "--guidance_rate=2", "--eval_samples=2", "--eval_steps=4", "--learning_rate=0.05",
                  "--update_mode=joint", "--max_train_steps=2", "--mixed_precision=bf16")  # fmt: skip
    batches = [args[1] for args, _, _ in calls if len(args[1]) == 4]
    assert {prompt for prompts in batches for prompt in prompts} == {"a red handwritten two", "a blue handwritten one"}
    assert len(batches) == 2 and all(args[3:] == ("cfg", 2.0) for args, _, _ in calls)
    assert all(math.isfinite(row["loss"]) for row in run.rows)
    content = predictor_files.load(run.output)
    assert content.model["backend"] == "sd" and content.model["img_resolution"] == 32
    place = content.model["backend_config"]["model_name_or_path"]
    assert place == f"{ROOT}/assets/tiny-teacher", "it must be found from any folder"
    assert content.sigmas[0].item() == pytest.approx(14.6146, rel=1e-3)
    counted = json.loads((run.output / "report.json").read_text())
    assert (counted["para_nfe"], counted["para_nfe_cfg"]) == (3, 6)  # a guided pair counts once, and twice
    card = (run.output / "README.md").read_text()
    assert 'pipe("a prompt", guidance_scale=2, num_inference_steps=2)' in card and "EPDScheduler.from_predictor" in card


def test_an_edm_network_is_trained_on_the_pixels_of_its_denoiser(run_epd, tmp_path):
    from safetensors.torch import save_file

    from brisk import edm_nets

    config = {"img_resolution": 8, "img_channels": 3, "label_dim": 4, "model_type": "SongUNet", "model_channels": 8,
              "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}  # fmt: skip
    network = edm_nets.make_network(config)
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "net/model.safetensors")
    run = run_epd(f"--pretrained_model_name_or_path={tmp_path / 'net'}", "--backend=edm", "--dataset_name=imagenet64", "--afs",
                  "--num_steps=3", "--M=1", "--batch=4", "--eval_samples=3", "--eval_steps=4", "--gradient_checkpointing",
                  "--schedule_type=time_uniform", "--learning_rate=0.1")  # fmt: skip
    content = predictor_files.load(run.output)
    assert content.model["backend"] == "edm" and content.model["dataset"] == "imagenet64"
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in run.rows)
    report = json.loads((run.output / "report.json").read_text())
    assert report["best"]["error"] != report["start"]["untrained"]
