"""From flags to models: every data set and backend resolves, what is missing is said in one sentence."""

import json
import shutil

import pickles
import pytest
import tiny_pipelines
import torch
from safetensors.torch import load_file, save_file

from brisk import denoiser_sources, denoisers, edm_nets, epd_options, fpdm, tiny
from brisk.denoiser_sources import ModelOptions, family_of, load
from brisk.options import UserError

pytestmark = pytest.mark.quick
EDM = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
       "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
PIPELINES = ("adm", "adm_classes", "cm", "ldm", "dit", "fpdm", "pixart", "sd1", "sdxl", "sd3", "flux")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("FLUX_MODEL_PATH", raising=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a pipeline folder of every family."""
    folder = tmp_path_factory.mktemp("pipelines")
    for family in PIPELINES:
        tiny_pipelines.make(family).save_pretrained(folder / family)
    return folder


def refused(wanted, words):
    with pytest.raises(UserError) as caught:
        load(wanted)
    message = str(caught.value)
    assert words in message and "\n" not in message, message


def assert_same(one, other):
    """Two denoisers of the same weights: the same directions."""
    assert (one.family, one.shape, one.resolution) == (other.family, other.shape, other.resolution)
    given = {"prompts": ["a cat"] * 2, "classes": torch.tensor([1, 4]), None: None}[one.takes]
    x, sigma = torch.randn(2, *one.shape), torch.tensor([0.9, 0.1])
    with torch.no_grad():
        found = [denoisers.direction_for(denoiser, given, 2)(x, sigma) for denoiser in (one, other)]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("family", PIPELINES)
def test_pipeline_folders_are_told_apart_and_frozen(saved, family):
    side = 16 if family == "flux" else None
    denoiser = load(ModelOptions(source=str(saved / family), resolution=side))
    assert_same(denoiser, denoiser_sources.from_pipeline(tiny_pipelines.make(family), None, side))
    assert not any(weight.requires_grad for weight in denoiser.network.parameters())
    half = load(ModelOptions(source=str(saved / family), resolution=side), dtype=torch.bfloat16)
    assert half.network.dtype == torch.bfloat16
    with torch.no_grad():
        assert half.decode(torch.randn(1, *half.shape)).dtype == torch.float32  # decoding stays in float32
    assert load(ModelOptions(source=str(saved / family), backend=denoiser.family, resolution=side)).family == denoiser.family


def test_families_of_data_sets_and_backends():
    assert {name: family_of(name) for name in epd_options.DATASETS} == {
        "cifar10": "edm", "ffhq": "edm", "afhqv2": "edm", "imagenet64": "edm", "lsun_bedroom": "cm", "lsun_cat": "cm",
        "imagenet256": "adm", "lsun_bedroom_ldm": "ldm", "ms_coco": "sd"}  # fmt: skip
    assert family_of("ms_coco", "ldm") == "sd"  # as published predictors say
    assert (family_of("ms_coco", "sd3"), family_of("lsun_bedroom_ldm", "ldm"), family_of("mine", "dit")) == ("sd3", "ldm", "dit")
    assert family_of() is None and family_of("mine") is None
    assert all(family_of(None, backend) == backend for backend in epd_options.BACKENDS)


@pytest.mark.parametrize("name, words", [
    ("cifar10", "edm-cifar10-32x32-uncond-vp.pkl"), ("ffhq", "edm-ffhq-64x64-uncond-vp.pkl"),
    ("afhqv2", "edm-afhqv2-64x64-uncond-vp.pkl"), ("imagenet64", "edm-imagenet-64x64-cond-adm.pkl"),
    ("lsun_bedroom", "edm_bedroom256_ema.pt"), ("lsun_cat", "edm_cat256_ema.pt"), ("imagenet256", "256x256_diffusion.pt"),
    ("lsun_bedroom_ldm", "scripts/conversion_ldm_uncond.py"), ("ms_coco", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
])  # fmt: skip
def test_a_missing_model_is_named(name, words):
    refused(ModelOptions(dataset_name=name), words)
    refused(ModelOptions(dataset_name=name), "--pretrained_model_name_or_path")


def test_backends_have_their_hub_models(monkeypatch, saved):
    refused(ModelOptions(backend="sd3"), "stabilityai/stable-diffusion-3-medium-diffusers is neither a pipeline folder nor")
    refused(ModelOptions(backend="flux"), "black-forest-labs/FLUX.1-dev is neither a pipeline folder nor a hub model")
    refused(ModelOptions(dataset_name="ms_coco", backend="ldm"), "stable-diffusion-v1-5/stable-diffusion-v1-5")
    monkeypatch.setenv("FLUX_MODEL_PATH", str(saved / "flux"))
    assert load(ModelOptions(backend="flux", resolution=16)).family == "flux"
    for wanted in (ModelOptions(), ModelOptions(backend="dit"), ModelOptions("mine"), ModelOptions("cifar10", "adm")):
        refused(wanted, "give the model as --pretrained_model_name_or_path")


def test_contradictions_and_wrong_places_are_one_sentence(saved, tmp_path):
    refused(ModelOptions("lsun_bedroom_ldm", None, str(saved / "sd1")), "is a model of family sd; --backend")
    refused(ModelOptions(None, "adm", str(saved / "ldm")), "the predictor ask for one of family adm")
    refused(ModelOptions("ms_coco", "flux", str(saved / "sd3")), "is a model of family sd3; --backend")
    refused(ModelOptions(source=str(tmp_path / "none")), "is no such folder")
    refused(ModelOptions(source="owner/none"), "neither a pipeline folder nor a hub model that can be reached")
    refused(ModelOptions(source=str(tmp_path)), "holds neither a model_index.json nor a network's config.json")
    (tmp_path / "bksdm_report.json").write_text("{}")
    refused(ModelOptions(source=str(tmp_path)), "network's config.json; train the student with --save_pipeline")
    refused(ModelOptions(backend="edm", source=str(tmp_path)), "holds no EDM network")
    refused(ModelOptions(backend="edm", source=str(tmp_path / "x.pkl")), "is neither the .pkl of an EDM network nor a folder")
    broken = shutil.copytree(saved / "sd1", tmp_path / "sd1")
    weights = load_file(broken / "unet/diffusion_pytorch_model.safetensors")
    del weights["conv_in.weight"]
    save_file(weights, broken / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    refused(ModelOptions(source=str(broken)), "lacks 1 weights of its config: conv_in.weight")
    broken = shutil.copytree(saved / "sd3", tmp_path / "sd3")
    shutil.rmtree(broken / "text_encoder_2")
    refused(ModelOptions(source=str(broken)), f"{broken} cannot be loaded")
    broken = shutil.copytree(saved / "dit", tmp_path / "dit")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "WanTransformer3DModel"]}))
    refused(ModelOptions(source=str(broken)), "with a WanTransformer3DModel, which is not supported; supported are UNet2DModel")


def edm_folder(folder, config):
    folder.mkdir()
    network = edm_nets.make_network(config)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), folder / "model.safetensors")
    return network


def test_edm_networks_load_from_pickles_and_folders(tmp_path):
    network = edm_folder(tmp_path / "edm", EDM)
    network._init_args, network._init_kwargs = (), dict(EDM)
    pickles.dump({"ema": network}, tmp_path / "net.pkl")
    for wanted in (ModelOptions("cifar10", None, str(tmp_path / "net.pkl")), ModelOptions("cifar10", None, str(tmp_path / "edm")),
                   ModelOptions(source=str(tmp_path / "net.pkl")), ModelOptions(source=str(tmp_path / "edm"))):  # fmt: skip
        denoiser = load(wanted)
        assert (denoiser.family, denoiser.shape, denoiser.resolution) == ("edm", (3, 8, 8), 8)
        assert (denoiser.sigma_min, denoiser.sigma_max) == (0.002, 80.0)
        x, sigma = torch.randn(2, 3, 8, 8), torch.tensor([0.1, 20.0])
        with torch.no_grad():
            torch.testing.assert_close(denoiser.direction(x, sigma, None), network.direction(x, sigma))
    refused(ModelOptions(source=str(tmp_path / "edm"), resolution=16), "--resolution 16 cannot be had, the model draws 8 pixels")
    (tmp_path / "edm/config.json").write_text(json.dumps(EDM | {"model_channels": 16}))
    refused(ModelOptions(source=str(tmp_path / "edm")), "size mismatch")


def test_networks_without_a_pipeline(tmp_path):
    for family in ("adm", "cm"):
        pipe = tiny_pipelines.make(family)
        pipe.unet.save_pretrained(tmp_path / family)
        wanted = ModelOptions(None, family, str(tmp_path / family), clip_denoised=False)
        assert_same(load(wanted), denoiser_sources.from_pipeline(pipe))
        refused(ModelOptions(source=str(tmp_path / family)), "is a U-Net without a pipeline: say by --backend adm or cm")
    dit = tiny_pipelines.make("dit")
    dit.transformer.save_pretrained(tmp_path / "dit")
    bare = load(ModelOptions(source=str(tmp_path / "dit"), resolution=64))  # without a VAE, latents are held to be an eighth
    assert bare.shape == denoiser_sources.from_pipeline(dit).shape
    x, sigma = torch.randn(1, *bare.shape), torch.tensor([2.0])
    with torch.no_grad():
        expected = denoisers.direction_for(denoiser_sources.from_pipeline(dit), torch.tensor([3]), 1)(x, sigma)
        torch.testing.assert_close(denoisers.direction_for(bare, torch.tensor([3]), 1)(x, sigma), expected)


@pytest.mark.parametrize("family", ["fpdm", "fpdm_flow"])
def test_runs_of_train_fpdm(tmp_path, family):
    pipe = tiny_pipelines.make(family)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    wanted = ModelOptions(source=str(tmp_path))
    assert_same(load(wanted), denoiser_sources.from_pipeline(pipe))
    assert load(wanted, dtype=torch.bfloat16).network.dtype == torch.bfloat16
    with pytest.raises(UserError, match="has no VAE"):
        load(wanted).decode(torch.zeros(1, 4, 4, 4))
    tiny.make_vae("tiny").save_pretrained(tmp_path / "vae")
    assert load(wanted).decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 16, 16)
    fpdm.save_pipeline(tmp_path / "whole", tiny_pipelines.fpdm_pipeline().transformer, tiny.make_vae("tiny"))
    assert load(ModelOptions(source=str(tmp_path / "whole"), backend="dit")).family == "dit"
    refused(ModelOptions(source=str(tmp_path), backend="sd"), "the predictor ask for one of family sd")


def test_mixtures_and_their_flags(tmp_path):
    file = tmp_path / "gmm.json"
    file.write_text(json.dumps({"shape": [1, 1, 2], "means": [[0, 1], [2, 3]], "stds": [1, 1], "weights": [1, 1]}))
    for wanted in (ModelOptions(gmm_file=str(file)), ModelOptions("cifar10", "gmm", gmm_file=str(file))):
        assert load(wanted).family == "gmm"
    refused(ModelOptions(backend="gmm"), "--gmm_file and --backend gmm belong together")
    refused(ModelOptions(backend="sd", gmm_file=str(file)), "--gmm_file and --backend gmm belong together")
    refused(ModelOptions(source="somewhere", gmm_file=str(file)), "--gmm_file and --pretrained_model_name_or_path are two models")


def test_a_classifier_is_what_the_function_returns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "def make():\n    return lambda inputs, time: inputs.flatten(1)[:, :2]\nsize = 3\nnone = print\n"
    (tmp_path / "judge_of_sources.py").write_text(code)
    found = denoiser_sources.load_classifier("judge_of_sources:make")
    assert found(torch.ones(2, 3, 1, 1), None).shape == (2, 2)
    network = denoiser_sources.load_classifier("torch.nn:Identity", "meta")
    assert isinstance(network, torch.nn.Identity) and not network.training
    for function in ("other", "size", "none", ""):
        with pytest.raises(UserError, match="--classifier"):
            denoiser_sources.load_classifier(f"judge_of_sources:{function}")
    for name in ("no_module:make", "judge_of_sources", ":make"):
        with pytest.raises(UserError, match="--classifier"):
            denoiser_sources.load_classifier(name)
