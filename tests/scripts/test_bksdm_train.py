"""The BK-SDM script on tiny teachers that have every block: what it writes, whom it trains, what follows on from it."""

import csv
import hashlib
import json

import pytest
import torch
from conftest import SLAM
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from brisk import bksdm, sd_inputs, sd_models, students

KINDS = [("toy_sd1", "bk_base"), ("toy_sd1", "bk_small"), ("toy_sd1", "bk_tiny"), ("toy_sd2", "sd_small"), ("toy_sd2", "bk_tiny"),
         ("toy_sdxl", "small_sd_xl"), ("toy_sdxl", "sd_tiny"), ("toy_sdxl", "koala_700m"), ("toy_sdxl", "ssd_1b")]  # fmt: skip
FILE = "diffusion_pytorch_model.safetensors"


def weights(folder, name="unet"):
    """The tensors of a network that a run wrote."""
    return load_file(folder / name / FILE)


def digest(folder):
    """A hash of every file below `folder`."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def stock_unet(output):
    """The student as a user of stock diffusers loads it, with a proof that every weight was in the file."""
    unet, report = UNet2DConditionModel.from_pretrained(output, subfolder="unet", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return unet


@pytest.fixture(scope="module")
def run(run_bksdm, models):
    """A function: (family, preset) -> the run of two steps (each made once)."""
    runs = {}

    def get(family="toy_sd1", preset="bk_small"):
        if (family, preset) not in runs:
            before = digest(models[family])
            runs[family, preset] = run_bksdm(f"--preset={preset}", "--learning_rate=1e-3", family=family)
            assert digest(models[family]) == before, "training changed the teacher's folder"
        return runs[family, preset]

    return get


@pytest.mark.parametrize(("family", "preset"), KINDS, ids=["-".join(kind) for kind in KINDS])
def test_every_preset_trains_and_its_student_loads_in_the_stock_class_and_samples(family, preset, run, models):
    done = run(family, preset)
    assert [row["step"] for row in done.rows] == [1, 2]
    name = bksdm.ALIASES.get(preset, {}).get("sdxl" if family == "toy_sdxl" else "sd", preset)
    report = json.loads((done.output / "bksdm_report.json").read_text())
    assert report["preset"] == name
    unet = stock_unet(done.output)
    assert {key: tuple(value.shape) for key, value in unet.state_dict().items()} == {
        key: tuple(value.shape) for key, value in weights(done.output).items()
    }
    assert report["student"]["parameters"] == sum(value.numel() for value in unet.parameters())
    pipeline = DiffusionPipeline.from_pretrained(models[family], unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", num_inference_steps=2, height=32, width=32, output_type="pt").images
    assert image.shape[-2:] == (32, 32) and torch.isfinite(image).all() and image.std() > 0


@pytest.mark.parametrize("family", ["toy_sd1", "toy_sd2", "toy_sdxl"])
def test_the_logged_loss_is_the_sum_of_the_three_terms_and_the_third_that_of_the_pairs(family, run):
    done = run(*{"toy_sd1": (), "toy_sd2": ("toy_sd2", "bk_tiny"), "toy_sdxl": ("toy_sdxl", "koala_700m")}[family])
    pairs = json.loads((done.output / "bksdm_report.json").read_text())["feature_pairs"]
    for row in done.rows:
        assert row["loss"] == pytest.approx(row["loss_sd"] + row["loss_kd_output"] + row["loss_kd_feat"], rel=1e-5)
        terms = {name: value for name, value in row.items() if name.startswith("feat/")}
        assert list(terms) == sorted(f"feat/{student}" for _, student in pairs)
        assert row["loss_kd_feat"] == pytest.approx(sum(terms.values()), rel=1e-5)
        assert min(row["loss_sd"], row["loss_kd_output"], *terms.values()) >= 0 and row["loss_kd_output"] > 0


def test_sizes_of_teacher_and_student_are_printed_and_reported(run):
    done = run()
    report = json.loads((done.output / "bksdm_report.json").read_text())
    assert report["teacher"]["parameters"] == 166_452 and report["student"]["parameters"] == 94_740
    change = 94_740 / 166_452 - 1
    assert f"student: 94,740 parameters ({change:+.1%}), " in done.log
    for name in ("teacher", "student"):
        parts = [report[name][part] for part in ("conv", "linear", "attention")]
        assert report[name]["macs_total"] == sum(parts) and min(parts) > 0
        assert f"{report[name]['macs_total']:,} MACs" in done.log
        assert f"{report[name]['macs_published']:,} as papers count" in done.log
    assert report["last"]["step"] == 2 and report["last"]["loss"] == done.rows[-1]["loss"]
    manifest = json.loads((done.output / "run_manifest.json").read_text())
    assert manifest["feature_pairs"] == len(report["feature_pairs"]) == 8 and manifest["global_batch"] == 2
    assert "bk_small" in manifest["student"]


def test_config_says_null_for_a_removed_mid_block(run):
    for kind in (("toy_sd1", "bk_small"), ("toy_sd1", "bk_tiny"), ("toy_sdxl", "koala_700m")):
        config = json.loads((run(*kind).output / "unet/config.json").read_text())
        assert "mid_block_type" in config and config["mid_block_type"] is None


def test_loss_table_has_the_official_columns_and_the_logged_numbers(run_bksdm, pictures):
    done = run_bksdm(f"--train_data_dir={pictures}", "--max_train_steps=7", "--lambda_sd=0.5", "--lambda_kd_feat=0.25")
    with open(done.output / "log_loss.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["epoch", "step", "global_step", "loss_total", "loss_sd", "loss_kd_output", "loss_kd_feat", "lr",
                              "lamb_sd", "lamb_kd_output", "lamb_kd_feat"]  # fmt: skip
    assert [(row["epoch"], row["step"], row["global_step"]) for row in table] == [
        ("0", "0", "1"), ("0", "1", "2"), ("0", "2", "3"), ("1", "0", "4"), ("1", "1", "5"), ("1", "2", "6"), ("2", "0", "7")
    ]  # fmt: skip
    for row, logged in zip(table, done.rows, strict=True):
        found = [float(row[name]) for name in ("loss_total", "loss_sd", "loss_kd_output", "loss_kd_feat", "lr")]
        assert found == [logged[name] for name in ("loss", "loss_sd", "loss_kd_output", "loss_kd_feat", "lr")]
        assert [float(row[name]) for name in ("lamb_sd", "lamb_kd_output", "lamb_kd_feat")] == [0.5, 1.0, 0.25]


def test_loss_table_of_an_endless_stream_has_one_epoch(run_bksdm):
    done = run_bksdm("--max_train_steps=3", "--checkpointing_steps=2")
    with open(done.output / "log_loss.csv", newline="") as file:
        assert [(row["epoch"], row["step"]) for row in csv.DictReader(file)] == [("0", "0"), ("0", "1"), ("0", "2")]


def test_only_the_student_trains_and_the_modes_are_right(run_bksdm, monkeypatch, models):
    parts, seen, predict = [], [], sd_models.predict
    load = sd_models.load_parts
    monkeypatch.setattr(sd_models, "load_parts", lambda *a, **k: parts.append(load(*a, **k)) or parts[-1])

    def noting(unet, *args):
        seen.append((unet, unet.training, torch.is_grad_enabled()))
        return predict(unet, *args)

    monkeypatch.setattr(sd_models, "predict", noting)
    done = run_bksdm("--learning_rate=1e-2", "--use_ema", "--max_train_steps=3")
    teacher, student = seen[0][0], seen[1][0]
    assert [entry[:] for entry in seen] == [(teacher, False, False), (student, True, True)] * 3
    fresh = load(models["toy_sd1"])
    for name, (ours, original) in {
        "unet": (parts[0].unet, fresh.unet), "vae": (parts[0].vae, fresh.vae),
        "text encoder": (parts[0].text_encoders[0], fresh.text_encoders[0]),
    }.items():  # fmt: skip
        state = original.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items()), name
        assert not ours.training and all(p.grad is None and not p.requires_grad for p in ours.parameters()), name
    assert teacher is parts[0].unet
    start = students.create(students.make_plan(sd_models.plain_config(teacher), *students.choose_config(
        sd_models.plain_config(teacher), "bk_small"), 8), fresh.unet).state_dict()  # fmt: skip
    moved = [key for key, value in weights(done.output, "unet_raw").items() if not torch.equal(value, start[key])]
    assert set(moved) == set(start), "every weight of the student is trained"
    kinds = {type(module) for network in (teacher, student) for module in network.modules()}
    assert not any(issubclass(kind, torch.nn.modules.batchnorm._BatchNorm) for kind in kinds)
    assert not [module for network in (teacher, student) for module in network.modules() if module._forward_hooks]


def test_without_training_the_student_holds_the_teachers_weights(run_bksdm, models):
    done = run_bksdm("--learning_rate=0", "--adam_weight_decay=0", "--preset=bk_tiny")
    teacher = weights(models["toy_sd1"])
    student = weights(done.output)
    configs = [json.loads((folder / "unet/config.json").read_text()) for folder in (done.output, models["toy_sd1"])]
    mapping = bksdm.weight_map(student, *configs)
    assert mapping["up_blocks.0.resnets.1.conv1.weight"] == "up_blocks.1.resnets.2.conv1.weight"
    assert all(torch.equal(student[key], teacher[source]) for key, source in mapping.items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_noise_is_added_in_float32_under_any_precision(precision, run_bksdm, calls_of, monkeypatch):
    """In half precision sqrt(1 - abar) at t = 0 is 7 % off (fp16) or zero (bf16)."""
    monkeypatch.setattr(bksdm, "draw_timesteps", lambda uniform, *rest: torch.zeros(len(uniform), dtype=torch.long))
    inputs, latents = calls_of(sd_models, "predict"), calls_of(sd_inputs, "encode_batch")
    run_bksdm(f"--mixed_precision={precision}", "--vae_dtype=fp32", "--max_train_steps=1")
    (clean, *_), alpha = latents[0][2], 1 - 0.00085
    (_, dtype, noisy, *_), (_, student_dtype, also, *_) = (call[0] for call in inputs)
    assert noisy.dtype == clean.dtype == torch.float32 and torch.equal(noisy, also)
    noise = noisy - alpha**0.5 * clean
    assert noise.std().item() == pytest.approx(0.00085**0.5, rel=0.1)
    kept = inputs[0][0][2].clone()
    assert (dtype, student_dtype) == (torch.bfloat16 if precision == "bf16" else torch.float32, torch.float32)
    expected = NOISY.setdefault("float32", kept)  # of the run in full precision
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-3)


NOISY = {}


@pytest.mark.parametrize(("flag", "count"), [("--use_ema", 1), ("--save_pipeline", 2)])
def test_the_teacher_is_loaded_again_only_for_a_pipeline_of_it(flag, count, run_bksdm, calls_of):
    calls = calls_of(sd_models, "load_parts")
    run_bksdm(flag, "--mixed_precision=bf16", "--max_train_steps=1")
    assert len(calls) == count


@pytest.mark.parametrize("family", ["toy_sd1", "toy_sdxl"])
def test_saved_pipeline_is_complete_and_samples_in_stock_diffusers(family, run_bksdm, models):
    done = run_bksdm("--save_pipeline", "--use_ema", "--learning_rate=1e-3", family=family)
    pipeline = DiffusionPipeline.from_pretrained(done.output)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red square", num_inference_steps=2, height=32, width=32, output_type="pt").images
    assert torch.isfinite(image).all() and image.std() > 0
    state = weights(done.output)
    assert all(torch.equal(value, state[name]) for name, value in pipeline.unet.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in weights(done.output, "unet_raw").items())
    kept = DiffusionPipeline.from_pretrained(models[family])
    for name in ("vae", "text_encoder", *["text_encoder_2"] * (family == "toy_sdxl")):
        original = getattr(kept, name).state_dict()
        assert all(torch.equal(value, original[key]) for key, value in getattr(pipeline, name).state_dict().items())
    assert "DiffusionPipeline.from_pretrained" in (done.output / "README.md").read_text()


def test_a_student_is_the_teacher_of_slam_and_samples_at_four_steps(run_bksdm, run_main):
    first = run_bksdm("--save_pipeline", "--learning_rate=1e-3")
    second = run_main(f"--pretrained_teacher_model={first.output}", script=SLAM, family="toy_sd1")
    assert [row["step"] for row in second.rows] == [1, 2]
    pipeline = DiffusionPipeline.from_pretrained(second.output)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.config.mid_block_type is None and pipeline.unet.config.layers_per_block == 1
    image = pipeline("a red square", num_inference_steps=4, guidance_scale=1, height=32, width=32, output_type="pt").images
    assert torch.isfinite(image).all() and image.std() > 0


def test_model_card_says_how_to_load_the_student_and_what_it_is(run):
    card = (run().output / "README.md").read_text()
    for part in ("UNet2DConditionModel.from_pretrained", "bk_small", "94,740 parameters, -43.1%", "2 optimizer steps of 2"):
        assert part in card
