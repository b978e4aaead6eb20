"""make_tiny_teacher.py as users call it: a handful of steps, shards, and bad input."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from brisk import handwriting, tiny
from brisk.handwriting_teacher import all_captions, build_tokenizer, tokenize
from brisk.scorers import load_oracle

FEW_STEPS = [f"--{name}={value}" for name, value in {
    "oracle_steps": 3, "vae_steps": 3, "text_steps": 3, "unet_steps": 3,
    "batch_size": 8, "cached_images": 40, "samples": 64,
}.items()]  # fmt: skip


@pytest.fixture(scope="module")
def call(warm):
    """A function: the finished process of make_tiny_teacher.py with the given arguments."""

    def run(*arguments):
        command = [warm.python, ROOT / "scripts/make_tiny_teacher.py", *map(str, arguments)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def trained(call, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    # An older result stands in the way and has to give way.
    (folder / "teacher").mkdir()
    (folder / "teacher" / "model_index.json").write_text("{}")
    (folder / "teacher" / "old.txt").write_text("old")
    result = call("--output_dir", folder / "teacher", *FEW_STEPS)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


def test_result_loads_as_a_stock_pipeline_and_samples(trained):
    assert sorted(path.name for path in trained.iterdir()) == ["handwriting-oracle", "teacher"]
    assert not (trained / "teacher" / "old.txt").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "teacher")
    prompts = ["a red handwritten seven on a yellow background", "Übergrößen 12!"]
    images = pipeline(prompts, guidance_scale=3.0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()


def test_weights_are_float16_values_and_load_in_float32(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "teacher")
    for name in ("unet", "vae", "text_encoder"):
        part = getattr(pipeline, name)
        assert part.dtype == torch.float32
        for key, value in part.state_dict().items():
            assert value.isfinite().all() and torch.equal(value, value.half().float()), f"{name} {key}"
    for name in ("unet", "vae"):
        saved = load_file(trained / "teacher" / name / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in saved.values()} == {torch.float16}
    assert load_oracle(trained / "handwriting-oracle").config["feature_dim"] <= 64


def test_latents_have_unit_deviation(trained):
    vae = StableDiffusionPipeline.from_pretrained(trained / "teacher").vae
    with torch.no_grad():
        latents = vae.encode(handwriting.draw("train", 200, seed=3)["images"]).latent_dist.sample()
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=0.1)


def test_card_and_report_hold_the_figures(trained):
    report = json.loads((trained / "teacher" / "report.json").read_text())
    assert list(report["ddim"]) == ["50", "20", "10", "4", "2", "1"]
    for figures in report["ddim"].values():
        assert 0 <= figures["all"] <= figures["digit"] <= 1 and figures["frechet"] >= 0
    card = (trained / "teacher" / "README.md").read_text()
    assert "--unet_steps 3" in card and "CC BY 4.0" in card
    assert f"| 50 | {report['ddim']['50']['digit']:.3f} |" in card


def test_words_of_captions_are_single_tokens_and_other_text_is_split():
    tokenizer = build_tokenizer()
    tokens = tokenize(tokenizer, all_captions())
    # Begin, eight words, and padding with the end token.
    assert ((tokens != tokenizer.eos_token_id).sum(dim=1) == 9).all()
    assert len({tuple(row) for row in tokens.tolist()}) == len(all_captions())
    assert tokenizer.tokenize("cat") == ["c", "a", "t</w>"]
    assert tokenizer.unk_token_id not in tokenizer("Übergrößen 12!", add_special_tokens=False).input_ids


def test_shards_are_written_alone_and_reproducibly(call, tmp_path):
    for name in ("a", "b"):
        result = call("--shards", tmp_path / name, "--copies", 1, "--samples_per_shard", 800)
        assert result.returncode == 0, result.stderr[-2000:]
    first, again = (sorted((tmp_path / name).iterdir()) for name in ("a", "b"))
    assert [path.name for path in first] == ["handwriting-00000.tar", "handwriting-00001.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_random_teacher_and_shards_are_written_in_place_of_older_ones(tmp_path, capsys):
    sys.path.insert(0, str(ROOT / "scripts"))
    import make_tiny_teacher

    (tmp_path / "run").mkdir()
    for family in ("toy_sdxl", "toy_sd1"):
        make_tiny_teacher.main(["--random", family, "--output_dir", str(tmp_path)])
        assert family in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shards", "teacher"]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert pipeline("a red square", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 32, 32)
    expected = tiny.make_pipeline("toy_sd1").unet.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipeline.unet.state_dict().items())
    assert [path.name for path in sorted((tmp_path / "shards").iterdir())] == [
        "synthetic-00000.tar", "synthetic-00001.tar"]  # fmt: skip


def test_bad_input_is_one_sentence_and_touches_nothing(call, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for arguments, message in (
        ([], "give one of --shards and --output_dir"),
        (["--shards", "x", "--output_dir", "y"], "give one of --shards and --output_dir"),
        (["--shards", tmp_path / "x", "--copies", 57], "at most 56"),
        (["--output_dir", tmp_path / "x", "--unet_steps", 0], "at least 1"),
        (["--output_dir", tmp_path], "holds other files"),
        (["--output_dir", tmp_path / "x", "--oracle_dir", tmp_path], "holds other files"),
        (["--shards", tmp_path / "notes.txt"], "is a file"),
        (["--random", "toy_sd1", "--shards", tmp_path / "x"], "give it --output_dir"),
        (["--random", "sd3", "--output_dir", tmp_path / "x"], "invalid choice"),
    ):
        result = call(*arguments)
        assert result.returncode == 2 and message in result.stderr, (arguments, result.stderr)
        assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
