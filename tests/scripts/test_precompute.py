"""Cached latents: they train to the losses of online encoding, and a cache made with something else is refused."""

import importlib.util
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT

from brisk import data, tiny
from brisk.options import UserError

SPEC = importlib.util.spec_from_file_location("precompute_latents", ROOT / "scripts/precompute_latents.py")
precompute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(precompute)


@pytest.fixture(scope="module")
def cache(models, shards, tmp_path_factory):
    """A function: family, flags -> (folder, brace list) of a fresh cache of the synthetic shards, cut at the centre."""

    def make(family="sd1", *flags):
        folder = tmp_path_factory.mktemp("cache")
        precompute.main(["--pretrained_teacher_model", str(models[family]), "--train_shards_path_or_url", str(shards),
                         "--output_dir", str(folder), "--resolution", "32", "--center_crop", "--samples_per_shard", "16",
                         "--batch_size", "5", *flags])  # fmt: skip
        return folder, f"{folder}/latents-00-{{00000..00001}}.tar"

    return make


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_cached_and_online_runs_have_the_same_losses(family, cache, shards, run_main):
    _, cached = cache(family)
    online = run_main("--max_train_steps=4", "--center_crop", family=family).rows
    offline = run_main("--max_train_steps=4", f"--precomputed_shards={cached}", family=family).rows
    assert [row["step"] for row in online] == [row["step"] for row in offline] == [1, 2, 3, 4]
    # the cache is float16
    np.testing.assert_allclose([row["loss"] for row in online], [row["loss"] for row in offline], rtol=2e-3)


def test_cache_holds_half_precision_moments_and_sizes(cache):
    folder, cached = cache("sdxl")
    assert sorted(path.name for path in folder.iterdir()) == ["latents-00-00000.tar", "latents-00-00001.tar"]
    samples = [raw for url in data.expand_shards(cached) for raw in data.read_shard(url)]
    assert [raw["__key__"] for raw in samples].count("__manifest__") == 2
    from brisk.samples import CachedLatents

    sample = CachedLatents(None)(samples[1], np.random.default_rng(0))
    assert sample["moments"].shape == (2, 4, 8, 8) and sample["moments"].dtype == torch.float16
    assert sample["prompt_embeds"].shape == (16, 64) and sample["pooled"].shape == (32,)
    # original (height, width), crop (top, left), target: the pictures are 40 high and 48 wide, scaled to 32 x 38
    assert sample["time_ids"].tolist() == [40, 48, 0, 3, 32, 32]


def test_copies_store_different_crops(cache, models, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        tiny.random_image(rng, 40, 80).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a")
    out = tmp_path / "out"
    precompute.main(["--pretrained_teacher_model", str(models["sd1"]), "--train_data_dir", str(tmp_path),
                     "--output_dir", str(out), "--resolution", "32", "--copies", "3"])  # fmt: skip
    raws = [raw for raw in data.read_shard(str(out / "latents-00-00000.tar"))][1:]
    assert len(raws) == 9
    assert len({raw["latent.npy"] for raw in raws}) > 3


def test_stale_cache_is_refused_before_training(cache, run_main, models, tmp_path):
    _, cached = cache("sd1")
    with pytest.raises(UserError, match="stale.*resolution 32 instead of 64"):
        run_main(f"--precomputed_shards={cached}", "--resolution=64")
    other = tiny.make_pipeline("sd1", seed=5)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="stale.*vae"):
        run_main(f"--precomputed_shards={cached}", f"--pretrained_vae_model_name_or_path={tmp_path / 'other'}")


def test_shard_of_another_cache_among_good_ones_is_refused(cache, run_main):
    folder, cached = cache("sd1")
    stale = folder / "latents-00-00001.tar"
    with tarfile.open(stale, "w") as tar:
        precompute.add_file(tar, "__manifest__.json", json.dumps({"resolution": 8}).encode())
    with pytest.raises(UserError, match="stale"):
        run_main(f"--precomputed_shards={cached}", "--max_train_steps=40")


def test_shards_of_images_are_no_cache(shards, run_main):
    with pytest.raises(UserError, match="holds no manifest"):
        run_main(f"--precomputed_shards={shards}")


def test_nothing_usable_is_an_error(models, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="0 of 1 samples usable"):
        precompute.main(["--pretrained_teacher_model", str(models["sd1"]), "--train_data_dir", str(tmp_path),
                         "--output_dir", str(tmp_path / "out"), "--resolution", "32"])  # fmt: skip
