"""What docs/bksdm.md says can be built on a student: its LoRA and DreamBooth code is run as printed, on a tiny student."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import ControlNetModel, DiffusionPipeline, UNet2DConditionModel

from brisk import bksdm, sd_models, tiny

SECTION = (ROOT / "docs/bksdm.md").read_text().split("## What can be built on a student")[1].split("\n## ")[0]
COMMON, LORA, DREAMBOOTH = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
STUDENT = "work_dirs/bk_small_sd14"


@pytest.fixture(scope="module", params=["toy_sd1", "toy_sd2"])
def place(request, run_bksdm, tmp_path_factory):
    """A folder in which the recipe's relative paths exist: a student's pipeline (epsilon, v) and pictures of a subject."""
    folder = tmp_path_factory.mktemp("downstream")
    run_bksdm("--save_pipeline", "--max_train_steps=1", family=request.param, output=folder / STUDENT)
    (folder / "my_dog").mkdir()
    for number in range(3):
        tiny.random_image(np.random.default_rng(number), 40, 48).save(folder / f"my_dog/{number}.png")
    return folder


def run_as_printed(code, folder, monkeypatch):
    """The names that a recipe leaves behind; only steps and numbers of images are made small."""
    small = {"1e-4, 800,": "1e-2, 3,", "1e-6, 800,": "1e-3, 3,", "range(200)": "range(2)",
             "num_inference_steps=25": "num_inference_steps=2"}  # fmt: skip
    code = COMMON + code
    assert "brisk" not in code and sum(code.count(value) for value in small) >= 2
    for printed, smaller in small.items():
        code = code.replace(printed, smaller)
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names = {}
    exec(compile(code, "docs/bksdm.md", "exec"), names)
    assert names["image"].size == (32, 32)
    return names


def answer(pipeline):
    """What U-Net and text encoder give for one fixed input."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(16)[None]
    with torch.no_grad():
        return pipeline.unet(noise, 500, pipeline.text_encoder(ids)[0]).sample


def test_lora_trains_on_a_student_and_loads_again_in_stock_diffusers(place, monkeypatch):
    names = run_as_printed(LORA, place, monkeypatch)
    trained, loaded = names["parts"], names["pipe"]
    assert loaded.unet is not trained["unet"] and loaded.unet.config.mid_block_type is None
    expected = copy.copy(loaded)
    expected.unet, expected.text_encoder = trained["unet"], trained["text_encoder"]
    torch.testing.assert_close(answer(loaded), answer(expected), rtol=1e-4, atol=1e-5)
    plain = DiffusionPipeline.from_pretrained(place / STUDENT)
    assert (answer(loaded) - answer(plain)).abs().max() > 1e-3
    alphas = [next(iter(part.peft_config.values())).lora_alpha for part in (loaded.unet, loaded.text_encoder)]
    assert alphas == [27, 17]
    loaded.unload_lora_weights()
    torch.testing.assert_close(answer(loaded), answer(plain), rtol=0, atol=0)


def test_dreambooth_trains_all_of_a_student_and_saves_a_stock_pipeline(place, monkeypatch):
    names = run_as_printed(DREAMBOOTH, place, monkeypatch)
    loaded, plain = names["pipe"], DiffusionPipeline.from_pretrained(place / STUDENT)
    assert len(list((place / "outputs/dogs").iterdir())) == 2
    saved = [*loaded.unet.parameters(), *loaded.text_encoder.parameters()]
    before = [*plain.unet.parameters(), *plain.text_encoder.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(saved, names["weights"], strict=True))
    assert sum(not torch.equal(one, other) for one, other in zip(saved, before, strict=True)) > 0.9 * len(saved)
    vae = plain.vae.state_dict()
    assert all(torch.equal(value, vae[name]) for name, value in loaded.vae.state_dict().items())


def student_of(family, preset):
    config = bksdm.derive_student_config(sd_models.plain_config(teacher_of(family)), preset)
    return UNet2DConditionModel.from_config(config)


def teacher_of(family):
    return tiny.make_unet({"sd": "toy", "sdxl": "toy_xl"}[family])


@pytest.mark.parametrize("preset", bksdm.PRESETS)
def test_controlnet_starts_from_students_with_a_mid_block_as_the_page_says(preset):
    works, raises = (re.findall(r"`(\w+)`", part) for part in
                     SECTION.split("### ControlNet")[1].split("### ")[0].split(" and raises ")[:2])  # fmt: skip
    student = student_of(bksdm.PRESETS[preset].family, preset)
    if preset in raises:
        with pytest.raises(ValueError, match="unknown mid_block_type : None"):
            ControlNetModel.from_unet(student)
        return
    assert preset in works
    state = student.state_dict()
    control = ControlNetModel.from_unet(student).state_dict()
    assert torch.equal(control["mid_block.resnets.0.conv1.weight"], state["mid_block.resnets.0.conv1.weight"])


def test_controlnet_runs_with_its_student_and_that_of_the_teacher_has_more_residuals():
    student, teacher = student_of("sd", "bk_base"), teacher_of("sd")
    noise, context, picture = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32), torch.randn(1, 3, 64, 64)
    residuals = []
    for unet in (student, teacher):
        control = ControlNetModel.from_unet(unet)
        down, mid = control(noise, 500, context, picture, return_dict=False)
        residuals.append(len(down))
        out = unet(noise, 500, context, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        assert torch.isfinite(out).all()
    assert residuals == [8, 12]
