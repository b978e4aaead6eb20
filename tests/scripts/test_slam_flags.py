"""Every flag of the SLAM script has the effect its help promises, seen on tiny runs."""

import importlib.util
import io
import json
import tarfile

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image, ImageOps
from safetensors.torch import load_file

from brisk import data, optim, options, samples, sd_export, sd_inputs, sd_models, splam, tiny


@pytest.fixture(scope="module")
def base_losses(run_main):
    """The losses of the plain run of two steps."""
    return losses(run_main())


@pytest.fixture(scope="module")
def plain(run_main):
    """The plain run of three steps."""
    return run_main("--max_train_steps=3")


def losses(run):
    """The logged losses of a run."""
    return [row["loss"] for row in run.rows]


def weights(run, name="unet"):
    """The final weights of one of the networks."""
    return load_file(run.output / f"{name}/diffusion_pytorch_model.safetensors")


# models


def test_revision_variant_and_cache_dir_reach_every_from_pretrained(run_main, monkeypatch, tmp_path):
    import diffusers
    import transformers

    asked = {}

    def spy(cls):
        original = cls.from_pretrained.__func__

        def from_pretrained(kind, source, *args, **kwargs):
            asked[kind.__name__] = {name: kwargs.get(name) for name in ("revision", "variant", "cache_dir")}
            kwargs = {name: value for name, value in kwargs.items() if name not in ("revision", "variant")}
            return original(kind, source, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))

    for cls in (diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, transformers.CLIPTextModel,
                transformers.CLIPTokenizer):  # fmt: skip
        spy(cls)
    flags = ("--variant=fp16", f"--cache_dir={tmp_path}", "--max_train_steps=1")
    run_main("--teacher_revision=tag-a", "--revision=tag-b", *flags)
    expected = {"revision": "tag-a", "variant": "fp16", "cache_dir": str(tmp_path)}
    assert asked.pop("CLIPTokenizer") == expected | {"variant": None}
    assert set(asked) == {"UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"}
    assert all(found == expected for found in asked.values()), asked
    run_main("--revision=tag-b", *flags)
    assert asked["UNet2DConditionModel"]["revision"] == "tag-b"


def test_variant_files_are_loaded_as_float32(run_main, tmp_path):
    pipeline = tiny.make_pipeline("sd1", seed=3)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    run = run_main(f"--pretrained_teacher_model={tmp_path / 'half'}", "--variant=fp16", "--learning_rate=0")
    unet = pipeline.unet.state_dict()
    assert all(torch.equal(value, unet[name].float()) for name, value in weights(run).items() if name in unet)
    with pytest.raises(options.UserError, match="unet cannot be loaded"):
        run_main(f"--pretrained_teacher_model={tmp_path / 'half'}")


@pytest.mark.parametrize("layout", ("root", "vae subfolder"))
def test_own_vae_is_used_and_exported(layout, run_main, base_losses, tmp_path):
    torch.manual_seed(11)
    vae = tiny.make_vae("tiny")
    vae.register_to_config(scaling_factor=0.25)
    vae.save_pretrained(tmp_path / "own" / ("vae" if layout != "root" else ""))
    run = run_main(f"--pretrained_vae_model_name_or_path={tmp_path / 'own'}")
    exported = weights(run, "vae")
    assert all(torch.equal(value, exported[name]) for name, value in vae.state_dict().items())
    assert json.loads((run.output / "vae/config.json").read_text())["scaling_factor"] == 0.25
    assert losses(run) != base_losses


@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_vae_dtype_casts_the_encoder_for_training_and_not_the_exported_one(precision, run_main, models, calls_of):
    calls = calls_of(sd_inputs, "latent_moments")
    run = run_main("--vae_dtype=bf16", f"--mixed_precision={precision}", "--max_train_steps=1")
    assert next(calls[0][0][0].parameters()).dtype == torch.bfloat16
    exported, original = weights(run, "vae"), load_file(models["sd1"] / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.parametrize(("flags", "dtype"), (
    ((), torch.float32), (("--mixed_precision=bf16",), torch.bfloat16), (("--teacher_dtype=bf16",), torch.bfloat16),
    (("--mixed_precision=bf16", "--teacher_dtype=fp32"), torch.float32),
    (("--mixed_precision=bf16", "--cast_teacher_unet"), torch.bfloat16),
))  # fmt: skip
def test_teacher_dtype_and_mixed_precision_cast_the_teacher_and_never_the_student(flags, dtype, run_main, monkeypatch):
    found, predict = [], sd_models.predict

    def noting(unet, *args):
        output = predict(unet, *args)
        found.append(({parameter.dtype for parameter in unet.parameters()}, output.dtype))
        return output

    monkeypatch.setattr(sd_models, "predict", noting)
    run = run_main(*flags, "--max_train_steps=1")
    half = torch.bfloat16 if "--mixed_precision=bf16" in flags else torch.float32
    assert [kinds for kinds, _ in found] == [{dtype}, {half}, {torch.float32}], "teacher, target, student"
    assert {kind for _, kind in found} == {torch.float32}
    assert np.isfinite(losses(run)).all()


def test_fp16_without_a_gpu_is_a_warning_and_float32(run_main, base_losses):
    run = run_main("--mixed_precision=fp16")
    assert "WARNING --mixed_precision" in run.log and "float32" in run.log
    assert losses(run) == base_losses


def test_vae_encode_batch_size_cuts_the_batch_and_changes_nothing(run_main, monkeypatch, calls_of):
    from diffusers import AutoencoderKL

    calls = calls_of(AutoencoderKL, "encode")
    runs = [run_main("--train_batch_size=5", "--max_train_steps=1", *flags)
            for flags in ((), ("--vae_encode_batch_size=2",))]  # fmt: skip
    assert [len(call[0][1]) for call in calls] == [5, 2, 2, 1]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


# method


@pytest.mark.parametrize("flag", ("--w_scale=0", "--num_ddim_timesteps=20", "--loss_type=huber", "--gamma_one_prob=1",
                                  "--subpath_param=snr", "--prediction_type=sample", "--gamma_min=0.9",
                                  "--timestep_scaling_factor=0.01", "--seed=8", "--proportion_empty_prompts=1",
                                  "--center_crop", "--random_flip", "--interpolation_type=nearest"))  # fmt: skip
def test_flag_changes_the_loss_of_the_first_step(flag, run_main, base_losses):
    run = run_main(flag, "--max_train_steps=1")
    assert losses(run)[0] != base_losses[0] and np.isfinite(losses(run)).all()


@pytest.mark.parametrize("flag", ("--ema_decay=0.5", "--cond_proj_init=default", "--gamma_embed_scale=1", "--adam_beta1=0.5",
                                  "--adam_beta2=0.9", "--adam_weight_decay=10", "--adam_epsilon=1", "--max_grad_norm=1e-6",
                                  "--learning_rate=0.01", "--use_8bit_adam", "--gradient_accumulation_steps=2"))
def test_flag_changes_what_comes_out(flag, run_main, plain):
    changed = run_main(flag, "--max_train_steps=3")
    before, after = weights(plain, "unet_target"), weights(changed, "unet_target")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())


def test_w_scale_is_handed_to_the_guided_step_in_the_convention_of_the_paper(run_main, calls_of):
    calls = calls_of(splam, "guided_ddim_step")
    run_main("--w_scale=3.5", "--max_train_steps=1")
    (args, _, (_, x0, _)), = calls
    cond, uncond, x, a, s = args[:5]
    assert args[7] == 3.5
    torch.testing.assert_close(x0, (x - s * (cond + 3.5 * (cond - uncond))) / a)


def test_huber_c_reaches_the_loss_and_is_said_to_do_nothing_under_l2(run_main, calls_of):
    calls = calls_of(splam, "distillation_loss")
    assert "has no effect" not in run_main("--loss_type=huber", "--huber_c=0.25", "--max_train_steps=1").log
    assert calls[0][0][2:] == ("huber", 0.25)
    assert "--huber_c has no effect without --loss_type huber" in run_main("--huber_c=0.25", "--max_train_steps=1").log


def test_ema_decay_0_copies_the_student_and_1_keeps_the_teacher(run_main, models):
    run = run_main("--ema_decay=0", "--learning_rate=0.01")
    online, target = weights(run), weights(run, "unet_target")
    assert all(torch.allclose(online[name], target[name], atol=1e-6) for name in online)
    run = run_main("--ema_decay=1", "--learning_rate=0.01")
    teacher, target = load_file(models["sd1"] / "unet/diffusion_pytorch_model.safetensors"), weights(run, "unet_target")
    assert all(torch.equal(teacher[name], target[name]) for name in teacher)


@pytest.mark.parametrize("width", (16, 33))
def test_unet_time_cond_proj_dim_is_the_width_of_the_condition(width, run_main):
    run = run_main(f"--unet_time_cond_proj_dim={width}", "--max_train_steps=1")
    assert weights(run)[sd_models.COND_PROJ].shape[1] == width
    assert json.loads((run.output / "unet/config.json").read_text())["time_cond_proj_dim"] == width


def test_guidance_distilled_teacher_keeps_its_width_with_a_warning(run_main, tmp_path):
    pipeline = tiny.make_pipeline("sd1")
    pipeline.register_modules(unet=tiny.make_unet("tiny", time_cond_proj_dim=24))
    pipeline.save_pretrained(tmp_path / "distilled")
    run = run_main(f"--pretrained_teacher_model={tmp_path / 'distilled'}")
    assert "timestep_cond of width 24: it is guidance-distilled already, and --w_scale 8 guides it once more" in run.log
    run_lora = run_main(f"--pretrained_teacher_model={tmp_path / 'distilled'}", "--use_lora", "--dry_run")
    assert "guidance-distilled already" in run_lora.log
    assert json.loads((run.output / "unet/config.json").read_text())["time_cond_proj_dim"] == 24


def test_lora_flags_shape_the_adapters(run_main):
    run = run_main("--use_lora", "--lora_rank=3", "--lora_alpha=9", "--lora_target_modules=to_q,conv1", "--max_train_steps=1")
    stored = load_file(run.output / "pytorch_lora_weights.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in stored} == {"to_q", "conv1"}
    assert {value.shape[0] for name, value in stored.items() if "lora_A" in name} == {3}
    with pytest.raises(options.UserError, match="--lora_target_modules"):
        run_main("--use_lora", "--lora_target_modules=nonesuch")
    assert "--lora_alpha has no effect without --use_lora" in run_main("--lora_alpha=2", "--max_train_steps=1").log


# data


def test_center_crop_flip_and_filter_choose_the_pixels(run_main, calls_of, shards):
    calls = calls_of(sd_inputs, "latent_moments")

    def pixels(*flags):
        calls.clear()
        run_main("--max_train_steps=4", *flags)
        return torch.cat([call[0][1] for call in calls])

    centred = pixels("--center_crop")
    originals = []
    for url in data.expand_shards(shards):
        with tarfile.open(url) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
            originals += [Image.open(io.BytesIO(tar.extractfile(name).read())) for name in names]

    def crops(interpolation, change=lambda square: square):
        cut = [samples.resize_and_crop(original, 32, interpolation, True, None)[0] for original in originals]
        return {np.asarray(change(square)).transpose(2, 0, 1).tobytes() for square in cut}

    def found(images, known):
        return [image.numpy().tobytes() in known for image in images]

    assert centred.shape == (8, 3, 32, 32) and all(found(centred, crops("bilinear")))
    flipped = pixels("--center_crop", "--random_flip")
    upright, mirrored = found(flipped, crops("bilinear")), found(flipped, crops("bilinear", ImageOps.mirror))
    assert any(upright) and any(mirrored) and all(one != other for one, other in zip(upright, mirrored, strict=True))
    for name in samples.INTERPOLATIONS[1:]:
        assert all(found(pixels("--center_crop", f"--interpolation_type={name}"), crops(name)))
    assert not all(found(pixels(), crops("bilinear")))


def make_shards(folder, caption):
    """The synthetic shards with every caption replaced."""
    folder.mkdir()
    for path in tiny.write_shards(folder / "as-made"):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            for member in old:
                content = old.extractfile(member).read()
                content = caption.encode() if member.name.endswith(".txt") else content
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    return f"--train_shards_path_or_url={folder}/synthetic-{{00000..00001}}.tar"


@pytest.mark.parametrize("family", ("sd1", "sdxl"))
def test_all_prompts_empty_equals_all_captions_empty(family, run_main, tmp_path):
    shards = make_shards(tmp_path / "shards", "")
    empty = run_main(shards, family=family)
    dropped = run_main("--proportion_empty_prompts=1", family=family)
    # the embeddings put in place of a dropped caption were encoded in a batch of one
    assert losses(empty) == pytest.approx(losses(dropped), rel=1e-4)
    assert losses(empty) != pytest.approx(losses(run_main(family=family)), rel=1e-2)


def test_folder_with_metadata_equals_folder_with_sidecar_captions(run_main, tmp_path):
    for name in ("sidecar", "jsonl", "csv"):
        (tmp_path / name / "sub").mkdir(parents=True)
    for number in range(5):
        for name in ("sidecar", "jsonl", "csv"):
            image = tiny.random_image(np.random.default_rng(number), 40, 48)
            image.save(tmp_path / name / "sub" / f"{number}.png")
        (tmp_path / "sidecar/sub" / f"{number}.txt").write_text(f"number {number}")
    rows = [{"file_name": f"sub/{number}.png", "text": f"number {number}"} for number in range(5)]
    (tmp_path / "jsonl/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows)]
    (tmp_path / "csv/metadata.csv").write_text("\n".join(lines))
    found = {name: losses(run_main(f"--train_data_dir={tmp_path / name}", "--max_train_steps=4"))
             for name in ("sidecar", "jsonl", "csv")}  # fmt: skip
    assert found["sidecar"] == found["jsonl"] == found["csv"]
    assert len(set(found["csv"])) == 4


def test_folder_epoch_is_its_size_or_max_train_samples(run_main, monkeypatch, tmp_path):
    import train_splam_distill_sd_wds as script

    for number in range(5):
        tiny.random_image(np.random.default_rng(number), 40, 48).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    parse_args = script.parse_args

    def without_steps(argv):
        args, names = parse_args(argv)
        args.max_train_steps = None
        return args, names

    monkeypatch.setattr(script, "parse_args", without_steps)
    flags = (f"--train_data_dir={tmp_path}", "--num_train_epochs=2", "--train_batch_size=2")
    assert run_main(*flags).rows[-1]["step"] == 2 * 3
    run = run_main(*flags, "--max_train_samples=8", "--gradient_accumulation_steps=2")
    assert run.rows[-1]["step"] == 2 * 2


def test_filters_of_shards_choose_by_size_and_watermark(run_main, calls_of, tmp_path):
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for number, (size, mark) in enumerate(((64, 0.0), (64, 0.9), (40, 0.0), (64, None), (40, 0.9))):
            picture = io.BytesIO()
            Image.new("RGB", (size, size), (number * 50, 0, 0)).save(picture, format="PNG")
            facts = json.dumps({} if mark is None else {"pwatermark": mark}).encode()
            for suffix, content in (("png", picture.getvalue()), ("txt", b"x"), ("json", facts)):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    calls = calls_of(sd_inputs, "latent_moments")

    def kept(*flags):
        calls.clear()
        run_main(f"--train_shards_path_or_url={tmp_path / 'mixed.tar'}", "--max_train_steps=4", "--train_batch_size=8", *flags)
        return sorted({int(image[0, 0, 0]) // 50 for call in calls for image in call[0][1]})

    assert kept() == [0, 1, 2, 3, 4]
    assert kept("--wds_min_size=50") == [0, 1, 3]
    assert kept("--wds_max_pwatermark=0") == [0, 2, 3], "a watermark probability of 0.0 must pass"
    assert kept("--wds_min_size=50", "--wds_max_pwatermark=0.5") == [0, 3]


# optimizer and schedule


def test_scale_lr_multiplies_by_accumulation_and_batch(run_main):
    run = run_main("--scale_lr", "--learning_rate=1e-5", "--train_batch_size=3", "--gradient_accumulation_steps=2")
    assert [row["lr"] for row in run.rows] == pytest.approx([6e-5, 6e-5])


SCHEDULES = {
    "constant": [1, 1, 1, 1, 1],
    "constant_with_warmup": [0.5, 1, 1, 1, 1],
    "linear": [0.5, 1, 2 / 3, 1 / 3, 0],
    "cosine": [0.5, 1, 0.75, 0.25, 0],
    "cosine_with_restarts": [0.5, 1, 0.75, 0.25, 0],
    "polynomial": [0.5, 1, 2 / 3, 1 / 3, 0],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_and_warm_up_are_logged_at_each_step(name, run_main):
    run = run_main(f"--lr_scheduler={name}", "--lr_warmup_steps=2", "--learning_rate=1", "--max_train_steps=5",
                   "--max_grad_norm=1e-8")  # fmt: skip
    assert [row["lr"] for row in run.rows] == pytest.approx(SCHEDULES[name], abs=1e-6)


def test_8bit_adam_keeps_8bit_states_and_falls_back_with_a_warning(run_main, monkeypatch, calls_of):
    import bitsandbytes

    calls = calls_of(optim, "create_optimizer")
    run_main("--use_8bit_adam", "--max_train_steps=1")
    optimizer = calls[0][2]
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit)
    assert torch.uint8 in {value.dtype for state in optimizer.state.values() for value in state.values()
                           if torch.is_tensor(value)}  # fmt: skip
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a))
    run = run_main("--use_8bit_adam", "--max_train_steps=1")
    assert "bitsandbytes is not installed" in run.log and "pip install bitsandbytes" in run.log
    assert isinstance(calls[1][2], torch.optim.AdamW)


def test_frozen_learning_rate_0_leaves_the_student_equal_to_the_teacher(run_main, models):
    run = run_main("--learning_rate=0", "--adam_weight_decay=0.5")
    teacher, student = load_file(models["sd1"] / "unet/diffusion_pytorch_model.safetensors"), weights(run)
    assert all(torch.equal(teacher[name], student[name]) for name in teacher)
    assert (student[sd_models.COND_PROJ] == 0).all()


# memory and speed


@pytest.mark.parametrize("flag", ("--gradient_checkpointing", "--channels_last", "--allow_tf32"))
def test_speed_switch_does_not_change_the_result(flag, run_main, base_losses):
    run = run_main(flag)
    assert losses(run) == pytest.approx(base_losses, rel=1e-3)


def test_allow_tf32_sets_the_backends(run_main):
    for flags, allowed in (((), False), (("--allow_tf32",), True), (("--allow_tf32=False",), False)):
        run_main("--max_train_steps=1", *flags)
        assert torch.backends.cuda.matmul.allow_tf32 is allowed and torch.backends.cudnn.allow_tf32 is allowed


def test_xformers_on_a_cpu_warns_once_and_goes_on(run_main, base_losses):
    run = run_main("--enable_xformers_memory_efficient_attention")
    assert run.log.count("xformers attention needs CUDA") == 1
    assert losses(run) == base_losses


# run


def test_checkpoints_total_limit_keeps_the_newest(run_main):
    run = run_main("--max_train_steps=5", "--checkpointing_steps=1", "--checkpoints_total_limit=2")
    assert sorted(path.name for path in run.output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_validation_samples_at_gamma_one_and_leaves_training_untouched(run_main, calls_of, monkeypatch):
    conditions, original = [], sd_export.build_pipeline

    def noting(*args, **kwargs):
        pipeline = original(*args, **kwargs)
        hook = pipeline.unet.register_forward_pre_hook(
            lambda module, call, named: conditions.append((module.training, named.get("timestep_cond"))), with_kwargs=True
        )
        monkeypatch.setattr(pipeline, "maybe_free_model_hooks", hook.remove)
        return pipeline

    plain = run_main("--max_train_steps=4", "--gradient_checkpointing")
    with monkeypatch.context() as patched:
        patched.setattr(sd_export, "build_pipeline", noting)
        run = run_main("--max_train_steps=4", "--gradient_checkpointing", "--validation_steps=2", "--validation_prompts=a|b",
                       "--num_validation_images=1", "--validation_num_inference_steps=1,2")  # fmt: skip
    assert losses(run) == losses(plain)
    # two networks, 1 + 2 steps, at two moments; the export builds a pipeline too but samples nothing
    assert len(conditions) == 2 * 3 * 2
    expected = splam.gamma_embedding(torch.ones(1), 16)
    for training, condition in conditions:
        assert not training and torch.equal(condition.float().reshape(-1, 16)[:1], expected)


def test_validation_prompts_come_from_a_file_too_and_the_same_seed_gives_the_same_pictures(run_main, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red seven\n\na blue one\n")
    flags = ("--learning_rate=0", "--validation_steps=1", "--num_validation_images=2", "--validation_num_inference_steps=2",
             f"--validation_prompts={tmp_path / 'prompts.txt'}")  # fmt: skip
    run = run_main(*flags)
    pictures = []
    for step in (1, 2):
        with Image.open(run.output / f"validation/step-{step:06d}/online-2-steps.png") as picture:
            assert picture.size == (64, 64)
            pictures.append(np.asarray(picture))
    assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 0


@pytest.mark.parametrize("family", ("sd1", "sdxl"))
def test_dry_run_takes_one_step_and_leaves_no_run_behind(family, run_main):
    run = run_main("--dry_run", "--checkpointing_steps=1", "--validation_steps=1", "--report_to=tensorboard", family=family)
    assert "Dry run" in run.log and "max_train_steps 2" in run.log  # the plan, of which one step is taken
    left = {str(path.relative_to(run.output)) for path in run.output.rglob("*")}
    assert left <= {"train_config.yaml", "run_manifest.json"}


def test_dry_run_of_a_finished_run_leaves_it_as_it_is(run_main):
    run = run_main("--checkpointing_steps=1")
    before = {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}
    run_main("--dry_run", "--resume_from_checkpoint=latest", output=run.output)
    after = {path: path.read_bytes() for path in run.output.rglob("*") if path.is_file()}
    assert {path.name for path in after} >= {path.name for path in before}
    kept = [path for path in before if path.name not in ("train_config.yaml", "run_manifest.json")]
    assert all(after[path] == before[path] for path in kept)


def test_dashes_in_flags_and_bare_or_spelt_booleans_mean_the_same(run_main, base_losses):
    run = run_main("--w-scale", "8", "--center_crop", "False", "--local-rank=0", "--random_flip=no")
    assert losses(run) == base_losses


CONFIGS = sorted((ROOT / "configs/splam").glob("*.yaml"))


def test_there_are_recipes():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_trains_two_steps_with_what_it_does_not_leave_to_the_machine(path, run_main, shards, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    family = "sdxl" if "sdxl" in path.stem else "sd2" if "sd2" in path.stem else "sd1"
    small = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "dataloader_num_workers": 0, "report_to": "none",
             "resolution": 32, "max_train_steps": 2, "validation_steps": 2, "num_validation_images": 1, "lora_rank": 2,
             "log_every": 1, "validation_prompts": "x", "validation_num_inference_steps": "1", "mixed_precision": "no"}
    given = [f"--{name}={value}" for name, value in small.items() if not name.startswith("lora") or recipe.get("use_lora")]
    sources = ("train_shards_path_or_url", "train_data_dir", "precomputed_shards", "pretrained_vae_model_name_or_path")
    kept = {name: value for name, value in recipe.items() if name not in sources}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(kept))
    run = run_main(f"--config={tmp_path / 'recipe.yaml'}", f"--train_shards_path_or_url={shards}", *given, family=family)
    assert run.rows[-1]["step"] == 2 and np.isfinite(losses(run)).all() and run.rows[-1]["skipped_steps"] == 0
    written = yaml.safe_load((run.output / "train_config.yaml").read_text())
    for name in ("learning_rate", "w_scale", "num_ddim_timesteps", "loss_type", "subpath_param", "use_lora"):
        if name in recipe:
            assert float(written[name]) == float(recipe[name]) if name == "learning_rate" else written[name] == recipe[name]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_recipe_as_it_stands_is_accepted_by_the_parser_under_its_name(path):
    import train_splam_distill_sd_wds as script

    args, _ = script.parse_args([f"--config={path.stem}", "--pretrained_teacher_model=x"])
    for name, value in yaml.load(path.read_text(), Loader=yaml.BaseLoader).items():
        if name != "pretrained_teacher_model":
            assert yaml.safe_load(f"{getattr(args, name)}".lower()) == yaml.safe_load(value.lower()) or (
                float(getattr(args, name)) == float(value)
            ), name
