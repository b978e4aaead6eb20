"""Cached latents: they train to the losses of online encoding, and a cache made with something else is refused."""

import importlib.util
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from PIL import Image

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


def test_processes_that_do_not_know_of_each_other_are_refused(cache, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched"):
        cache()


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

    sample = CachedLatents(pytest.fail)(samples[1], np.random.default_rng(0))
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


def shard_samples(folder):
    """The samples of every shard of a cache, without the manifests."""
    raws = [raw for path in sorted(folder.glob("*.tar")) for raw in data.read_shard(str(path))]
    return [raw for raw in raws if raw["__key__"] != "__manifest__"]


def test_cache_holds_the_captions_and_the_facts_of_each_cut(cache):
    for family in ("sd1", "sdxl"):
        raws = shard_samples(cache(family, "--random_flip")[0])
        assert len(raws) == 32 and {raw["txt"] for raw in raws} == {tiny.CAPTION.encode()}
        facts = [json.loads(raw["json"]) for raw in raws]
        assert all(set(fact) == {"original_size", "crop_top_left", "flipped"} for fact in facts)
        assert {tuple(fact["original_size"]) for fact in facts} == {(40, 48)}
        assert {tuple(fact["crop_top_left"]) for fact in facts} == {(0, 3)}, "scaled to 32 x 38, cut at the centre"
        assert {fact["flipped"] for fact in facts} == {True, False}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_cache_of_captions_alone_trains_like_online_encoding(family, cache, run_main, monkeypatch):
    folder, cached = cache(family, "--text_embeddings", "False")
    raws = shard_samples(folder)
    wanted = {"__key__", "latent.npy", "txt", "json"} | ({"time_ids.npy"} if family == "sdxl" else set())
    assert len(raws) == 32 and all(set(raw) == wanted for raw in raws)
    flags = ("--max_train_steps=4", "--proportion_empty_prompts=0.5")
    online = run_main(*flags, "--center_crop", family=family).rows
    with monkeypatch.context() as patched:
        patched.setattr(AutoencoderKL, "encode", pytest.fail)
        offline = run_main(*flags, f"--cached_latents={cached}", family=family).rows
    assert [row["step"] for row in online] == [row["step"] for row in offline] == [1, 2, 3, 4]
    # the cache is float16
    np.testing.assert_allclose([row["loss"] for row in online], [row["loss"] for row in offline], rtol=2e-3)


def test_captions_and_embeddings_of_a_cache_train_alike(cache, run_main):
    runs = [run_main("--max_train_steps=4", f"--precomputed_shards={cache('sd1', *flags)[1]}").rows
            for flags in ((), ("--text_embeddings=False",))]  # fmt: skip
    np.testing.assert_allclose(*([row["loss"] for row in rows] for rows in runs), rtol=2e-3)


def precompute_from(models, out, *flags):
    """Samples of a cache made of another source."""
    precompute.main(["--pretrained_teacher_model", str(models["sd1"]), "--output_dir", str(out), "--resolution=32",
                     "--cache_dir", str(out.parent / "cache"), *map(str, flags)])  # fmt: skip
    return shard_samples(out)


def test_a_second_run_into_the_same_folder_leaves_no_shard_of_the_first(cache, models, shards, tmp_path, capsys):
    flags = ("--center_crop", f"--train_shards_path_or_url={shards}")
    long, other = tmp_path / "cache", tmp_path / "one.tar"
    precompute_from(models, long, *flags, "--samples_per_shard=8")
    with tarfile.open(other, "w") as tar:
        precompute.add_file(tar, "a.txt", b"a caption")
        picture = io.BytesIO()
        Image.new("RGB", (40, 40)).save(picture, "png")
        precompute.add_file(tar, "a.png", picture.getvalue())
    assert len(list(long.glob("*.tar"))) == 4
    raws = precompute_from(models, long, f"--train_shards_path_or_url={other}")
    assert len(raws) == 1 and len(list(long.glob("*.tar"))) == 1
    assert "4 shards of an earlier run" in capsys.readouterr().out


def make_dataset(folder):
    """Five pictures with a caption, another one, and a list of them."""
    features = datasets.Features({
        "picture": datasets.Image(), "image": datasets.Image(), "text": datasets.Value("string"),
        "alt": datasets.Value("string"), "many": datasets.List(datasets.Value("string")),
    })  # fmt: skip
    images = [tiny.random_image(np.random.default_rng(n), 40, 48) for n in range(5)]
    rows = {"picture": images, "image": images[::-1], "text": [f"number {n}" for n in range(5)],
            "alt": [f"alt {n}" for n in range(5)], "many": [[f"a {n}", f"b {n}"] for n in range(5)]}  # fmt: skip
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
    return folder


def test_a_dataset_is_encoded_with_the_columns_that_are_chosen(models, tmp_path):
    saved = make_dataset(tmp_path / "saved")
    plain = precompute_from(models, tmp_path / "plain", f"--dataset_name={saved}", "--center_crop")
    assert [raw["txt"].decode() for raw in plain] == [f"number {n}" for n in range(5)]
    chosen = precompute_from(models, tmp_path / "chosen", f"--dataset_name={saved}", "--center_crop",
                             "--image_column=picture", "--caption_column=alt")  # fmt: skip
    assert [raw["txt"].decode() for raw in chosen] == [f"alt {n}" for n in range(5)]
    # batches of one size, so that equal pictures give equal bytes
    assert [raw["latent.npy"] for raw in chosen] == [raw["latent.npy"] for raw in plain[::-1]]
    many = precompute_from(models, tmp_path / "many", f"--dataset_name={saved}", "--caption_column=many", "--copies=8")
    drawn = [raw["txt"].decode() for raw in many]
    assert len(drawn) == 40 and set(drawn) == {f"{letter} {n}" for n in range(5) for letter in "ab"}
    with pytest.raises(UserError, match="--caption_column gone is no column"):
        precompute_from(models, tmp_path / "none", f"--dataset_name={saved}", "--caption_column=gone")


def test_a_folders_metadata_columns_can_be_chosen(models, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        tiny.random_image(np.random.default_rng(number), 40, 48).save(folder / f"{number}.png")
    rows = [{"name": f"{n}.png", "alt": f"alt {n}", "text": "no"} for n in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    raws = precompute_from(models, tmp_path / "out", f"--train_data_dir={folder}", "--image_column=name",
                           "--caption_column=alt")  # fmt: skip
    assert [raw["txt"].decode() for raw in raws] == ["alt 0", "alt 1"]


def test_filters_leave_out_small_and_marked_images(models, tmp_path, capsys):
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for number, (size, mark) in enumerate(((64, 0.0), (64, 0.9), (40, 0.0), (64, None), (40, 0.9))):
            picture = io.BytesIO()
            Image.new("RGB", (size, size), (number * 50, 0, 0)).save(picture, format="PNG")
            facts = json.dumps({} if mark is None else {"pwatermark": mark}).encode()
            for suffix, content in (("png", picture.getvalue()), ("txt", str(number).encode()), ("json", facts)):
                precompute.add_file(tar, f"{number}.{suffix}", content)

    def kept(*flags):
        out = tmp_path / f"out-{len(flags)}-{'-'.join(flags)}"
        raws = precompute_from(models, out, f"--train_shards_path_or_url={tmp_path / 'mixed.tar'}", *flags)
        return [int(raw["txt"]) for raw in raws]

    assert kept() == [0, 1, 2, 3, 4]
    assert kept("--wds_min_size=50") == [0, 1, 3]
    assert "3 samples written" in capsys.readouterr().out.splitlines()[-1]
    assert kept("--wds_max_pwatermark=0") == [0, 2, 3], "a watermark probability of 0.0 must pass"
    assert kept("--wds_min_size=50", "--wds_max_pwatermark=0.5") == [0, 3]
    said = capsys.readouterr().out.splitlines()[-1]
    assert "3 skipped" in said and "smaller than the minimum size" in said and "pwatermark above the limit" in said


@pytest.mark.parametrize(
    "flags", [(), ("--dataset_name=a", "--train_data_dir=b"), ("--train_shards_path_or_url=a", "--dataset_name=b")]
)
def test_one_source_must_be_given(flags):
    with pytest.raises(UserError, match="give one of --train_shards_path_or_url, --train_data_dir, --dataset_name"):
        precompute.parse_args(["--pretrained_teacher_model=x", "--output_dir=y", *flags])


def test_a_source_on_the_command_line_replaces_the_one_of_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text("dataset_name: a\nresolution: 64\npretrained_model_name_or_path: t\n")
    args = precompute.parse_args([f"--config={tmp_path}/c.yaml", "--train_data_dir=b", "--output_dir=y"])
    assert (args.dataset_name, args.train_data_dir, args.resolution) == (None, "b", 64)
    assert args.pretrained_teacher_model == "t"
