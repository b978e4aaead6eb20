"""A checkpoint of a training run draws what the run's export draws, for every training script."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from inprocess import BKSDM, EPD, FPDM, make_inputs, train

from brisk import eval_checkpoints, eval_models, sd_models, tiny
from brisk.options import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import epd_rl_runs  # noqa: E402

PROMPTS, SEEDS = ["a red fox", "two cats"], [3, 4]
TWO_STEPS = ("--max_train_steps=2", "--checkpointing_steps=1")
GUIDED = {"guidance_type": "cfg", "guidance_rate": 2.0}


def draw(source, nfe=2, conditions=PROMPTS, **load):
    """Images of two seeds from a source."""
    model = eval_models.load(source, **load)
    return eval_models.plan(model, model.fixed_nfe or nfe).draw(conditions, SEEDS)


def assert_same(one, two):
    """The same pictures up to rounding, which do not depend on nothing."""
    assert one.shape == two.shape and np.abs(one.astype(int) - two).max() <= 1
    assert np.abs(one[0].astype(int) - one[1]).mean() > 1


def differs(one, two):
    return np.abs(one.astype(int) - two).max() > 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with tiny teachers and shards that the runs share."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def slam(place):
    train(place / "slam", *make_inputs(place), *TWO_STEPS, "--ema_decay=0.5", "--learning_rate=0.02", "--num_ddim_timesteps=20")
    return place / "slam"


def test_slam_draws_as_the_pipeline_that_is_exported(slam):
    found = draw(slam / "checkpoint-2")
    assert_same(found, draw(slam))
    assert differs(found, draw(slam / "checkpoint-1"))
    model = eval_models.load(slam / "checkpoint-2")
    assert model.few_steps and model.takes == "prompts"
    plan = eval_models.plan(model, 2)
    assert plan.facts["guidance_scale"] == 1.0 and plan.facts["scheduler"] == "LCM"
    assert plan.facts["scheduler_settings"]["original_inference_steps"] == 20


@pytest.mark.parametrize("average", [False, True])
def test_slam_adapters_are_added_to_the_teacher(place, tmp_path, average):
    flags = ("--use_lora", "--lora_rank=4", "--lora_alpha=6", *["--lora_ema", "--ema_decay=0.5"] * average)
    train(tmp_path / "lora", *make_inputs(place), *TWO_STEPS, *flags, "--learning_rate=0.05")
    found = draw(tmp_path / "lora/checkpoint-2")
    for weights, same in ((tmp_path / "lora/target", average), (tmp_path / "lora", not average)):
        if weights.is_dir():
            pipe = DiffusionPipeline.from_pretrained(place / "sd1")
            pipe.load_lora_weights(weights)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            pipe.scheduler = LCMScheduler.from_pretrained(tmp_path / "lora", subfolder="scheduler")
            pipe.save_pretrained(tmp_path / "fused")
            assert differs(found, draw(tmp_path / "fused")) != same
    assert differs(found, draw(place / "sd1"))


@pytest.mark.parametrize("average", [False, True])
def test_bksdm_draws_with_the_student_in_the_teachers_pipeline(place, tmp_path, average):
    flags = make_inputs(place, "toy_sd1", BKSDM)
    own = ("--save_pipeline", *["--use_ema", "--ema_decay=0.5"] * average)
    flags = [flag.replace("--pretrained_teacher_model", "--pretrained_model_name_or_path") for flag in flags]
    train(tmp_path / "small", *flags, *TWO_STEPS, *own, "--preset=bk_small", "--learning_rate=0.02", script=BKSDM)
    found = draw(tmp_path / "small/checkpoint-2")
    assert_same(found, draw(tmp_path / "small"))
    assert differs(found, draw(tmp_path / "small/checkpoint-1")) and differs(found, draw(place / "toy_sd1"))


def test_fpdm_draws_with_the_average_and_the_vae_of_the_run_or_one_that_is_given(tmp_path):
    run, vae = tmp_path / "run", tmp_path / "vae"
    tiny.make_vae("tiny_8").save_pretrained(vae)
    train(run, *make_inputs(tmp_path, script=FPDM), *TWO_STEPS, "--fixed_point", "--ema_decay=0.5", "--learning_rate=0.05",
          script=FPDM)  # fmt: skip
    with pytest.raises(UserError, match="has no VAE to make images of its latents: give one as vae=FOLDER"):
        draw(run / "checkpoint-2", conditions=[0, 1])
    found = draw(run / "checkpoint-2", conditions=[0, 1], vae=str(vae))
    assert_same(found, draw(run, conditions=[0, 1], vae=str(vae)))
    assert differs(found, draw(run / "checkpoint-1", conditions=[0, 1], vae=str(vae)))
    model = eval_models.load(run / "checkpoint-2", vae=str(vae))
    assert (model.kind, model.takes, model.classes) == ("fpdm", "classes", 4)
    with pytest.raises(UserError, match="starts from no model: leave out model=x"):
        eval_models.load(run / "checkpoint-2", vae=str(vae), model="x")
    shutil.copytree(vae, run / "vae")
    assert_same(found, draw(run / "checkpoint-2", conditions=[0, 1]))


def test_epd_draws_with_the_average_of_the_tables(place, tmp_path):
    make_inputs(place)
    train(tmp_path, "--report_to=none", "--nosubdir", "--eval_every=0", f"--pretrained_model_name_or_path={place / 'sd1'}",
          "--schedule_type=discrete", "--num_steps=3", "--sampler_tea=euler", "--M=1", "--teacher_substeps=1", "--batch=2",
          "--guidance_type=cfg", "--guidance_rate=2", "--prompt=a red fox", "--learning_rate=0.3", "--ema_decay=0.5", *TWO_STEPS,
          script=EPD)  # fmt: skip
    found = draw(tmp_path / "checkpoint-2")
    assert_same(found, draw(tmp_path))
    assert differs(found, draw(tmp_path / "checkpoint-1"))
    model = eval_models.load(tmp_path / "checkpoint-2")
    assert model.fixed_nfe == 4 and eval_models.plan(model).facts["guidance_scale"] == 2
    pipe = tiny_pipelines.make("sd1", seed=1)
    pipe.save_pretrained(tmp_path / "other")
    other = draw(tmp_path / "checkpoint-2", model=str(tmp_path / "other"))
    assert_same(other, draw(tmp_path, model=str(tmp_path / "other")))
    assert differs(found, other)


def test_tuned_epd_draws_with_the_mean_of_the_policy(place, tmp_path):
    make_inputs(place)
    start = epd_rl_runs.pipeline_start(tmp_path, "sd", place / "sd1", False, **GUIDED)
    (tmp_path / "prompts.csv").write_text("text\na red fox\ntwo cats\n")
    train(tmp_path / "run", *epd_rl_runs.flags(start, f"data.prompt_csv={tmp_path / 'prompts.csv'}", "ppo.learning_rate=0.02",
                                               "--max_steps=2", "--checkpointing_steps=1"), script="train_epd_rl")  # fmt: skip
    found = draw(tmp_path / "run/checkpoint-2")
    assert_same(found, draw(tmp_path / "run"))
    assert differs(found, draw(start))
    assert not list((tmp_path / "run/export").glob("*-000001*"))


def test_a_checkpoint_that_is_not_whole_is_refused(slam, place, tmp_path):
    assert eval_checkpoints.is_checkpoint(slam / "checkpoint-2") and not eval_checkpoints.is_checkpoint(slam)
    copied = tmp_path / "run/checkpoint-2"
    shutil.copytree(slam / "checkpoint-2", copied)
    assert_same(draw(copied), draw(slam / "checkpoint-2"))
    (copied / "unet_target/config.json").unlink()
    with pytest.raises(UserError, match="checkpoint-2 cannot be used: unet_target/config.json is missing"):
        eval_models.load(copied)
    (copied / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="it was not finished"):
        eval_models.load(copied)


def test_the_pipeline_that_a_run_started_from_may_have_moved(slam, place, tmp_path):
    shutil.copytree(place / "sd1", tmp_path / "sd1")
    (place / "sd1").rename(place / "moved")
    try:
        with pytest.raises(UserError, match=r"the pipeline that slam started from \(model=\): .*sd1 is no such folder"):
            eval_models.load(slam / "checkpoint-2")
        found = draw(slam / "checkpoint-2", model=str(tmp_path / "sd1"))
    finally:
        (place / "moved").rename(place / "sd1")
    assert_same(found, draw(slam / "checkpoint-2"))


def test_networks_are_in_the_precision_that_is_asked_for(slam):
    model = eval_models.load(slam / "checkpoint-2", dtype=sd_models.DTYPES["bf16"])
    assert model.network.dtype == torch.bfloat16
    images = eval_models.plan(model, 1).draw(PROMPTS, SEEDS)
    assert images.dtype == np.uint8 and images.shape == (2, 32, 32, 3)
