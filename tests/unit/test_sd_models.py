"""Loading pipelines, prompts as the stock pipelines encode them, precision, students and LoRA adapters."""

import json
import pickle
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from brisk import macs, network_files, sd_export, sd_inputs, sd_models, tiny
from brisk.options import UserError

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of the three families."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in ("sd1", "sd2", "sdxl"):
        tiny.make_pipeline(family).save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def loaded(saved):
    return {family: sd_models.load_parts(str(saved / family)) for family in ("sd1", "sd2", "sdxl")}


def changed(saved, tmp_path, family="sd1"):
    """A copy of a pipeline folder, to be broken."""
    return shutil.copytree(saved / family, tmp_path / "broken")


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family, encoders", [("sd1", 1), ("sd2", 1), ("sdxl", 2)])
def test_families_are_told_apart_and_everything_is_frozen_float32(loaded, family, encoders):
    parts = loaded[family]
    assert parts.is_xl == (family == "sdxl")
    assert len(parts.tokenizers) == len(parts.text_encoders) == encoders
    kind = {"sd2": "v_prediction"}.get(family, "epsilon")
    assert parts.scheduler_config["prediction_type"] == kind
    assert parts.scheduler_config.get("rescale_betas_zero_snr", False) == (family == "sd2")
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        assert not module.training
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in module.parameters())


def test_a_missing_folder_is_one_sentence_and_no_network_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="is no such folder") as error:
        sd_models.load_parts(str(tmp_path / "none"))
    assert "\n" not in str(error.value)


def no_index(folder):
    (folder / "model_index.json").unlink()


def broken_index(folder):
    (folder / "model_index.json").write_text("{")


def other_unet(folder):
    edit(folder / "unet/config.json", _class_name="Transformer2DModel")


def vae_as_unet(folder):
    shutil.rmtree(folder / "unet")
    shutil.copytree(folder / "vae", folder / "unet")


def weights(change):
    def harm(folder):
        path = folder / "unet/diffusion_pytorch_model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    return harm


def drop(state):
    del state["conv_in.weight"]


def reshape(state):
    state["conv_in.weight"] = torch.zeros(8, 5, 3, 3)


def truncate(folder):
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_channels(folder):
    tiny.make_unet("tiny", in_channels=9).save_pretrained(folder / "unet")


def student_alone(folder):
    no_index(folder)
    (folder / "bksdm_report.json").write_text("{}")


BROKEN = {
    "no index": (no_index, "without model_index.json"), "broken index": (broken_index, "neither a pipeline folder"),
    "student alone": (student_alone, "train the student with --save_pipeline"),
    "another pipeline": (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "FluxPipeline"),
    "no class": (lambda f: edit(f / "model_index.json", _class_name=""), "nameless"),
    "another network": (other_unet, "not a UNet2DConditionModel"), "VAE for U-Net": (vae_as_unet, "AutoencoderKL"),
    "missing weights": (weights(drop), "conv_in.weight"), "other shapes": (weights(reshape), "conv_in.weight"),
    "cut file": (truncate, "unet cannot be loaded"), "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "unet"),
    "channels": (other_channels, "9 channels and the VAE gives 4"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler"),
    "no text encoder": (lambda f: shutil.rmtree(f / "text_encoder"), "text_encoder"),
    "foreign encoder": (lambda f: edit(f / "model_index.json", text_encoder=["x", "Y"]), "x.Y, which is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_pipeline_is_one_sentence_naming_what_is_wrong(saved, tmp_path, kind):
    folder = changed(saved, tmp_path)
    harm, message = BROKEN[kind]
    harm(folder)
    with pytest.raises(UserError) as error:
        sd_models.load_parts(str(folder))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_vae_is_loaded_from_its_root_or_from_a_pipeline(saved, tmp_path):
    torch.manual_seed(5)
    vae = tiny.make_vae("tiny")
    vae.save_pretrained(tmp_path / "vae_alone")
    vae.save_pretrained(tmp_path / "pipeline/vae")
    for source in ("vae_alone", "pipeline"):
        found = sd_models.load_parts(str(saved / "sd1"), vae_source=str(tmp_path / source)).vae
        assert torch.equal(found.encoder.conv_in.weight, vae.encoder.conv_in.weight)
    with pytest.raises(UserError, match="unet"):
        sd_models.load_parts(str(saved / "sd1"), vae_source=str(saved / "sd1/unet"))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_prompts_are_encoded_as_the_stock_pipeline_does(saved, loaded, family):
    parts, pipe = loaded[family], DiffusionPipeline.from_pretrained(saved / family)
    prompts = ["a red square", "x" * 60]  # the second one is longer than the context
    rows = [sd_inputs.Tokenize(parts.tokenizers)(prompt) for prompt in prompts]
    ids = [torch.stack([row[name] for row in rows]) for name in rows[0]]
    assert list(rows[0]) == [f"input_ids_{number}" for number in range(len(ids))]
    embeddings, pooled = sd_inputs.encode_prompts(parts, ids)
    blank = sd_inputs.encode_blank(parts, "cpu")
    uncond = sd_inputs.unconditional(parts, blank)
    if family == "sdxl":
        cond, zeros, cond_pooled, zeros_pooled = pipe.encode_prompt(
            prompts, device="cpu", do_classifier_free_guidance=True
        )
        assert torch.equal(pooled, cond_pooled)
        assert torch.equal(uncond[0].expand_as(zeros), zeros) and torch.equal(
            uncond[1].expand_as(zeros_pooled), zeros_pooled
        )
        assert uncond[0].abs().max() == 0 and blank[0].abs().max() > 0
        encoded = sd_inputs.unconditional(parts._replace(zeros_for_empty=False), blank)
        assert torch.equal(encoded[0], blank[0])
    else:
        cond, zeros = pipe.encode_prompt(prompts, "cpu", 1, True)
        assert pooled is None
        torch.testing.assert_close(uncond[0].expand_as(zeros), zeros, atol=1e-5, rtol=1e-5)
    assert torch.equal(embeddings, cond)


def test_tokenizer_can_be_sent_to_loader_workers(loaded):
    tokenize = sd_inputs.Tokenize(loaded["sdxl"].tokenizers)
    again = pickle.loads(pickle.dumps(tokenize))
    found, wanted = again("a cat"), tokenize("a cat")
    assert list(found) == ["input_ids_0", "input_ids_1"] == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_size_conditions_are_in_the_order_of_the_stock_pipeline(saved):
    original, crop = torch.tensor([[30, 40], [50, 60]]), torch.tensor([[1, 2], [3, 4]])
    ours = sd_inputs.time_ids(original, crop, 32)
    assert ours.tolist() == [[30, 40, 1, 2, 32, 32], [50, 60, 3, 4, 32, 32]]
    pipe = DiffusionPipeline.from_pretrained(saved / "sdxl")
    theirs = pipe._get_add_time_ids(
        (30, 40), (1, 2), (32, 32), torch.float32, pipe.text_encoder_2.config.projection_dim
    )
    assert theirs.tolist() == ours[:1].tolist()


def test_conditions_are_repeated_and_stacked(loaded):
    parts = loaded["sdxl"]
    one = (torch.ones(1, 3, 4), torch.ones(1, 5))
    many = (torch.zeros(2, 3, 4), torch.zeros(2, 5))
    sizes = torch.arange(12).view(2, 6)
    joined = sd_inputs.stack_conditions(
        sd_inputs.condition(parts, many, sizes, 2), sd_inputs.condition(parts, one, sizes[:1], 2)
    )
    assert joined["encoder_hidden_states"].shape == (4, 3, 4) and joined["encoder_hidden_states"][2:].min() == 1
    assert joined["added_cond_kwargs"]["time_ids"][:, 0].tolist() == [0, 6, 0, 0]
    assert joined["added_cond_kwargs"]["text_embeds"].sum(1).tolist() == [0, 0, 5, 5]
    plain = sd_inputs.condition(loaded["sd1"], (many[0], None), None, 2)
    assert set(plain) == {"encoder_hidden_states"} == set(sd_inputs.stack_conditions(plain, plain))


def encode(parts, batch, seed=0, chunk=8):
    blank = sd_inputs.encode_blank(parts, "cpu")
    draw = torch.Generator().manual_seed(seed)
    return sd_inputs.encode_batch(parts, batch, blank, draw, 32, chunk, torch.enable_grad())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_encoding_online_equals_encoding_from_a_cache(loaded, family):
    parts = loaded[family]
    torch.manual_seed(0)
    batch = tiny.SyntheticBatches(sd_inputs.Tokenize(parts.tokenizers), 3, 32).batch
    batch["pixels"] = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    latents, (embeddings, pooled), sizes = encode(parts, batch)
    for chunk in (1, 2):
        torch.testing.assert_close(encode(parts, batch, chunk=chunk)[0], latents, atol=1e-5, rtol=1e-5)
    mean, std = sd_inputs.latent_moments(parts.vae, batch["pixels"], 8)
    cache = {
        "moments": torch.stack([mean, std], 1),
        "prompt_embeds": embeddings.half(),
        "empty": torch.tensor([False] * 3),
    }
    if parts.is_xl:
        cache |= {"pooled": pooled.half(), "time_ids": sizes}
    from_cache, (cached_embeddings, cached_pooled), cached_sizes = encode(parts, cache)
    torch.testing.assert_close(from_cache, latents)
    torch.testing.assert_close(cached_embeddings, embeddings, atol=2e-3, rtol=2e-3)
    assert cached_embeddings.dtype == embeddings.dtype, "the networks take it without a cast"
    if parts.is_xl:
        torch.testing.assert_close(cached_pooled, pooled, atol=2e-3, rtol=2e-3)
        assert torch.equal(cached_sizes, sizes)
    blank = sd_inputs.encode_blank(parts, "cpu")
    cache["empty"] = torch.tensor([False, True, False])
    hidden = encode(parts, cache)[1]
    torch.testing.assert_close(hidden[0][1], blank[0][0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(hidden[0][::2], cached_embeddings[::2])


def test_latents_are_scaled_draws_from_the_vaes_distribution(loaded):
    parts = loaded["sd1"]
    batch = tiny.SyntheticBatches(sd_inputs.Tokenize(parts.tokenizers), 2, 32).batch
    latents = encode(parts, batch, seed=4)[0]
    posterior = parts.vae.encode(batch["pixels"] / 127.5 - 1).latent_dist
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * parts.vae.config.scaling_factor)
    assert latents.dtype == torch.float32 and not latents.requires_grad


def test_half_precision_networks_take_float32_conditions(loaded):
    """A teacher in bfloat16 without autocast (`--teacher_dtype bf16 --mixed_precision no`)."""
    for family in ("sd1", "sdxl"):
        unet = UNet2DConditionModel.from_config(loaded[family].unet.config).bfloat16().requires_grad_(False)
        inputs = macs.unet_inputs(unet.config, 2, 8, tokens=16)
        sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
        out = sd_models.predict(unet, torch.bfloat16, sample, timestep, inputs)
        assert out.dtype == torch.float32 and torch.isfinite(out).all()


@pytest.mark.parametrize(
    "wanted, mixed, own, xl, expected",
    [
        ("auto", "no", False, False, "float32"), ("auto", "no", True, True, "float32"),
        ("auto", None, False, True, "float32"), ("bf16", "fp16", True, False, "bfloat16"),
        ("auto", "fp16", False, False, "float16"), ("auto", "fp16", False, True, "float32"),
        ("auto", "fp16", True, True, "float16"), ("auto", "bf16", False, True, "bfloat16"),
        ("fp32", "fp16", False, False, "float32"), ("fp16", "no", False, True, "float16"),
    ],
)  # fmt: skip
def test_vae_precision(wanted, mixed, own, xl, expected):
    half = sd_models.DTYPES.get(mixed, torch.float32)
    assert sd_models.vae_dtype(wanted, half, own, xl) == getattr(torch, expected)


def test_resolution_defaults_and_multiples(loaded):
    assert sd_models.check_resolution(loaded["sd1"], None) == 512
    assert sd_models.check_resolution(loaded["sdxl"], None) == 1024
    assert sd_models.check_resolution(loaded["sd1"], 36) == 36
    with pytest.raises(UserError, match="--resolution 34 must be a multiple of 4"):
        sd_models.check_resolution(loaded["sd1"], 34)


def test_student_of_a_teacher_whose_config_does_not_know_the_projection(saved, tmp_path):
    """Stable Diffusion 1's own config is older than time_cond_proj_dim."""
    folder = changed(saved, tmp_path)
    config = json.loads((folder / "unet/config.json").read_text())
    del config["time_cond_proj_dim"]
    (folder / "unet/config.json").write_text(json.dumps(config))
    teacher = sd_models.load_parts(str(folder)).unet
    student = sd_models.create_student(teacher, 16, "zero")
    assert student.config.time_cond_proj_dim == 16
    assert student.time_embedding.cond_proj.weight.shape == (8, 16)
    student.save_pretrained(tmp_path / "student")
    assert UNet2DConditionModel.from_pretrained(tmp_path / "student").config.time_cond_proj_dim == 16


def test_student_adds_one_projection_without_bias_and_is_trainable(loaded):
    teacher = loaded["sd1"].unet
    student = sd_models.create_student(teacher, 16, "zero")
    assert set(student.state_dict()) - set(teacher.state_dict()) == {sd_models.COND_PROJ}
    assert student.state_dict()[sd_models.COND_PROJ].abs().max() == 0
    assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert sd_models.create_student(teacher, 16, "default").state_dict()[sd_models.COND_PROJ].abs().max() > 0
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
        assert student.state_dict()[name].data_ptr() != value.data_ptr(), "training must not move the teacher"


def test_student_of_a_distilled_teacher_keeps_its_projection(loaded):
    teacher = sd_models.create_student(loaded["sd1"].unet, 16, "default")
    student = sd_models.create_student(teacher, 16, "zero")
    assert torch.equal(student.state_dict()[sd_models.COND_PROJ], teacher.state_dict()[sd_models.COND_PROJ])


def lora_unet(loaded, family="sd1", rank=4, alpha=8.0):
    unet = UNet2DConditionModel.from_config(loaded[family].unet.config).requires_grad_(False).eval()
    return unet, sd_models.add_lora(unet, rank, alpha, 0.0, sd_models.LORA_TARGETS)


def train_a_little(unet):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_without_its_adapters_the_network_is_the_base_bit_for_bit(loaded):
    unet = UNet2DConditionModel.from_config(loaded["sd1"].unet.config).eval()
    inputs = macs.unet_inputs(unet.config, 2, 8, tokens=16, generator=torch.Generator().manual_seed(0))
    before = unet(**inputs).sample.detach()
    sd_models.add_lora(unet, 4, 4, 0.0, sd_models.LORA_TARGETS)
    assert torch.equal(unet(**inputs).sample, before), "the second factor starts at zero"
    train_a_little(unet)
    trainable = [name for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    adapted = unet(**inputs).sample.detach()
    assert not torch.allclose(adapted, before)
    with sd_models.adapters_off(unet, True):
        assert torch.equal(unet(**inputs).sample, before)
    assert torch.equal(unet(**inputs).sample, adapted)
    assert [name for name, parameter in unet.named_parameters() if parameter.requires_grad] == trainable
    with pytest.raises(KeyError), sd_models.adapters_off(unet, True):
        raise KeyError
    assert torch.equal(unet(**inputs).sample, adapted), "also after an error"


def test_every_target_module_gets_an_adapter(loaded):
    unet, _ = lora_unet(loaded)
    adapted = {name.split(".lora_A")[0] for name, _ in unet.named_parameters() if ".lora_A" in name}
    for target in sd_models.LORA_TARGETS:
        assert any(name.endswith(target) for name in adapted), target


def test_adapters_stay_float32_while_the_base_is_cast(loaded):
    unet, _ = lora_unet(loaded)
    sd_models.cast_frozen(unet, torch.bfloat16)
    for name, parameter in unet.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_lora_round_trip_through_stock_diffusers_is_exact_with_alpha_unlike_rank(saved, loaded, tmp_path, family):
    pipe = DiffusionPipeline.from_pretrained(saved / family)
    base = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    config = sd_models.add_lora(pipe.unet, 4, 8.0, 0.0, sd_models.LORA_TARGETS)
    train_a_little(pipe.unet)
    inputs = macs.unet_inputs(pipe.unet.config, 2, 8, tokens=16, generator=torch.Generator().manual_seed(0))
    expected = pipe.unet.eval()(**inputs).sample
    sd_export.save_lora(tmp_path, pipe.unet, config, family == "sdxl")
    again = DiffusionPipeline.from_pretrained(saved / family)
    again.load_lora_weights(str(tmp_path))
    assert torch.equal(again.unet.eval()(**inputs).sample, expected)
    again.unload_lora_weights()
    assert all(torch.equal(value, base[name]) for name, value in again.unet.state_dict().items())


def test_unknown_lora_targets_are_refused(loaded):
    unet = UNet2DConditionModel.from_config(loaded["sd1"].unet.config)
    with pytest.raises(UserError, match="--lora_target_modules"):
        sd_models.add_lora(unet, 4, 4, 0.0, ["nonsense"])


@pytest.mark.parametrize("size, count", [("sd15", 67_252_224), ("sdxl", 196_751_360)])
def test_lora_parameter_count_of_the_real_networks(size, count):
    """For SDXL it is that of the file which the authors published."""
    with torch.device("meta"):
        unet = tiny.make_unet(size)
        sd_models.add_lora(unet, 64, 64.0, 0.0, sd_models.LORA_TARGETS)
    assert sum(parameter.numel() for parameter in unet.parameters() if parameter.requires_grad) == count


def test_channels_last_networks_are_saved_and_read_back(loaded, tmp_path):
    unet = sd_models.create_student(loaded["sd1"].unet, 16, "zero")
    sd_models.speed_up(unet, True, False, False, pytest.fail)
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    network_files.save_network(unet, tmp_path, unet.state_dict())
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in again.state_dict().items())


def test_missing_xformers(monkeypatch, loaded):
    said = []
    sd_models.speed_up(loaded["sd1"].unet, False, True, False, said.append)
    assert len(said) == 1 and "scaled_dot_product_attention" in said[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    unet = tiny.make_unet("tiny")

    def missing():
        raise ModuleNotFoundError

    monkeypatch.setattr(unet, "enable_xformers_memory_efficient_attention", missing)
    with pytest.raises(UserError, match="pip install xformers"):
        sd_models.speed_up(unet, False, True, False, said.append)


def test_fingerprints_tell_weights_apart(loaded):
    one, two = tiny.make_vae("tiny"), tiny.make_vae("tiny")
    assert sd_models.fingerprint(one) == sd_models.fingerprint(one) != sd_models.fingerprint(two)
    manifest = sd_models.cache_manifest(loaded["sdxl"], 32)
    assert manifest == sd_models.cache_manifest(loaded["sdxl"], 32) == json.loads(json.dumps(manifest))
    assert manifest["resolution"] == 32 and len(manifest["text_encoders"]) == len(manifest["tokens"]) == 2
    assert manifest["vae"] != sd_models.cache_manifest(loaded["sdxl"]._replace(vae=one), 32)["vae"]
