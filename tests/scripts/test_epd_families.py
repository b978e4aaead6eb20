"""EPD is distilled on a tiny random pipeline of every family, from its folder, with the guidance that the family has."""

import math

import pytest
import tiny_pipelines

from brisk import predictor_files

GUIDED = ("--guidance_type=cfg", "--guidance_rate=2")
FLOW = ("--schedule_type=flowmatch",)
FAMILIES = {
    "sdxl": ("sd", ("--schedule_type=discrete", *GUIDED)), "sd2": ("sd", ("--schedule_type=polynomial", "--guidance_type=uncond")),
    "pixart": ("pixart", ("--schedule_type=discrete", *GUIDED)), "sd3": ("sd3", (*FLOW, *GUIDED)),
    "flux": ("flux", (*FLOW, *GUIDED)),
    "dit": ("dit", ("--schedule_type=discrete", *GUIDED)), "adm": ("adm", ("--schedule_type=discrete",)),
    "adm_classes": ("adm", ("--schedule_type=polynomial", "--afs")), "cm": ("cm", ("--schedule_type=polynomial", "--afs")),
    "ldm": ("ldm", ("--schedule_type=time_uniform", "--afs")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: name of `tiny_pipelines` -> folder of that pipeline."""

    def save(name):
        path = tmp_path_factory.mktemp("models") / name
        tiny_pipelines.make(name).save_pretrained(path)
        return path

    return save


@pytest.mark.parametrize("name", FAMILIES)
def test_family_is_trained(name, folder, run_epd):
    family, flags = FAMILIES[name]
    prompts = ["--prompt=a red fox"] if name in tiny_pipelines.TEXT_FAMILIES and "--guidance_type=uncond" not in flags else []
    source = folder(name)
    run = run_epd(f"--pretrained_model_name_or_path={source}", *flags, *prompts, "--num_steps=3", "--sampler_tea=euler", "--M=1",
                  "--teacher_substeps=1", "--batch=2", "--eval_every=0", "--learning_rate=0.2", "--update_mode=joint")  # fmt: skip
    assert [row["step"] for row in run.rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in run.rows)
    found = predictor_files.load(run.output)
    assert found.model["backend"] == family and found.model["backend_config"]["model_name_or_path"] == str(source)
