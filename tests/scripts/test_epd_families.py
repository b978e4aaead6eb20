"""EPD is distilled on a tiny random pipeline of every family, from its folder, with the guidance that the family has."""

import math

import pytest
import tiny_pipelines

from brisk import denoiser_sources, epd_distill, predictor_files

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
SHORT = ("--num_steps=3", "--sampler_tea=euler", "--M=1", "--teacher_substeps=1", "--batch=2", "--eval_every=0",
         "--learning_rate=0.2", "--update_mode=joint")  # fmt: skip
JUDGE = """
import torch

class Judge(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 64 + 1, 10)

    def forward(self, inputs, timestep):
        return 5 * self.layer(torch.cat([inputs.flatten(1), timestep[:, None] / 1000], 1)).sin()
"""


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
    run = run_epd(f"--pretrained_model_name_or_path={source}", *flags, *prompts, *SHORT)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in run.rows)
    found = predictor_files.load(run.output)
    assert found.model["backend"] == family and found.model["backend_config"]["model_name_or_path"] == str(source)


def test_guided_by_a_classifier_the_tables_alone_are_trained(folder, run_epd, calls_of, tmp_path, monkeypatch):
    (tmp_path / "judge_of_training.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path)
    flags = (f"--pretrained_model_name_or_path={folder('adm_classes')}", "--backend=adm", "--schedule_type=discrete", *SHORT)
    plain = run_epd(*flags)
    models, judges = calls_of(denoiser_sources, "load"), calls_of(denoiser_sources, "load_classifier")
    gradients = calls_of(epd_distill, "set_gradients")
    run = run_epd(*flags, "--guidance_type=cg", "--guidance_rate=3", "--classifier=judge_of_training:Judge")
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0 for row in run.rows) and len(run.rows) == len(gradients) == 2
    assert run.rows[0]["loss"] != pytest.approx(plain.rows[0]["loss"], rel=0.01), "the classifier guides"
    for (_, found), _, _ in gradients:
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in found), "of each of the four tables"
    frozen = [*models[0][2].network.parameters(), *judges[0][2].parameters()]
    assert frozen and all(weight.grad is None for weight in frozen)
    model = predictor_files.load(run.output).model
    assert (model["guidance_type"], model["guidance_rate"]) == ("cg", 3.0)
