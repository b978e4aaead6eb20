"""Bad input of the EPD training script: one sentence and exit code 2, before any step, and nothing left behind."""

import functools
import json
import math

import pytest
import refusals
import torch
from conftest import EPD, ROOT
from inprocess import MIXTURES

from brisk import denoisers, options, predictor_files

TEACHER = f"--pretrained_model_name_or_path={ROOT}/assets/tiny-teacher"


@pytest.fixture
def refused(run_epd, tmp_path):
    return functools.partial(refusals.sentence_of, run_epd, tmp_path / "out")


BAD_FLAGS = {
    "unknown teacher": (["--sampler_tea=rk45"], ["--sampler_tea", "rk45", "dpmpp"]),
    "teacher that ends at 0": (["--sampler_tea=edm"], ["--sampler_tea", "edm"]),
    "unknown student": (["--sampler_stu=amed"], ["--sampler_stu", "amed", "epd", "ipndm"]),
    "one level": (["--num_steps=1"], ["--num_steps", "at least 2"]),
    "no points": (["--num_points=0"], ["--num_points", "at least 1"]),
    "order above four": (["--sampler_stu=ipndm", "--max_order=5"], ["--max_order", "at most 4"]),
    "order above the teacher's": (["--sampler_tea=dpmpp", "--max_order=4"], ["--max_order 4", "3", "dpmpp"]),
    "sub-steps of a multistep teacher": (["--sampler_tea=ipndm", "--teacher_substeps=2"],
                                         ["--teacher_substeps 2", "ipndm", "heun"]),
    "thirds of three": (["--init=thirds", "--num_points=3"], ["--init thirds", "--num_points is 3"]),
    "guidance without rate": (["--guidance_type=cfg"], ["--guidance_type cfg", "--guidance_rate"]),
    "classifier guidance without one": (["--guidance_type=cg", "--guidance_rate=1"], ["--guidance_type cg", "--classifier"]),
    "no such classifier": (["--guidance_type=cg", "--guidance_rate=1", "--classifier=nowhere:make"], ["--classifier nowhere:make"]),
    "negative range": (["--scale_time=-0.1"], ["--scale_time", "-0.1", "at least 0"]),
    "factors below zero": (["--scale_dir=1"], ["--scale_dir", "at most 0.999999"]),
    "name with a folder": (["--desc=a/b"], ["--desc a/b", "slash"]),
    "two models": ([f"--gmm_file={MIXTURES}", TEACHER], ["--gmm_file and --pretrained_model_name_or_path are two models"]),
    "discrete without a table": (["--schedule_type=discrete"], ["--schedule_type discrete", "alphas_cumprod"]),
    "flow levels of an additive model": (["--schedule_type=flowmatch"], ["--schedule_type flowmatch", "polynomial"]),
    "micro-batch": (["--batch_gpu=3"], ["--batch 8", "--batch_gpu 3"]),
    "seed": (["--seed=once"], ["--seed", "once"]),
    "features": (["--feature_model=nowhere.pt"], ["--feature_model nowhere.pt", "no file"]),
    "no model": (["--gmm_file=nowhere.json"], ["--gmm_file nowhere.json"]),
    "no such world": ([f"--gmm_file={MIXTURES}:gmm9"], ["--gmm_file", "gmm9"]),
    "no such checkpoint": (["--resume=nowhere"], ["nowhere"]),
    "tracker": (["--report_to=paper"], ["--report_to paper"]),
    "unknown flag": (["--num_step=4"], ["--num_step", "--num_steps"]),
    "no prompts": ([TEACHER], ["--prompt_path", "--prompt"]),
    "two sources of prompts": ([TEACHER, "--prompt=a", "--prompt_path=b"], ["--prompt and --prompt_path exclude each other"]),
    "no such prompts": ([TEACHER, "--prompt_path=nowhere.csv"], ["--prompt_path nowhere.csv", "No such file"]),
    "wrong family": ([TEACHER, "--backend=sd3", "--prompt=a"], ["tiny-teacher", "sd3"]),
    "no such pipeline": (["--pretrained_model_name_or_path=nowhere/model", "--backend=sd", "--prompt=a"], ["nowhere/model"]),
    "data set without its model": (["--config=cifar10", "--pretrained_model_name_or_path="], ["--pretrained_model_name_or_path"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_contradicting_flags_are_refused_in_one_sentence(case, refused):
    flags, words = BAD_FLAGS[case]
    message = refused(*flags)
    assert all(word in message for word in words), message


def test_guidance_that_a_model_without_classes_cannot_have(refused, tmp_path):
    world = json.loads(MIXTURES.read_text())["world"]["gmmimg"]
    (tmp_path / "world.json").write_text(json.dumps(world))
    message = refused(f"--gmm_file={tmp_path / 'world.json'}", "--guidance_type=cfg", "--guidance_rate=2")
    assert "--guidance_type cfg" in message and "classes or prompts" in message


@pytest.mark.parametrize(("content", "words"), [
    ("a,b\n1,2\n", ["no column text, prompt, caption"]), ("text\n\n\n", ["holds no prompt"]), ("text,x\n", ["holds no prompt"]),
])  # fmt: skip
def test_prompts_that_cannot_be_used(content, words, refused, tmp_path):
    (tmp_path / "captions.csv").write_text(content)
    message = refused(TEACHER, f"--prompt_path={tmp_path / 'captions.csv'}")
    assert all(word in message for word in ["--prompt_path", *words]), message


class Narrow(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) @ torch.ones(7, 2)


def test_features_that_cannot_be_had(refused, tmp_path):
    class Harm:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save({"weights": Harm()}, tmp_path / "pickle.pt")
    assert "cannot be read as TorchScript" in refused(f"--feature_model={tmp_path / 'pickle.pt'}")
    assert not (tmp_path / "ran").exists()
    torch.jit.script(Narrow()).save(tmp_path / "narrow.pt")
    assert "does not take images of 1 pixels" in refused(f"--feature_model={tmp_path / 'narrow.pt'}")


def test_a_folder_that_cannot_be_written_is_named(run_epd, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(options.UserError, match="cannot be written"):
        run_epd(output=tmp_path / "file/out")


def test_flags_without_effect_are_named(run_epd):
    run = run_epd("--max_order=2", "--predict_x0=False", "--detach_history=False", "--alpha=3", "--prompt=a", "--desc=x",
                  "--schedule_type=logsnr", "--schedule_rho=2", "--guidance_rate=3", "--eval_every=0", "--eval_steps=9",
                  "--total_kimg=3", "--scale_dir=0", "--fcn", "--hub_model_id=x")  # fmt: skip
    named = {line.split("--")[1].split()[0] for line in run.log.splitlines() if "has no effect without" in line}
    assert named == {"max_order", "predict_x0", "detach_history", "alpha", "prompt", "desc", "schedule_rho", "guidance_rate",
                     "eval_steps", "eval_samples", "total_kimg", "fcn", "hub_model_id"}  # fmt: skip
    assert "has no effect" not in run_epd("--sampler_tea=dpmpp", "--predict_x0=False", "--max_order=2").log


def test_a_script_ends_with_code_2_and_one_line(run_script, tmp_path):
    code, err = run_script(f"--output_dir={tmp_path / 'out'}", "--num_steps=1", script=EPD)
    lines = err.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: argument --num_steps")


def test_without_a_model_the_sources_are_named(run_script, tmp_path):
    code, err = run_script(f"--output_dir={tmp_path / 'out'}", bare=True, script=EPD)
    assert code == 2 and "--pretrained_model_name_or_path" in err.splitlines()[-1] and not (tmp_path / "out").exists()


def broken_direction(monkeypatch, when):
    """The mixture's direction becomes NaN at its calls for which `when` holds."""
    calls, original = [], denoisers.mixture.direction

    def direction(*args, **named):
        calls.append(1)
        return original(*args, **named) * (math.nan if when(len(calls)) else 1)

    monkeypatch.setattr(denoisers.mixture, "direction", direction)


def test_a_gradient_that_is_not_finite_leaves_the_tables_usable(run_epd, monkeypatch):
    broken_direction(monkeypatch, lambda call: call == 4)
    run = run_epd("--eval_every=0", "--max_train_steps=3", "--update_mode=joint")
    assert [row["loss"] is None for row in run.rows] == [True, False, False] and run.rows[-1]["skipped_steps"] == 1
    assert all(torch.isfinite(table).all() for table in predictor_files.load(run.output).tables)


def test_ten_batches_in_a_row_that_are_not_finite_stop_the_run_with_exit_code_1(run_epd, monkeypatch, tmp_path):
    broken_direction(monkeypatch, lambda call: True)
    with pytest.raises(options.UserError) as caught:
        run_epd("--eval_every=0", "--max_train_steps=30", output=tmp_path / "out")
    assert caught.value.exit_code == 1 and "10 steps in a row were not finite (loss 10x)" in str(caught.value)


def test_tables_worse_than_those_at_the_start_are_warned_of(run_epd):
    run = run_epd("--learning_rate=50", "--max_train_steps=2", "--eval_every=1", "--update_mode=joint", "--scale_time=0.9",
                  "--schedule_type=polynomial", "--num_steps=7")  # fmt: skip
    report = json.loads((run.output / "report.json").read_text())
    assert report["best"]["error"] > report["start"]["untrained"]
    assert "The trained tables are worse than those at the start" in run.log
