"""Every flag of the BK-SDM script has the effect its help promises, seen on tiny runs."""

import json

import pytest
import torch
import yaml
from conftest import BKSDM
from inprocess import assert_equal, train, weights
from PIL import Image
from safetensors.torch import load_file

import train_bksdm_distill as script
from brisk import bksdm, optim, options, schedules, sd_export, sd_inputs, sd_models, tiny

TERMS = ("loss_sd", "loss_kd_output", "loss_kd_feat")


@pytest.fixture(scope="module")
def plain(run_bksdm):
    """The plain run of two steps."""
    return run_bksdm()


@pytest.fixture(scope="module")
def still(run_bksdm):
    """A run that trains nothing: it writes what the student starts from."""
    return run_bksdm("--learning_rate=0", "--max_train_steps=1")


def first(run):
    """The three terms of the first step."""
    return {name: run.rows[0][name] for name in TERMS}


def pairs_of(run):
    """The logged features, in alphabetical order."""
    return [name for name in run.rows[0] if name.startswith("feat/")]


def arguments(*flags):
    return script.parse_args(["--pretrained_model_name_or_path=x", "--train_data_dir=x", *flags])


# the command line


@pytest.mark.parametrize(("alias", "name", "value"), [
    ("--unet_config_name=bk_tiny", "preset", "bk_tiny"), ("--output_weight=0.5", "lambda_kd_output", 0.5),
    ("--feature_weight=0.5", "lambda_kd_feat", 0.5), ("--valid_prompt=a dog", "validation_prompts", "a dog"),
    ("--valid_steps=7", "validation_steps", 7), ("--pretrained_teacher_model=y", "pretrained_model_name_or_path", "y"),
    ("--use_8bit_adam", "optimizer", "adamw8bit"), ("--no_copy_weight_from_teacher", "use_copy_weight_from_teacher", False),
    ("--preset=bk_base", "output_dir", "work_dirs/bk_base"), ("--config=toy_sd_cpu", "output_dir", "work_dirs/toy_sd_cpu"),
])  # fmt: skip
def test_other_spellings_mean_the_same(alias, name, value):
    assert getattr(arguments(alias)[0], name) == value


@pytest.mark.parametrize(("flag", "needs"), [
    ("--snr_on_features", "--snr_gamma or --debias"), ("--empty_prompt_mode=zeros", "--proportion_empty_prompts"),
    ("--random_conditioning_lambda=1", "--random_conditioning"), ("--extra_prompts_file=x", "--random_conditioning"),
    ("--ema_decay=0.5", "--use_ema"), ("--num_valid_images=1", "--validation_prompts"),
    ("--validation_steps=1", "--validation_prompts"),
    ("--validation_inference_steps=1", "--validation_prompts"), ("--lr_warmup_steps=5", "an --lr_scheduler other than constant"),
])  # fmt: skip
def test_a_flag_that_does_nothing_alone_is_said_to(flag, needs):
    args, given = arguments(flag)
    assert options.without_effect(given, script.effects(args, "no")) == [f"{flag.split('=')[0]} has no effect without {needs}."]


@pytest.mark.parametrize(("flag", "other"), [
    ("--adam_beta1=0.5", "--optimizer=adafactor"), ("--preset=bk_tiny", "--student_config=x"),
    ("--preset=bk_tiny", "--student_init_path=x"), ("--use_copy_weight_from_teacher=False", "--student_init_path=x"),
    ("--feat_relative", "--lambda_kd_feat=0"), ("--no_copy_weight_from_teacher", "--student_init_path=x"),
])  # fmt: skip
def test_a_flag_that_another_one_overrides_is_said_to_do_nothing(flag, other):
    args, given = arguments(flag, other)
    found = [line.split(" has no effect")[0] for line in options.without_effect(given, script.effects(args, "no"))]
    assert found == [flag.split("=")[0]]
    args, given = arguments(flag)
    assert options.without_effect(given, script.effects(args, "no")) == []


def test_dumped_options_are_a_config_that_repeats_the_run_and_nothing_else_happens(run_bksdm, plain, tmp_path):
    run = run_bksdm("--snr_gamma=5", f"--dump_config={tmp_path}/all.yaml", output=tmp_path / "out")
    assert not run.output.exists() and run.rows == []
    values = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert values["snr_gamma"] == 5.0 and values["preset"] == "bk_small" and values["output_dir"] == str(tmp_path / "out")
    args, _ = script.parse_args([f"--config={tmp_path}/all.yaml", "--snr_gamma=1"])
    assert options.public(args) == {**values, "snr_gamma": 1.0, "dump_config": None}


def test_dry_run_prints_sizes_and_what_is_removed_and_writes_nothing(run_bksdm):
    run = run_bksdm("--dry_run", "--preset=bk_tiny", "--use_ema")
    assert list(run.output.iterdir()) == []
    lines = [line.split("INFO ")[-1] for line in run.log.splitlines()]
    table = {line.split()[0]: line.split()[1:] for line in lines if "_block" in line.split(" ")[0]}
    assert len(table) == 17 + 3 + 24 and any(line.startswith("teacher module  ") for line in lines)
    assert table["up_blocks.3.resnets.2"] == ["up_blocks.2.resnets.1"]
    assert table["mid_block.attentions.0"][0] == "-" and int(table["mid_block.attentions.0"][1].replace(",", "")) > 1000
    assert "student: 68,676 parameters (-58.7%)" in run.log and "Dry run: nothing was trained" in run.log


# teacher and student


def test_where_the_teacher_comes_from_reaches_the_loader(run_bksdm, calls_of, models, tmp_path):
    calls = calls_of(sd_models, "load_parts")
    flags = ("--revision=tag", f"--cache_dir={tmp_path}", f"--pretrained_vae_model_name_or_path={models['sd1']}")
    run_bksdm(*flags, "--max_train_steps=1")
    assert calls[0][0] == (str(models["toy_sd1"]), "tag", None, str(tmp_path), str(models["sd1"]), None,
                           "--pretrained_model_name_or_path")  # fmt: skip


def test_teacher_unet_replaces_the_network_alone(run_bksdm, still, plain, tmp_path):
    torch.manual_seed(3)
    other = tiny.make_unet("toy")
    other.save_pretrained(tmp_path)
    run = run_bksdm(f"--teacher_unet={tmp_path}", "--learning_rate=0", "--max_train_steps=1")
    ours, state = weights(run.output), other.state_dict()
    name = "unet/diffusion_pytorch_model.safetensors:conv_in.weight"
    assert torch.equal(ours[name], state["conv_in.weight"]) and not torch.equal(ours[name], weights(still.output)[name])
    assert first(run) != first(plain)


@pytest.mark.parametrize("way", ["student_config", "unet_config_path"])
def test_a_config_of_the_users_own_trains_like_the_same_preset(way, run_bksdm, plain, tmp_path):
    config = json.loads((plain.output / "unet/config.json").read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps(config))
    flags = {"student_config": [f"--student_config={tmp_path}/mine/config.json"],
             "unet_config_path": [f"--unet_config_path={tmp_path}", "--unet_config_name=mine"]}[way]  # fmt: skip
    run = run_bksdm(*flags)
    assert_equal(weights(run.output), weights(plain.output))
    assert json.loads((run.output / "bksdm_report.json").read_text())["preset"] is None


def test_student_init_path_goes_on_from_an_own_student(run_bksdm, plain, still):
    flags = (f"--student_init_path={plain.output}", "--learning_rate=0", "--max_train_steps=1")
    run = run_bksdm(*flags, "--preset=bk_tiny")
    assert_equal(weights(run.output), weights(plain.output))
    assert "--preset has no effect without a preset (--student_config or --student_init_path is set)." in run.log
    assert first(run) != first(still)
    assert json.loads((run.output / "bksdm_report.json").read_text())["weight_map_sha256"] is None


def test_without_copying_the_student_is_random(run_bksdm, still):
    run = run_bksdm("--no_copy_weight_from_teacher", "--learning_rate=0", "--max_train_steps=1")
    copied = weights(still.output)
    same = [name for name, value in weights(run.output).items() if torch.equal(value, copied[name])]
    assert all(value.ndim == 1 for name, value in copied.items() if name in same), "biases and norms start alike"
    for done, took in ((run, False), (still, True)):
        report = json.loads((done.output / "bksdm_report.json").read_text())
        assert [bool(report[name]) for name in ("weight_map_entries", "weight_map_sha256")] == [took] * 2


# losses


def test_weights_multiply_the_terms_and_nothing_else(run_bksdm, plain):
    run = run_bksdm("--lambda_sd=0.5", "--output_weight=0.25", "--feature_weight=2", "--max_train_steps=1")
    assert first(run) == first(plain)
    a, b, c = first(run).values()
    assert run.rows[0]["loss"] == pytest.approx(0.5 * a + 0.25 * b + 2 * c)
    assert run.rows[0]["grad_norm"] != plain.rows[0]["grad_norm"]


CHANGES = {"--snr_gamma=0.01": (1, 1, 0), "--debias --snr_on_features": (1, 1, 1), "--feat_relative": (0, 0, 1),
           "--prediction_type=v_prediction": (1, 0, 0), "--feature_set=stage": (0, 0, 1),
           "--proportion_empty_prompts=1": (1, 1, 1)}  # fmt: skip


@pytest.mark.parametrize("flags", CHANGES)
def test_flag_changes_the_terms_it_concerns_at_the_first_step_and_no_other(flags, run_bksdm, plain):
    run = run_bksdm(*flags.split(), "--max_train_steps=1")
    assert tuple(int(first(run)[name] != first(plain)[name]) for name in TERMS) == CHANGES[flags]
    assert not [line for line in run.log.splitlines() if "no effect" in line]


@pytest.mark.parametrize(("flag", "kind"), [("--snr_gamma=0.01", "v_prediction"), ("--debias", "epsilon")])
def test_weights_are_those_of_the_drawn_timestep_and_of_the_parametrisation(flag, kind, run_bksdm, calls_of):
    flags = ("--train_batch_size=1", "--max_train_steps=1", f"--prediction_type={kind}")
    alone = run_bksdm(*flags)
    calls = calls_of(sd_models, "predict")
    weighted = run_bksdm(*flags, flag, "--snr_on_features")
    (timestep,) = calls[0][0][3].tolist()
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[timestep]
    weight = (bksdm.debias_weights(alpha, kind) if flag == "--debias" else bksdm.min_snr_weights(alpha, 0.01, kind)).item()
    assert abs(weight - 1) > 0.01
    for name in TERMS:
        assert first(weighted)[name] == pytest.approx(weight * first(alone)[name], rel=1e-4), name


def test_feat_relative_divides_by_the_teachers_feature(run_bksdm, plain, calls_of):
    calls = calls_of(bksdm, "feature_loss")
    run = run_bksdm("--feat_relative", "--max_train_steps=1")
    teacher = calls[0][0][1]
    report = json.loads((run.output / "bksdm_report.json").read_text())
    for (_, name), feature in zip(report["feature_pairs"], teacher, strict=True):
        expected = plain.rows[0][f"feat/{name}"] / feature.square().mean().item()
        assert run.rows[0][f"feat/{name}"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("chosen", "count", "name"), [
    ("self_attn", 11, "feat/up_blocks.3.attentions.1.transformer_blocks.0.attn1"), ("own.json", 1, "feat/conv_in"),
])  # fmt: skip
def test_feature_set_chooses_the_pairs(chosen, count, name, run_bksdm, tmp_path):
    (tmp_path / "own.json").write_text('[["conv_in", "conv_in"]]')
    run = run_bksdm(f"--feature_set={tmp_path / chosen if chosen.endswith('json') else chosen}", "--max_train_steps=1")
    assert len(pairs_of(run)) == count and name in pairs_of(run)


# noise and timesteps


def noise_of(run_bksdm, calls_of, *flags):
    """(noise in the input, noise in the target) of a first step."""
    inputs, latents, losses = calls_of(sd_models, "predict"), calls_of(sd_inputs, "encode_batch"), calls_of(bksdm, "output_loss")
    alphas = calls_of(schedules, "signal_and_noise")
    run_bksdm(*flags, "--max_train_steps=1")
    a, s = alphas[0][2]
    return (inputs[0][0][2] - a * latents[0][2][0]) / s, losses[0][0][1]


def test_noise_offset_is_a_constant_per_channel_in_input_and_target(run_bksdm, calls_of):
    (before, goal), (after, target) = (noise_of(run_bksdm, calls_of, flag) for flag in ("--noise_offset=0", "--noise_offset=0.5"))
    offset = target - goal
    assert (offset - offset[:, :, :1, :1]).abs().max() < 1e-5 and len(set(offset[:, :, 0, 0].flatten().tolist())) == 2 * 4
    assert 0.1 < offset.std() < 1.2
    torch.testing.assert_close(after - before, offset, atol=1e-3, rtol=1e-3)


def test_input_perturbation_is_noise_in_the_input_alone(run_bksdm, calls_of):
    (before, goal), (after, target) = (noise_of(run_bksdm, calls_of, f"--input_perturbation={g}") for g in (0, 0.1))
    assert torch.equal(goal, target)
    assert (after - before).std().item() == pytest.approx(0.1, rel=0.15)


def test_timestep_sampling_draws_as_it_says(run_bksdm, calls_of):
    calls = calls_of(bksdm, "draw_timesteps")
    for sampling in ("uniform", "later", "cubic"):
        run_bksdm(f"--timestep_sampling={sampling}", "--max_train_steps=1")
    assert [call[0][1:] for call in calls] == [(sampling, 1000) for sampling in ("uniform", "later", "cubic")]
    assert all(torch.equal(call[0][0], calls[0][0][0]) for call in calls), "from the same uniform numbers"
    assert len({tuple(call[2].tolist()) for call in calls}) == 3


@pytest.mark.parametrize("sampling", ["uniform", *bksdm.FAVOURED, "cubic"])
def test_every_sampling_of_timesteps_is_a_choice(sampling):
    assert arguments(f"--timestep_sampling={sampling}")[0].timestep_sampling == sampling


# captions


def embeddings_of(run_bksdm, calls_of, *flags, family="toy_sd1"):
    """(the embeddings that the networks got, the run, parts) of a first step."""
    calls = calls_of(sd_inputs, "condition")
    run = run_bksdm(*flags, "--max_train_steps=1", family=family)
    parts, embeddings = calls[0][0][:2]
    return embeddings, run, parts


def encoded(parts, text):
    return sd_inputs.encode_prompts(parts, [row[None] for row in sd_inputs.Tokenize(parts.tokenizers)(text).values()])


@pytest.mark.parametrize(("family", "mode", "zeros"), [
    ("toy_sdxl", "zeros", True), ("toy_sdxl", "encode", False), ("toy_sdxl", "auto", True), ("toy_sd1", "auto", False),
])  # fmt: skip
def test_dropped_captions_are_zeros_or_the_empty_prompt(family, mode, zeros, run_bksdm, calls_of):
    flags = ("--proportion_empty_prompts=1", f"--empty_prompt_mode={mode}")
    embeddings, _, parts = embeddings_of(run_bksdm, calls_of, *flags, family=family)
    assert len([part for part in embeddings if part is not None]) == (2 if family == "toy_sdxl" else 1)
    for part, empty in zip(embeddings, encoded(parts, ""), strict=True):
        if part is not None:
            assert empty.abs().max() > 0
            torch.testing.assert_close(part, torch.zeros_like(part) if zeros else empty.expand_as(part))


def test_random_conditioning_swaps_in_extra_prompts_and_takes_them_out_of_the_first_loss(run_bksdm, calls_of, plain, tmp_path):
    (tmp_path / "prompts.txt").write_text("a green circle\n\n")
    flags = ("--random_conditioning", "--random_conditioning_lambda=0", f"--extra_prompts_file={tmp_path}/prompts.txt")
    embeddings, run, parts = embeddings_of(run_bksdm, calls_of, *flags, "--train_batch_size=1")
    torch.testing.assert_close(embeddings[0], encoded(parts, "a green circle")[0].expand_as(embeddings[0]))
    assert first(run)["loss_sd"] == 0 and first(run)["loss_kd_output"] > 0
    never = run_bksdm("--random_conditioning", "--random_conditioning_lambda=1e9", "--max_train_steps=1")
    assert first(never) == first(plain)


def test_random_conditioning_takes_the_captions_of_the_batch_without_a_file(run_bksdm, calls_of, pictures):
    flags = ("--random_conditioning", "--random_conditioning_lambda=0", f"--train_data_dir={pictures}")
    online = calls_of(sd_inputs, "encode_batch")
    (embeddings, _), run, _ = embeddings_of(run_bksdm, calls_of, *flags)
    own = online[0][2][1][0]
    assert not torch.equal(own[0], own[1]) and torch.equal(embeddings, own.flip(0)) and first(run)["loss_sd"] == 0


# optimizer and length


def test_learning_rate_is_scaled_by_the_global_batch_on_request(run_bksdm, plain):
    assert plain.rows[0]["lr"] == 5e-5
    run = run_bksdm("--scale_lr", "--gradient_accumulation_steps=3", "--max_train_steps=1")
    assert run.rows[0]["lr"] == pytest.approx(5e-5 * 2 * 3)


@pytest.mark.parametrize(("flags", "name"), [
    ((), "AdamW"), (("--optimizer=adafactor",), "Adafactor"), (("--use_8bit_adam",), "AdamW"),
    (("--optimizer=adamw8bit",), "AdamW"),
])  # fmt: skip
def test_optimizer_is_the_one_named(flags, name, run_bksdm, calls_of, monkeypatch):
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda module: None)  # no bitsandbytes
    calls = calls_of(optim, "create_optimizer")
    settings = ("--learning_rate=0.01", "--adam_beta1=0.8", "--adam_beta2=0.9", "--adam_weight_decay=0.1", "--adam_epsilon=1e-4")
    run = run_bksdm(*flags, *settings, "--max_train_steps=1")
    optimizer, group = calls[0][2], calls[0][2].param_groups[0]
    assert type(optimizer).__name__ == name and (group["initial_lr"], group["weight_decay"]) == (0.01, 0.1)
    assert name == "Adafactor" or (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-4)
    assert ("--adam_beta1 has no effect without --optimizer adamw" in run.log) == (name == "Adafactor")
    assert ("bitsandbytes is not installed" in run.log) == (len(flags) == 1 and "8bit" in flags[0])
    assert "use_8bit_adam" not in run.log


def test_gradients_are_clipped_to_the_norm(run_bksdm, monkeypatch):
    from accelerate import Accelerator

    norms, clip = [], Accelerator.clip_grad_norm_

    def noting(self, parameters, *rest):
        parameters = list(parameters)
        total = clip(self, parameters, *rest)
        norms.append((total.item(), torch.stack([p.grad.norm() for p in parameters]).norm().item()))
        return total

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", noting)
    run = run_bksdm("--max_grad_norm=0.01", "--max_train_steps=1")
    assert norms[0][0] == pytest.approx(run.rows[0]["grad_norm"]) and norms[0][0] > 0.1
    assert norms[0][1] == pytest.approx(0.01, rel=1e-3)


def test_epochs_count_the_folder_or_the_first_images_of_it(models, pictures, tmp_path):
    flags = (f"--pretrained_model_name_or_path={models['toy_sd1']}", f"--train_data_dir={pictures}", "--resolution=32",
             "--train_batch_size=2", "--report_to=none", "--log_every=1", "--dataloader_num_workers=0", "--num_train_epochs=2",
             "--seed=1")  # fmt: skip
    whole = train(tmp_path / "whole", *flags, script=BKSDM)
    assert [row["step"] for row in whole] == [1, 2, 3, 4, 5, 6]
    part = train(tmp_path / "part", *flags, "--max_train_samples=2", script=BKSDM)
    assert [row["step"] for row in part] == [1, 2]


# average, validation, speed


def test_ema_decay_0_is_the_student_and_more_lags_behind(run_bksdm):
    for decay, same in ((0, True), (0.9999, False)):
        run = run_bksdm("--use_ema", f"--ema_decay={decay}", "--learning_rate=1e-3")
        average, raw = (load_file(run.output / name / "diffusion_pytorch_model.safetensors") for name in ("unet", "unet_raw"))
        assert all(torch.equal(average[name], raw[name]) for name in raw) == same


def test_validation_writes_a_grid_of_the_average_and_leaves_training_as_it_is(run_bksdm, calls_of, plain):
    calls = calls_of(sd_export, "validate")
    run = run_bksdm("--validation_prompts=a red square|a dog", "--validation_steps=1", "--num_valid_images=3", "--use_ema",
                    "--validation_inference_steps=2")  # fmt: skip
    grids = sorted(run.output.glob("validation/**/*.png"))
    assert [str(path.relative_to(run.output)) for path in grids] == [
        f"validation/step-00000{step}/student-2-steps.png" for step in (1, 2)
    ]
    assert all(Image.open(path).size == (3 * 32, 2 * 32) for path in grids), "a row per prompt"
    (_, _, networks, _, prompts, steps, guidance, *_), *_ = calls[0]
    assert prompts == ["a red square", "a dog"] and steps == [2] and guidance == 7.5
    average = load_file(run.output / "unet/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, average[name]) for name, value in networks["student"].state_dict().items())
    assert [row["loss"] for row in run.rows] == [row["loss"] for row in plain.rows]


def test_the_samples_of_a_prompt_do_not_depend_on_the_other_prompts(run_bksdm, calls_of):
    calls = calls_of(sd_export, "sample_images")
    for prompts in ("a red square|a dog", "a dog"):
        run_bksdm(f"--validation_prompts={prompts}", "--validation_steps=1", "--max_train_steps=1",
                  "--validation_inference_steps=2")  # fmt: skip
    first, second, alone = ([image.tobytes() for image in call[2]] for call in calls)
    assert second == alone and len({*first, *second}) == 4


def test_the_average_has_the_memory_format_of_the_student(run_bksdm, monkeypatch):
    seen, update = [], optim.EMA.update

    def noting(self, parameters, decay):
        update(self, parameters, decay)
        weight = self.network.conv_in.weight
        seen.append((weight.is_contiguous(memory_format=torch.channels_last), weight.data_ptr() == self.master[0].data_ptr()))

    monkeypatch.setattr(optim.EMA, "update", noting)
    run_bksdm("--channels_last", "--use_ema")
    assert seen == [(True, True)] * 2


def test_prediction_type_is_trained_and_exported(run_bksdm, calls_of):
    targets = calls_of(schedules, "prediction_target")
    run = run_bksdm("--prediction_type=v_prediction", "--save_pipeline", "--max_train_steps=1")
    assert targets[0][0][-1] == "v_prediction"
    assert json.loads((run.output / "scheduler/scheduler_config.json").read_text())["prediction_type"] == "v_prediction"
    assert json.loads((run.output / "run_manifest.json").read_text())["prediction_type"] == "v_prediction"


def test_precisions_are_those_of_the_frozen_networks_alone(run_bksdm, calls_of):
    inputs, moments = calls_of(sd_models, "predict"), calls_of(sd_inputs, "latent_moments")
    run_bksdm("--teacher_dtype=bf16", "--vae_dtype=bf16", "--max_train_steps=1")
    assert [next(call[0][0].parameters()).dtype for call in inputs] == [torch.bfloat16, torch.float32]
    assert next(moments[0][0][0].parameters()).dtype == torch.bfloat16


def test_switches_that_a_cpu_lacks_are_said_once_and_change_nothing(run_bksdm, plain):
    flags = ("--enable_xformers_memory_efficient_attention", "--mixed_precision=fp16", "--allow_tf32", "--max_train_steps=1")
    run = run_bksdm(*flags)
    assert first(run) == first(plain)
    assert run.log.count("xformers attention needs CUDA") == 1 and run.log.count("float32 is used") == 1
