"""Sources of an evaluation: what they take, budgets of network calls, and images that depend on their seed alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import random_predictor
import tiny_pipelines
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, HeunDiscreteScheduler, LCMScheduler

from brisk import eval_models, predictor_files, tiny
from brisk.options import UserError

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, CLASSES = ["a red fox", "two cats", "b"], [1, 2, 3]
CAPTION = "a red handwritten seven on a yellow background"
TAKES = {"sd1": "prompts", "sd2": "prompts", "sdxl": "prompts", "pixart": "prompts", "sd3": "prompts", "dit": "classes",
         "cm_classes": "classes", "fpdm": "classes", "fpdm_flow": "classes", "cm": None, "ldm": None}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function: name of `tiny_pipelines`, or a made pipeline under a name -> its folder."""
    root = tmp_path_factory.mktemp("models")

    def folder(name, pipe=None, scheduler=None):
        place = root / name
        if not place.is_dir():
            pipe = pipe or tiny_pipelines.make(name)
            if scheduler is not None:
                pipe.scheduler = scheduler
            if name.startswith("fpdm"):  # as train_fpdm.py writes it
                pipe.transformer.save_pretrained(place / "transformer")
                pipe.vae.save_pretrained(place / "vae")
            else:
                pipe.save_pretrained(place)
        return str(place)

    return folder


def conditions(model, count=3):
    return {"prompts": PROMPTS[:count], "classes": CLASSES[:count], None: None}[model.takes]


def assert_independent(model, plan):
    """Three images are the same up to rounding, each alone or together, and differ; whatever the global generator does."""
    wanted = conditions(model)
    together = plan.draw(wanted, [5, 6, 7])
    torch.manual_seed(123)
    alone = np.concatenate([plan.draw(wanted and wanted[place : place + 1], [5 + place]) for place in range(3)])
    assert together.dtype == np.uint8 and together.shape[0] == 3 and together.shape[3] == 3
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert min(np.abs(together[0].astype(int) - other).mean() for other in together[1:]) > 1
    repeated = plan.draw(wanted and wanted[:1] * 2, [5, 6])
    assert np.abs(repeated[0].astype(int) - repeated[1]).mean() > 1, "the seed changes an image"


@pytest.mark.parametrize("family", TAKES)
def test_every_family_draws_images_of_their_seeds(folders, family):
    model = eval_models.load(folders(family))
    assert model.takes == TAKES[family] and (model.classes == 10) == (model.takes == "classes")
    plan = eval_models.plan(model, 2, guidance_scale=1.0 if family == "dit" else None)
    assert (plan.nfe, plan.steps) == (2, 2)
    assert_independent(model, plan)


def test_flux_is_told_its_guidance_and_drawn_at_any_resolution(folders):
    model = eval_models.load(folders("flux"))
    low, high = (eval_models.plan(model, 1, guidance_scale=scale, resolution=32) for scale in (1.0, 9.0))
    one, two = (plan.draw(PROMPTS[:1], [0]) for plan in (low, high))
    assert one.shape == (1, 32, 32, 3) and np.abs(one.astype(int) - two).max() > 0
    assert_independent(model, low)


NOISY = {
    "lcm": lambda: tiny_pipelines.make("sd1"), "ddpm": lambda: tiny_pipelines.make("sd1"),
    "dit_ddpm": lambda: tiny_pipelines.make("dit"), "ldm_ddpm": lambda: tiny_pipelines.make("ldm"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_noise_of_steps_is_of_the_image_too(folders, name):
    pipe = NOISY[name]()
    cls = LCMScheduler if name == "lcm" else DDPMScheduler
    model = eval_models.load(folders(name, pipe, cls.from_config(pipe.scheduler.config)))
    assert model.few_steps == (name == "lcm")
    assert_independent(model, eval_models.plan(model, 4, guidance_scale=1.0 if name == "dit_ddpm" else None))


def test_ddpm_pipelines_draw_and_refuse_what_they_cannot(folders):
    pipe = tiny_pipelines.make("adm")
    with pytest.raises(UserError, match="predicts a variance too, which its DDPMScheduler does not take"):
        eval_models.plan(eval_models.load(folders("adm")), 2)
    model = eval_models.load(folders("adm_learned", pipe, DDPMScheduler(clip_sample=False, variance_type="learned_range")))
    assert_independent(model, eval_models.plan(model, 3))
    with pytest.raises(UserError, match="a DDPMPipeline cannot tell its network the class"):
        eval_models.load(folders("adm_classes"))


def test_guided_dit_draws_noise_of_its_own_for_both_halves(folders):
    pipe = tiny_pipelines.make("dit")
    torch.manual_seed(0)
    network = type(pipe.transformer).from_config({**pipe.transformer.config, "num_embeds_ada_norm": 1000})
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    model = eval_models.load(folders("dit_1000", DiTPipeline(network, pipe.vae, scheduler)))
    plan = eval_models.plan(model, 3)
    assert plan.facts["guidance_scale"] == 4.0
    assert_independent(model, plan)
    small = eval_models.load(folders("dit"))
    with pytest.raises(UserError, match="guides networks of 1000 classes only, this one has 10: give guidance_scale=1"):
        eval_models.plan(small, 2)


@pytest.mark.parametrize(
    ("name", "nfe", "steps"),
    [("ddim", 5, 5), ("ddim_trailing", 5, 5), ("dpmpp", 1, 1), ("euler", 3, 3), ("unipc", 2, 2), ("pndm", 5, 4), ("pndm", 1, 1),
     ("pndm", 2, None), ("lcm", 4, 4), ("lcm", 51, None)],
)  # fmt: skip
def test_budgets_are_network_calls(folders, name, nfe, steps):
    model = eval_models.load(folders("sd1"))
    if steps is None:
        with pytest.raises(UserError, match=f"Scheduler cannot make exactly {nfe} network calls"):
            eval_models.plan(model, nfe, scheduler=name)
        return
    plan = eval_models.plan(model, nfe, scheduler=name)
    calls = []
    hook = model.network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    plan.draw(PROMPTS[:1], [0])
    hook.remove()
    assert (plan.nfe, plan.steps, len(calls)) == (nfe, steps, nfe)
    assert set(calls) == {2} and plan.facts["scheduler"] == name


def test_heun_takes_two_calls_a_step_but_the_last(folders):
    pipe = tiny_pipelines.make("sd1")
    model = eval_models.load(folders("heun", pipe, HeunDiscreteScheduler.from_config(pipe.scheduler.config)))
    plan = eval_models.plan(model, 5)
    assert (plan.nfe, plan.steps, plan.facts["scheduler"]) == (5, 3, "HeunDiscrete")
    with pytest.raises(UserError, match="HeunDiscreteScheduler cannot make exactly 4 network calls"):
        eval_models.plan(model, 4)


def test_the_usual_budget_is_the_pipelines_own():
    model = eval_models.load(ROOT / "assets/tiny-teacher")
    plan = eval_models.plan(model)
    assert (plan.nfe, plan.steps, plan.facts["guidance_scale"], plan.facts["scheduler"]) == (50, 50, 7.5, "DDIM")
    assert eval_models.plan(model, 4, guidance_scale=2).facts["guidance_scale"] == 2.0


def test_schedulers_of_a_plan_do_not_reach_the_next_one(folders):
    model = eval_models.load(folders("sd1"))
    own = eval_models.plan(model, 3)
    before = own.draw(PROMPTS, [0, 1, 2])
    other = eval_models.plan(model, 3, scheduler="euler").draw(PROMPTS, [0, 1, 2])
    assert eval_models.plan(model, 3).facts == own.facts
    assert np.array_equal(before, own.draw(PROMPTS, [0, 1, 2])) and not np.array_equal(before, other)
    assert set(eval_models.CHOICES) <= set(eval_models.SCHEDULERS)


def test_images_equal_those_of_the_stock_call():
    """The tiny teacher, drawn by hand."""
    model = eval_models.load(ROOT / "assets/tiny-teacher")
    drawn = eval_models.plan(model, 4, guidance_scale=2.0, scheduler="ddim", negative_prompt="x").draw([CAPTION], [11])
    pipe = model.own
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    image = pipe(CAPTION, negative_prompt="x", num_inference_steps=4, guidance_scale=2.0,
                 generator=torch.Generator().manual_seed(11)).images[0]  # fmt: skip
    assert np.array_equal(drawn[0], np.asarray(image)) and np.asarray(image).std() > 5


def test_facts_are_json_and_tell_settings_apart(folders):
    model = eval_models.load(folders("sd1"))
    settings = [{}, {"guidance_scale": 2.0}, {"scheduler": "ddim_trailing"}, {"resolution": 64}, {"negative_prompt": "x"}]
    facts = [json.dumps(eval_models.plan(model, 3, **given).facts) for given in settings]
    assert len(set(facts)) == len(settings)
    assert eval_models.plan(model, 1, resolution=64).draw(PROMPTS[:1], [0]).shape == (1, 64, 64, 3)
    other = eval_models.load(folders("sd1_other", tiny_pipelines.make("sd1", seed=1)))
    assert model.digest != other.digest and model.digest == eval_models.load(folders("sd1")).digest


def test_another_vae_replaces_the_pipelines(folders, tmp_path):
    torch.manual_seed(9)
    tiny.make_vae("tiny").save_pretrained(tmp_path / "vae")
    one, two = (eval_models.load(folders("sd1"), vae=vae) for vae in (None, str(tmp_path / "vae")))
    assert one.digest != two.digest
    drawn = [eval_models.plan(model, 2).draw(PROMPTS[:1], [0]) for model in (one, two)]
    assert not np.array_equal(*drawn)


def test_fixed_point_networks_take_iterations_and_reuse(folders):
    model = eval_models.load(folders("fpdm"))
    assert (model.kind, model.takes, model.classes) == ("fpdm", "classes", 10)
    own, more, again = (eval_models.plan(model, 4, **given) for given in ({}, {"iterations": 9}, {"reuse": True}))
    assert own.facts["iterations"] == [3] * 4 and more.facts["iterations"] == [9] * 4 and again.facts["reuse"]
    assert more.macs > own.macs > 0
    pictures = [plan.draw(CLASSES, [0, 1, 2]) for plan in (own, more, again)]
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    assert_independent(model, again)
    ddim = eval_models.plan(model, 4, scheduler="ddim")
    assert ddim.facts["scheduler"] == "DDIM" and own.facts["scheduler"] == "DDPM"
    assert_independent(model, ddim)
    with pytest.raises(UserError, match="scheduler unipc was given, .* is sampled by its own or by ddim"):
        eval_models.plan(model, 4, scheduler="unipc")
    with pytest.raises(UserError, match="draws 16 px only, not 32"):
        eval_models.plan(model, 4, resolution=32)
    with pytest.raises(UserError, match="a guidance scale of 0.5 is below 1"):
        eval_models.plan(model, 4, guidance_scale=0.5)


def test_predictors_bring_budget_and_guidance_of_their_own(folders, tmp_path):
    source = folders("sd1")
    content = random_predictor.make_predictor(num_steps=3, backend="sd", backend_config={"model_name_or_path": source},
                                              guidance_type="cfg", guidance_rate=3.0)  # fmt: skip
    predictor_files.write(content, tmp_path / "predictor.json")
    model = eval_models.load(tmp_path / "predictor.json")
    assert (model.kind, model.takes, model.fixed_nfe, model.few_steps) == ("epd", "prompts", 4, False)
    plan = eval_models.plan(model)
    assert (plan.nfe, plan.steps, plan.facts["scheduler"], plan.facts["guidance_scale"]) == (4, None, "EPD", 3.0)
    assert_independent(model, plan)
    assert np.array_equal(plan.draw(PROMPTS, [5, 6, 7]), eval_models.plan(eval_models.load(tmp_path), 4).draw(PROMPTS, [5, 6, 7]))
    stronger, away = (eval_models.plan(model, **given) for given in ({"guidance_scale": 9.0}, {"negative_prompt": "x"}))
    assert stronger.facts["guidance_scale"] == 9.0 and away.facts["negative_prompt"] == "x"
    for other in (stronger, away):
        assert not np.array_equal(plan.draw(PROMPTS, [5, 6, 7]), other.draw(PROMPTS, [5, 6, 7]))
    for given, sentence in (({"nfe": 5}, "makes 4 network calls, not 5"), ({"scheduler": "ddim"}, "a solver of its own"),
                            ({"resolution": 64}, "draws 32 px only, not 64")):  # fmt: skip
        with pytest.raises(UserError, match=sentence):
            eval_models.plan(model, **given)
    moved = eval_models.load(tmp_path, model=folders("sd1_other", tiny_pipelines.make("sd1", seed=1)))
    assert moved.digest != model.digest
    with pytest.raises(UserError, match="predictor's model brings its own"):
        eval_models.load(tmp_path, vae=source)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [({"iterations": 3}, "iterations and reuse are of FPDM alone"), ({"reuse": True}, "iterations and reuse are of FPDM alone"),
     ({"scheduler": "dim"}, "scheduler dim is none of ddim, ddim_trailing"),
     ({"resolution": 30}, "--resolution 30 must be a multiple")],
)  # fmt: skip
def test_what_a_pipeline_cannot_is_said(folders, given, sentence):
    with pytest.raises(UserError, match=sentence):
        eval_models.plan(eval_models.load(folders("sd1")), 2, **given)


def test_schedulers_of_noise_levels_do_not_fit_flow_models_and_negatives_need_prompts(folders):
    with pytest.raises(UserError, match="needs a model of discrete noise levels, this one has a FlowMatchEulerDiscreteScheduler"):
        eval_models.plan(eval_models.load(folders("sd3")), 2, scheduler="ddim")
    model = eval_models.load(folders("cm"))
    with pytest.raises(UserError, match="a negative prompt was given, .* takes nothing"):
        eval_models.plan(model, 2, negative_prompt="x")
    with pytest.raises(UserError, match="is a ConsistencyModelPipeline, which knows no guidance"):
        eval_models.plan(model, 2, guidance_scale=2.0)
    with pytest.raises(UserError, match="draws 8 px only, not 16"):
        eval_models.plan(model, 2, resolution=16)
    assert eval_models.plan(model, 2, resolution=8).nfe == 2


@pytest.mark.parametrize("family", ["cm", "ldm", "sd1", "dit", "fpdm_flow"])
def test_half_precision_draws_or_is_refused(folders, family):
    model = eval_models.load(folders(family), dtype=torch.bfloat16)
    assert model.network.dtype == torch.bfloat16
    if family in ("cm", "ldm"):
        with pytest.raises(UserError, match="Pipeline, which cannot draw in bfloat16: give fp32"):
            eval_models.plan(model, 1)
    else:
        drawn = eval_models.plan(model, 1, guidance_scale=1.0).draw(conditions(model), [0, 1, 2])
        assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 1


def test_bad_sources_are_refused_in_a_sentence(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoint-3").mkdir(parents=True)
    cases = ((tmp_path / "none", "no such folder"), (tmp_path / "empty", "without model_index.json"),
             (tmp_path / "run", "It has checkpoints that can be given: checkpoint-3"),
             (tmp_path / "run/checkpoint-3", "it was not finished"))  # fmt: skip
    for source, sentence in cases:
        with pytest.raises(UserError, match=sentence):
            eval_models.load(source)
    with pytest.raises(UserError, match="is no predictor and no checkpoint"):
        eval_models.load(folders("sd1"), model="x")
    pipe = tiny_pipelines.make("sd1")
    pipe.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut/unet/diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="cut/unet cannot be loaded"):
        eval_models.load(tmp_path / "cut")
