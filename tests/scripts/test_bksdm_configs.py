"""The recipes in configs/bksdm: each holds the published values and trains two steps on a toy teacher of its family."""

import gc
import json
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import UNet2DConditionModel
from inprocess import remembered_plans

import train_bksdm_distill as script
from brisk import bksdm, options, tiny

CONFIGS = sorted((ROOT / "configs/bksdm").glob("*.yaml"))
NAMES = [path.stem for path in CONFIGS]
OF_THE_DEMO = {"tiny_digits"}  # run by scripts/demo_bksdm.sh

SD14 = "CompVis/stable-diffusion-v1-4"
SD21_BASE, SD21_V = "stabilityai/stable-diffusion-2-1-base", "stabilityai/stable-diffusion-2-1"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
OFFICIAL = {"max_train_steps": 50000, "gradient_accumulation_steps": 4, "learning_rate": 5e-5, "optimizer": "adamw",
            "mixed_precision": "fp16", "use_ema": True, "center_crop": True, "random_flip": True, "gradient_checkpointing": True,
            "checkpointing_steps": 5000, "validation_steps": 500, "seed": 1234, "proportion_empty_prompts": 0.0,
            "lr_scheduler": "constant", "feature_set": None}  # fmt: skip
POKEMON = {"pretrained_model_name_or_path": SDXL, "resolution": 1024, "train_batch_size": 2, "gradient_accumulation_steps": 1,
           "num_train_epochs": 50, "max_train_steps": None, "learning_rate": 1e-5, "optimizer": "adafactor",
           "adam_weight_decay": 1e-2, "mixed_precision": "bf16", "center_crop": False, "random_flip": True, "use_ema": False,
           "pretrained_vae_model_name_or_path": "madebyollin/sdxl-vae-fp16-fix", "gradient_checkpointing": True,
           "dataset_name": "lambdalabs/pokemon-blip-captions", "checkpoints_total_limit": 3, "checkpointing_steps": 417,
           "validation_prompts": "yoda pokemon", "validation_steps": 417, "num_valid_images": 4}  # fmt: skip
KOALA = {"pretrained_model_name_or_path": SDXL, "resolution": 1024, "train_batch_size": 8, "gradient_accumulation_steps": 16,
         "max_train_steps": 500000, "learning_rate": 5e-5, "optimizer": "adamw", "mixed_precision": "bf16",
         "proportion_empty_prompts": 0.1}  # fmt: skip
EXPECTED = {
    "small_sd_xl_pokemon_blip": POKEMON | {"preset": "small_sd_xl", "lambda_kd_output": 1.0, "lambda_kd_feat": 1.0},
    "tiny_sd_xl_pokemon_blip": POKEMON | {"preset": "tiny_sd_xl", "lambda_kd_output": 1.0, "lambda_kd_feat": 1.0},
    "ssd_1b_distill_from_sdxl_pokemon_blip": POKEMON | {
        "preset": "ssd_1b", "lambda_sd": 1.0, "lambda_kd_output": 0.5, "lambda_kd_feat": 0.5, "feature_set": "layer"},
    "koala_1b_sdxl": KOALA | {"preset": "koala_1b"},
    "koala_700m_sdxl": KOALA | {"preset": "koala_700m"},
    "bk_small_sd14_random_conditioning": {
        "preset": "bk_small", "pretrained_model_name_or_path": SD14, "resolution": 512, "train_batch_size": 64,
        "gradient_accumulation_steps": 4, "max_train_steps": 400000, "learning_rate": 5e-5, "mixed_precision": "fp16",
        "random_conditioning": True, "random_conditioning_lambda": 5.0, "proportion_empty_prompts": 0.1, "lambda_sd": 0.0},
    "toy_sd_cpu": {"preset": "bk_small", "max_train_steps": 20, "mixed_precision": "no"},
    "toy_sdxl_cpu": {"preset": "small_sd_xl", "max_train_steps": 20, "mixed_precision": "no"},
}  # fmt: skip
for size in ("base", "small", "tiny"):
    for suffix, teacher, resolution, batch in (("sd14", SD14, 512, 64), ("sd14_2m", SD14, 512, 64),
                                               ("sd21_base", SD21_BASE, 512, 32), ("sd21_v", SD21_V, 768, 32)):  # fmt: skip
        EXPECTED[f"bk_{size}_{suffix}"] = OFFICIAL | {
            "preset": f"bk_{size}", "pretrained_model_name_or_path": teacher, "resolution": resolution,
            "train_batch_size": batch}  # fmt: skip


def arguments(name, *flags):
    """(namespace, given flags) of a recipe; its data is the user's where it names none."""
    args, given = script.parse_args([f"--config={name}", *flags])
    if not any(getattr(args, source) for source in options.SOURCES):
        args, given = script.parse_args([f"--config={name}", "--train_data_dir=images", *flags])
    return args, given


@pytest.mark.quick
def test_every_recipe_of_the_table_ships_and_no_other():
    assert set(NAMES) == set(EXPECTED) | OF_THE_DEMO


@pytest.mark.quick
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_values_are_the_published_ones(name):
    args, _ = arguments(name)
    assert {key: getattr(args, key) for key in EXPECTED[name]} == EXPECTED[name]
    assert args.output_dir == f"work_dirs/{name}"


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_flags_agree_with_each_other_and_all_count(name):
    args, given = arguments(name)
    script.check_args(args)
    assert "pretrained_model_name_or_path" in given
    assert not options.without_effect(given, script.effects(args, args.mixed_precision))


@pytest.mark.quick
@pytest.mark.parametrize("path", CONFIGS, ids=NAMES)
def test_comment_gives_the_command_and_the_batch(path):
    comment = path.read_text().split("\npretrained_model")[0]
    args, _ = arguments(path.stem)
    if path.stem in OF_THE_DEMO:
        return
    assert f"accelerate launch train_bksdm_distill.py --config {path.stem}" in comment
    text = " ".join(comment.replace("#", " ").split())
    stated = re.search(r"Effective batch (\d+) x (\d+) = (\d+) images per process; ([\d,]+) steps see ([\d.]+) million", text)
    if stated:
        batch, accumulation, product, steps, millions = (float(number.replace(",", "")) for number in stated.groups())
        assert (batch, accumulation) == (args.train_batch_size, args.gradient_accumulation_steps)
        assert product == batch * accumulation and steps == args.max_train_steps and product * steps == millions * 1e6
    else:
        assert f"Batch {args.train_batch_size}" in text
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_list_configs_prints_the_names(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--list_configs"])
    assert not stop.value.code and capsys.readouterr().out.split() == sorted(NAMES)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A folder with a toy teacher per family, shards, images with metadata.csv, prompts, and per family cached latents."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import precompute_latents

    folder = tmp_path_factory.mktemp("toys")
    for family in ("toy_sd1", "toy_sd2", "toy_sdxl"):
        tiny.make_pipeline(family).save_pretrained(folder / family)
    tiny.write_shards(folder / "shards")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(4):
        tiny.random_image(rng, 40, 48).save(folder / f"images/{number}.png")
    (folder / "images/metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.png,a red square\n" for n in range(4)))
    (folder / "prompts.txt").write_text("a green circle\na blue one\n")
    from accelerate.state import PartialState

    precompute_latents.main([f"--pretrained_model_name_or_path={folder}/toy_sdxl", f"--train_data_dir={folder}/images",
                             f"--output_dir={folder}/latents", "--resolution=32", "--text_embeddings=False"])  # fmt: skip
    PartialState._reset_state()
    return folder


def family_of(args):
    """The toy that stands in for the teacher of a recipe."""
    if bksdm.PRESETS[args.preset].family == "sdxl":
        return "toy_sdxl"
    return "toy_sd2" if "2-1" in args.pretrained_model_name_or_path else "toy_sd1"


@pytest.fixture
def train(tmp_path):
    """Run the script in this process, as `accelerate launch` would, and leave no trace of its state."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with remembered_plans():
        yield lambda *flags: script.main([*map(str, flags), f"--output_dir={tmp_path}/out"])
    gc.collect()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_recipe_trains_two_steps(name, toys, train, tmp_path):
    args, given = arguments(name)
    teacher = toys / family_of(args)
    flags = [f"--config={name}", f"--pretrained_model_name_or_path={teacher}", "--resolution=32", "--train_batch_size=2",
             "--gradient_accumulation_steps=1", "--max_train_steps=2", "--dataloader_num_workers=0", "--report_to=none",
             "--log_every=1", "--validation_inference_steps=2", "--validation_steps=2"]  # fmt: skip
    if args.pretrained_vae_model_name_or_path:
        flags.append(f"--pretrained_vae_model_name_or_path={teacher}/vae")
    if args.random_conditioning:
        flags.append(f"--extra_prompts_file={toys}/prompts.txt")
    source = "--cached_latents={}/latents" if args.precomputed_shards else "--train_data_dir={}/images"
    flags.append((source if not name.startswith("toy") else "--train_shards_path_or_url={}/shards").format(toys))
    train(*flags)
    output = tmp_path / "out"
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    pairs = [key for key in rows[0] if key.startswith("feat/")]
    assert len(pairs) > 4 and all(np.isfinite(row[key]) for row in rows for key in [*pairs, "loss"])
    report = json.loads((output / "bksdm_report.json").read_text())
    assert report["preset"] == args.preset and report["student"]["parameters"] < report["teacher"]["parameters"]
    student = UNet2DConditionModel.from_pretrained(output, subfolder="unet")
    assert student.num_parameters() == report["student"]["parameters"]
    assert (output / "unet_raw").is_dir() == args.use_ema
    manifest = json.loads((output / "run_manifest.json").read_text())
    assert manifest["prediction_type"] == ("v_prediction" if family_of(args) == "toy_sd2" else "epsilon")
    grids = [path.name for path in Path(output).glob("validation/*/*.png")]
    assert grids == (["student-2-steps.png"] if args.validation_prompts else [])


@pytest.mark.parametrize("name", ["toy_sd_cpu", "toy_sdxl_cpu"])
def test_toy_recipe_runs_by_the_commands_that_its_comment_prints(name, train, tmp_path, monkeypatch):
    """The SDXL one for a single step: it takes longest."""
    comment = (ROOT / f"configs/bksdm/{name}.yaml").read_text()
    make, launch = (shlex.split(line) for line in re.findall(r"^#   (.+)$", comment, re.MULTILINE))
    assert make[:2] == ["python", "scripts/make_tiny_teacher.py"]
    assert launch[:3] == ["accelerate", "launch", "train_bksdm_distill.py"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", make[1:])
    runpy.run_path(str(ROOT / make[1]), run_name="__main__")
    train(*launch[3:], *["--max_train_steps=1", "--validation_steps=30"] * ("sdxl" in name))
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == (1 if "sdxl" in name else 20)
    if name == "toy_sd_cpu":
        assert rows[-1]["loss_kd_feat"] < 0.6 * rows[0]["loss_kd_feat"], "it learns"
        assert (tmp_path / "out/validation/step-000020/student-4-steps.png").is_file()
