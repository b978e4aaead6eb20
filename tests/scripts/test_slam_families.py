"""SD1, SD2, SDXL and LoRA: what a short run writes loads in stock diffusers and samples at 1 to 8 steps."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from brisk import sd_models, splam

LCM_TIMESTEPS = {1: [999], 2: [999, 499], 4: [999, 759, 499, 259], 8: [999, 879, 759, 639, 499, 379, 259, 139]}
FAMILIES = ("sd1", "sd2", "sdxl")
KINDS = (*FAMILIES, "sd1-lora", "sdxl-lora")
LORA_FLAGS = ("--use_lora", "--lora_rank=4", "--lora_alpha=6", "--learning_rate=0.01")


def digest(folder):
    """A hash of every file below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def trained(run_main, models):
    """A function: kind -> the run of two steps of it (each kind is trained once)."""
    runs = {}

    def get(kind):
        if kind not in runs:
            family, _, lora = kind.partition("-")
            before = digest(models[family])
            runs[kind] = run_main(*(LORA_FLAGS if lora else ()), "--checkpointing_steps=2", family=family)
            assert digest(models[family]) == before, "training changed the teacher's folder"
        return runs[kind]

    return get


def stock_pipeline(kind, output, models):
    """The pipeline as a user of stock diffusers builds it from what the run wrote."""
    family, _, lora = kind.partition("-")
    if not lora:
        return DiffusionPipeline.from_pretrained(output)
    pipeline = DiffusionPipeline.from_pretrained(models[family])
    pipeline.scheduler = LCMScheduler.from_pretrained(output, subfolder="scheduler")
    pipeline.load_lora_weights(output)
    return pipeline


@pytest.mark.parametrize("kind", KINDS)
def test_output_samples_in_stock_diffusers_at_the_trained_timesteps_and_gamma_one(kind, trained, models):
    pipeline = stock_pipeline(kind, trained(kind).output, models)
    pipeline.set_progress_bar_config(disable=True)
    calls = []

    def note(module, args, kwargs):
        calls.append((int(args[1]), len(args[0]), kwargs.get("timestep_cond")))

    pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    for steps, timesteps in LCM_TIMESTEPS.items():
        calls.clear()
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            ["a red seven", "a blue one"], num_inference_steps=steps, guidance_scale=1, generator=generator,
            output_type="np",
        ).images  # fmt: skip
        assert images.shape == (2, 32, 32, 3) and np.isfinite(images).all()
        assert images[0].std() > 0
        assert [time for time, _, _ in calls] == timesteps
        assert {size for _, size, _ in calls} == {2}, "guidance_scale=1 must not double the batch"
        for _, _, condition in calls:
            if kind.endswith("lora"):
                assert condition is None
            else:
                expected = splam.gamma_embedding(torch.ones(2), 16)
                assert torch.equal(condition.float().expand(2, -1), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_and_unet_target_are_the_checkpoint_and_differ_from_the_teacher(family, trained, models):
    output = trained(family).output
    teacher = UNet2DConditionModel.from_pretrained(models[family], subfolder="unet").state_dict()
    states = {}
    for name in ("unet", "unet_target"):
        network = UNet2DConditionModel.from_pretrained(output, subfolder=name)
        assert network.config.time_cond_proj_dim == 16
        states[name] = network.state_dict()
        stored = load_file(output / f"checkpoint-2/{name}/diffusion_pytorch_model.safetensors")
        assert set(stored) == set(states[name]) == set(teacher) | {sd_models.COND_PROJ}
        assert all(torch.equal(stored[key], states[name][key]) for key in stored)
        assert all(torch.isfinite(value).all() for value in stored.values())
    assert states["unet"][sd_models.COND_PROJ].abs().max() > 0, "the projection of gamma got no gradient"
    key = "conv_in.weight"
    moved = (states["unet"][key] - teacher[key]).abs().max()
    followed = (states["unet_target"][key] - teacher[key]).abs().max()
    assert 0 < followed < moved, "the target must follow the student slowly"


@pytest.mark.parametrize("family", FAMILIES)
def test_other_components_equal_the_teachers(family, trained, models):
    output, teacher = trained(family).output, models[family]
    index, expected = (json.loads((folder / "model_index.json").read_text()) for folder in (output, teacher))
    assert index["_class_name"] == expected["_class_name"]
    assert index["scheduler"][1] == "LCMScheduler"
    assert {name for name in index if name[0] != "_"} == {name for name in expected if name[0] != "_"}
    for name in ("vae", "text_encoder", "text_encoder_2"):
        for file in (teacher / name).glob("*.safetensors"):
            ours, theirs = load_file(output / name / file.name), load_file(file)
            assert set(ours) == set(theirs)
            assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    for name in ("tokenizer", "tokenizer_2"):
        if (teacher / name).is_dir():
            ours, theirs = (CLIPTokenizer.from_pretrained(folder / name) for folder in (output, teacher))
            for text in ("", "A red seven. " * 9):
                assert ours(text).input_ids == theirs(text).input_ids
            assert ours.model_max_length == theirs.model_max_length
    scheduler = json.loads((output / "scheduler/scheduler_config.json").read_text())
    original = json.loads((teacher / "scheduler/scheduler_config.json").read_text())
    for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert scheduler[name] == original[name], name
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == (
        ("v_prediction", True) if family == "sd2" else ("epsilon", False)
    )
    assert scheduler["original_inference_steps"] == 50 and scheduler["timestep_scaling"] == 10.0


@pytest.mark.parametrize("kind", ("sd1-lora", "sdxl-lora"))
def test_lora_file_round_trips_through_load_lora_weights(kind, trained, models):
    output = trained(kind).output
    stored = load_file(output / "checkpoint-2/unet_lora/adapter_model.safetensors")
    adapted = {key.split(".lora_")[0] for key in stored}
    for part in ("to_q", "to_out.0", "ff.net.2", "conv1", "time_emb_proj", "proj_in"):
        assert any(name.endswith(part) for name in adapted), f"{part} has no adapter"
    pipeline = stock_pipeline(kind, output, models)
    loaded = {name: module for name, module in pipeline.unet.named_modules() if hasattr(module, "lora_A")}
    assert {name for name, module in loaded.items() if module.lora_A} == adapted
    for name, module in loaded.items():
        (adapter,) = module.lora_A
        assert torch.equal(module.lora_A[adapter].weight, stored[f"{name}.lora_A.weight"])
        assert torch.equal(module.lora_B[adapter].weight, stored[f"{name}.lora_B.weight"])
        assert module.scaling[adapter] == pytest.approx(6 / 4), "alpha was lost"
    assert any(value.abs().max() > 0 for key, value in stored.items() if "lora_B" in key)
    assert not (output / "unet").exists() and not (output / "model_index.json").exists()


def test_lora_ema_target_is_stored_and_lags_behind_the_adapters(run_main):
    run = run_main(*LORA_FLAGS, "--lora_ema", "--checkpointing_steps=2")
    target = load_file(run.output / "checkpoint-2/unet_lora/target.safetensors")
    online = load_file(run.output / "checkpoint-2/unet_lora/adapter_model.safetensors")
    assert len(target) == len(online)
    # B starts at zero, so the size of its weights tells how far it went
    sizes = [sum(v.abs().sum().item() for k, v in state.items() if wanted(k, v)) for state, wanted in (
        (online, lambda key, value: "lora_B" in key),
        (target, lambda key, value: value.ndim > 1 and value.shape[1] == 4),
    )]  # fmt: skip
    assert 0 < sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("kind", ("sd1", "sdxl-lora"))
def test_code_block_of_the_model_card_runs_and_says_guidance_scale_1(kind, trained, monkeypatch):
    output = trained(kind).output
    card = (output / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "guidance_scale=1)" in code and "Always pass `guidance_scale=1`" in card
    monkeypatch.chdir(output.parent)
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert names["image"].size == (32, 32)


def test_code_block_of_the_model_card_survives_quotes_in_the_prompt(run_main, monkeypatch):
    run = run_main('--validation_prompts=a sign that says "a\\b" and {x}|another')
    (code,) = re.findall(r"```python\n(.*?)```", (run.output / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run.output.parent)
    names = {}
    exec(compile(code.replace("4, guidance", "1, guidance"), "card", "exec"), names)
    assert names["image"].size == (32, 32)


@pytest.fixture
def unet_calls(monkeypatch):
    """Every call of `sd_models.predict`: (U-Net, timesteps, arguments, timestep_cond), as the script makes them."""
    calls, predict = [], sd_models.predict

    def note(unet, dtype, x, timesteps, arguments, timestep_cond=None):
        calls.append((unet, timesteps, arguments, timestep_cond))
        return predict(unet, dtype, x, timesteps, arguments, timestep_cond)

    monkeypatch.setattr(sd_models, "predict", note)
    return calls


def test_sdxl_networks_are_told_height_before_width_and_the_crop_in_scaled_pixels(run_main, unet_calls):
    run_main("--max_train_steps=1", "--center_crop", family="sdxl")
    # pictures are 40 high and 48 wide; scaled to 32 x 38, the centre square starts at (0, 3)
    for _, _, arguments, _ in unet_calls:
        rows = arguments["added_cond_kwargs"]["time_ids"]
        assert (rows == torch.tensor([40, 48, 0, 3, 32, 32])).all()
        assert arguments["added_cond_kwargs"]["text_embeds"].shape == (len(rows), 32)
        assert arguments["encoder_hidden_states"].shape == (len(rows), 16, 64)
    assert len(unet_calls) == 3  # teacher, target, student


def test_use_fix_crop_and_size_replaces_all_sizes(run_main, unet_calls):
    run_main("--max_train_steps=1", "--use_fix_crop_and_size", family="sdxl")
    assert len(unet_calls) == 3
    for _, _, arguments, _ in unet_calls:
        assert (arguments["added_cond_kwargs"]["time_ids"] == torch.tensor([32, 32, 0, 0, 32, 32])).all()


def test_sdxl_guidance_starts_from_zero_embeddings(run_main, unet_calls):
    run_main("--max_train_steps=1", family="sdxl")
    teacher = unet_calls[0][2]
    assert (teacher["encoder_hidden_states"][2:] == 0).all() and (teacher["encoder_hidden_states"][:2] != 0).any()
    assert (teacher["added_cond_kwargs"]["text_embeds"][2:] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_snr_matched_input_asks_the_student_at_fractional_times(family, run_main, unet_calls):
    run = run_main("--subpath_param=snr", "--max_train_steps=2", family=family)
    assert all(np.isfinite(row["loss"]) and row["skipped_steps"] == 0 for row in run.rows)
    for start in range(0, len(unet_calls), 3):
        (_, start_times, _, _), (_, end_times, _, _), (_, times, _, _) = unet_calls[start : start + 3]
        assert times.is_floating_point() and not torch.equal(times, times.round())
        assert (times <= start_times[:2]).all() and (times >= end_times).all()


def test_published_form_asks_the_student_at_the_start_of_the_sub_path(run_main, unet_calls):
    run_main("--max_train_steps=1")
    (_, starts, _, teacher_cond), (_, ends, _, target_cond), (_, times, _, student_cond) = unet_calls
    assert teacher_cond is None
    assert torch.equal(starts[:2], starts[2:]) and torch.equal(times, starts[:2])
    assert ((starts[:2] + 1) % 20 == 0).all() and torch.equal(ends, (starts[:2] - 20).clamp(min=0))
    assert torch.equal(target_cond, splam.gamma_embedding(torch.ones(2), 16))
    assert not torch.equal(student_cond, target_cond)


def test_gamma_one_prob_1_trains_at_gamma_one_only(run_main, unet_calls):
    run_main("--gamma_one_prob=1", "--max_train_steps=3")
    students = [call[3] for call in unet_calls[2::3]]
    assert len(students) == 3
    assert all(torch.equal(cond, splam.gamma_embedding(torch.ones(2), 16)) for cond in students)


def test_gamma_min_keeps_gamma_above_it(run_main, unet_calls):
    run_main("--gamma_min=0.999", "--gamma_embed_scale=1", "--max_train_steps=3")
    # the first feature is sin(10 - 10 gamma): gamma is read back from it
    gammas = [1 - torch.asin(call[3][:, 0]) / 10 for call in unet_calls[2::3]]
    assert all(((gamma > 0.9989) & (gamma <= 1)).all() for gamma in gammas)
    assert not all((gamma == 1).all() for gamma in gammas)


def test_prediction_type_overrides_the_schedulers_and_is_exported(run_main):
    runs = {kind: run_main(f"--prediction_type={kind}") for kind in ("epsilon", "v_prediction", "sample")}
    losses = {kind: run.rows[0]["loss"] for kind, run in runs.items()}
    assert len(set(losses.values())) == 3 and np.isfinite(list(losses.values())).all()
    for kind, run in runs.items():
        scheduler = json.loads((run.output / "scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == kind
        assert json.loads((run.output / "run_manifest.json").read_text())["prediction_type"] == kind


def test_num_ddim_timesteps_goes_into_the_scheduler(run_main, unet_calls):
    run = run_main("--num_ddim_timesteps=10", "--timestep_scaling_factor=7", "--max_train_steps=3")
    scheduler = LCMScheduler.from_pretrained(run.output, subfolder="scheduler")
    assert scheduler.config.original_inference_steps == 10 and scheduler.config.timestep_scaling == 7
    scheduler.set_timesteps(4)
    trained = set(range(99, 1000, 100))
    assert set(scheduler.timesteps.tolist()) <= trained
    assert set(torch.cat([call[1] for call in unet_calls[2::3]]).tolist()) <= trained


def test_half_precision_training_exports_the_teachers_own_components(run_main, models):
    run = run_main("--mixed_precision=bf16", "--checkpointing_steps=2")
    assert all(np.isfinite(row["loss"]) for row in run.rows)
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        ours, theirs = load_file(run.output / f"{name}.safetensors"), load_file(models["sd1"] / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name in ("unet", "unet_target"):
        for folder in (run.output, run.output / "checkpoint-2"):
            weights = load_file(folder / name / "diffusion_pytorch_model.safetensors")
            assert {value.dtype for value in weights.values()} == {torch.float32}, (folder, name)


def test_safety_checker_and_feature_extractor_travel_to_the_output(run_main, tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    from brisk import tiny

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config={**small, "image_size": 8, "patch_size": 4}, projection_dim=16)
    pipeline = tiny.make_pipeline("sd1")
    pipeline.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    )
    pipeline.save_pretrained(tmp_path / "teacher")
    flags = ("--validation_steps=1", "--num_validation_images=1", "--validation_prompts=x", "--max_train_steps=1")
    run = run_main(f"--pretrained_teacher_model={tmp_path / 'teacher'}", *flags, "--validation_num_inference_steps=1")
    loaded = DiffusionPipeline.from_pretrained(run.output)
    assert type(loaded.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    image = loaded("x", num_inference_steps=1, guidance_scale=1).images[0]
    assert image.size == (32, 32)
