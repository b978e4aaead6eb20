"""The recipes configs/epd/rl_*.yaml: published values, a dry run and two updates each on a tiny model of the family."""

import math

import pytest
import tiny_pipelines
from conftest import ROOT
from epd_rl_runs import SCRIPT, pipeline_start
from inprocess import train

import train_epd_rl
from brisk import epd_rl_options, options, predictor_files
from brisk.epd_scheduler import EPDScheduler

NAMES = sorted(path.stem for path in (ROOT / "configs/epd").glob("rl_*.yaml"))
COMMON = {
    "run.output_root": "exps", "run.seed": 0, "data.prompt_csv": None, "model.dataset_name": "ms_coco",
    "model.guidance_type": "cfg", "model.schedule_rho": 1.0, "model.num_steps": None, "model.num_points": None,
    "reward.type": "multi", "reward.weights_path": "weights/HPS_v2.1_compressed.pt", "reward.batch_size": 4,
    "reward.enable_amp": True,
    "reward.cache_dir": "weights", "reward.multi.weights.hps": 1.0, "reward.multi.weights.pickscore": 0.0,
    "reward.multi.weights.imagereward": 0.0, "reward.multi.weights.clip": 0.0, "reward.multi.weights.aesthetic": 0.0,
    "ppo.rollout_batch_size": 8, "ppo.rloo_k": 4, "ppo.ppo_epochs": 1, "ppo.minibatch_size": 4, "ppo.learning_rate": 7e-5,
    "ppo.clip_range": 0.2, "ppo.kl_coef": 0.0, "ppo.entropy_coef": 0.0, "ppo.max_grad_norm": 1.0, "ppo.decode_rgb": True,
    "ppo.steps": 99999, "ppo.dirichlet_concentration": 10.0, "logging.log_interval": 1, "logging.save_interval": 500,
}  # fmt: skip
SD3 = {"model.backend": "sd3", "model.guidance_rate": 4.5, "model.schedule_type": "flowmatch"}
EXPECTED = {
    "rl_sd15": {"run.run_name": "sd15", "model.backend": "ldm", "model.guidance_rate": 7.5, "model.schedule_type": "discrete",
                "ppo.dirichlet_concentration": 20.0, "model.resolution": None},
    "rl_sd3_512": SD3 | {"run.run_name": "sd3_512", "model.resolution": 512, "ppo.rollout_batch_size": 16},
    "rl_sd3_1024": SD3 | {"run.run_name": "sd3_1024", "model.resolution": 1024},
    "rl_flux_dev": {"run.run_name": "flux_dev", "model.backend": "flux", "model.resolution": 1024, "model.guidance_rate": 3.5,
                    "model.schedule_type": "flowmatch", "model.sigma_min": 0.001, "model.sigma_max": 1.0,
                    "model.flowmatch_mu": 1.15, "model.flowmatch_shift": 3.0, "reward.batch_size": 1, "ppo.steps": 20000,
                    "ppo.train_scale_dir": False, "ppo.train_scale_time": False, "logging.save_interval": 200},
}  # fmt: skip
FAMILIES = {"rl_sd15": ("sd1", "ldm"), "rl_sd3_512": ("sd3", "sd3"), "rl_sd3_1024": ("sd3", "sd3"), "rl_flux_dev": ("flux", "flux")}
DEFAULTS = {  # the published code's
    "run.output_root": "exps", "run.run_name": "rl_run", "run.seed": 0, "data.predictor_snapshot": None,
    "model.dataset_name": "ms_coco", "model.guidance_type": "cfg", "model.guidance_rate": 7.5, "model.schedule_type": "discrete",
    "model.schedule_rho": 1.0, "model.backend": "ldm", "model.resolution": None, "reward.type": "hps", "reward.batch_size": 2,
    "reward.enable_amp": True, "reward.hps_version": "v2.1", "reward.multi.weights.aesthetic": 1.0, "ppo.rollout_batch_size": 4,
    "ppo.rloo_k": 2, "ppo.ppo_epochs": 1, "ppo.minibatch_size": 2, "ppo.learning_rate": 5e-5, "ppo.clip_range": 0.2,
    "ppo.kl_coef": 0.01, "ppo.entropy_coef": 0.0, "ppo.max_grad_norm": None, "ppo.decode_rgb": True, "ppo.steps": 10,
    "ppo.dirichlet_concentration": 200.0, "ppo.scale_std": 0.05, "ppo.train_scale_dir": None, "ppo.train_scale_time": None,
    "logging.log_interval": 1, "logging.save_interval": 5,
}  # fmt: skip


def values(*flags):
    """{key: value} of a command line, the keys that are flags included."""
    args, _, settings, _ = train_epd_rl.parse_args(list(flags))
    return settings | {key: getattr(args, flag) for key, flag in epd_rl_options.FLAGS.items()}


@pytest.mark.quick
def test_every_recipe_ships_and_no_other():
    assert set(NAMES) == set(EXPECTED) | {"rl_gmm", "rl_tiny_digits"}


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_values_are_the_published_ones(name):
    found, expected = values(f"--config={name}"), COMMON | EXPECTED[name]
    assert {key: found[key] for key in expected} == expected
    args, given, settings, stated = train_epd_rl.parse_args([f"--config={ROOT / f'configs/epd/{name}.yaml'}"])
    epd_rl_options.check(settings, stated)
    assert not options.without_effect(given, epd_rl_options.effects(args, settings, args.mixed_precision, "prompts"))


@pytest.mark.quick
def test_defaults_are_the_published_ones():
    found = values()
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS


@pytest.fixture(scope="module")
def tiny_flags(tmp_path_factory):
    """A function: name of a recipe -> flags that put a tiny model in the place of its own."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "prompts.csv").write_text("caption\na red fox\ntwo cats\nthree dogs\n")

    def make(name):
        family, backend = FAMILIES[name]
        if not (folder / family).is_dir():
            tiny_pipelines.make(family).save_pretrained(folder / family)
        flow = backend != "ldm"
        start = pipeline_start(folder, backend, folder / family, flow, dataset="ms_coco", guidance_type="cfg", guidance_rate=2.0,
                               img_resolution=16 if flow else 32)  # fmt: skip
        over = {"data.predictor_snapshot": start, "data.prompt_csv": folder / "prompts.csv",
                "model.backend_options.model_name_or_path": folder / family}  # fmt: skip
        return [f"--config={name}", *(f"--override={key}={value}" for key, value in over.items()), "--report_to=none"]

    return make


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_dry_run_tells_the_plan_and_what_is_missing(name, tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")  # which the helper reads
    more = ["--override=model.resolution=null", "--dry_run", "--mixed_precision=no"]
    train(tmp_path, *tiny_flags(name), *more, script=SCRIPT)
    err = capsys.readouterr().err
    assert "model.guidance_rate" in err and "gives way to the predictor's 2.0" in err
    assert "Training needs the reward: reward." in err and "Dry run: nothing was trained" in err and "2 points per interval" in err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("name", ["rl_sd15", "rl_sd3_512", "rl_flux_dev"])
def test_recipe_tunes_a_tiny_model_of_its_family(name, tiny_flags, tmp_path):
    over = {"model.resolution": "null", "reward.type": "dummy", "reward.batch_size": 2, "ppo.rollout_batch_size": 4,
            "ppo.rloo_k": 2, "ppo.minibatch_size": 2, "ppo.learning_rate": 1e-3, "ppo.steps": 2}  # fmt: skip
    more = [f"--override={key}={value}" for key, value in over.items()]
    rows = train(tmp_path / "out", *tiny_flags(name), *more, "--mixed_precision=no", "--nosubdir", "--eval_every=2",
                 "--eval_samples=2", script=SCRIPT)  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["mixed_reward_std"] > 0 and row["grad_norm"] > 0 for row in rows)
    content = predictor_files.load(tmp_path / "out")
    assert content.model["backend"] == {"ldm": "sd"}.get(FAMILIES[name][1], FAMILIES[name][1])
    assert (content.model["guidance_rate"], content.solver.afs) == (2.0, False)
    pipe = tiny_pipelines.make(FAMILIES[name][0])
    scheduler = EPDScheduler.from_predictor(content, pipe.scheduler.config)
    scheduler.set_timesteps(2)
    assert len(scheduler.timesteps) == 6, "2 intervals of 1 + 2 calls"


def test_the_toy_recipe_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = train(tmp_path / "out", "--config=rl_gmm", "--max_steps=25", "--nosubdir", "--report_to=none", script=SCRIPT)
    assert rows[-1]["step"] == 25 and rows[-1]["mixed_reward_mean"] > rows[0]["mixed_reward_mean"]
