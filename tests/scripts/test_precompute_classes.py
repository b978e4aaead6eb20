"""Latents of an image folder with classes: three formats, mirror images, processes, killed and taken up again."""

import contextlib
import importlib.util
import json
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from brisk import class_images, data, latent_files, latents, sd_inputs, sd_models, seeding, tiny
from brisk.options import UserError

SPEC = importlib.util.spec_from_file_location("precompute_latents", ROOT / "scripts/precompute_latents.py")
precompute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(precompute)

SIZE, SIDE, IMAGES = 32, 8, 11  # image 7 is broken
KEPT = [number for number in range(IMAGES) if number != 7]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a tiny VAE."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    tiny.make_vae("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of pictures of several sizes: ant/00 ... ant/04, bee/05 ... bee/10."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        path = folder / ("ant" if number < 5 else "bee") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        tiny.random_image(np.random.default_rng(number), 36 + 9 * number, 48).save(path)
    (folder / "bee/07.png").write_bytes(b"broken")
    return folder


def run(vae, images, output, output_format, *flags):
    """`precompute` with parts of three images, encoded two at a time."""
    precompute.main([f"--vae={vae}", f"--train_data_dir={images}", f"--output_dir={output}", "--class_labels",
                     f"--resolution={SIZE}", "--samples_per_shard=6", "--batch_size=2", f"--output_format={output_format}",
                     "--features_name=set", *flags])  # fmt: skip
    return output


def wanted(folder, **changes):
    given = {"feature_path": str(folder), "dataset_name": "set", "in_channels": 4, "sample_size": SIDE, "num_classes": 2,
             "label_type": "class", "image_size": SIZE, "random_flip": False, "num_workers": 0}  # fmt: skip
    missing = dict.fromkeys(set(latents.LatentOptions._fields) - set(given))
    return latents.LatentOptions(**{**missing, **given, **changes})


def contents(folder):
    """{relative name: bytes} of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def encoded(vae, images):
    """{(image number, mirrored): (mean, std)}, encoded one by one."""
    network = sd_models.load_network(type(tiny.make_vae("tiny")), vae, "vae")
    found = {}
    for number in KEPT:
        path = images / ("ant" if number < 5 else "bee") / f"{number:02d}.png"
        square = np.array(class_images.adm_crop(Image.open(path), SIZE)).astype(np.float32)
        for mirrored in (False, True):
            pixels = torch.from_numpy(square[:, ::-1].copy() if mirrored else square)
            posterior = network.encode(pixels.permute(2, 0, 1)[None] / 127.5 - 1).latent_dist
            found[number, mirrored] = posterior.mean[0], posterior.std[0]
    return found


def test_arrays_hold_each_image_and_its_mirror_image(vae, images, tmp_path, capsys):
    folder = run(vae, images, tmp_path / "out", "arrays")
    assert "20 samples of 2 classes written" in (said := capsys.readouterr().out) and "1 x unreadable image" in said
    stored, labels, expected = np.load(folder / "latents.npy"), np.load(folder / "labels.npy"), encoded(vae, images)
    assert stored.shape == (20, 8, SIDE, SIDE) and stored.dtype == np.float16 and labels.dtype == np.int64
    assert labels.tolist() == [0] * 10 + [1] * 10
    for row, (mean, std) in zip(stored, expected.values(), strict=True):
        np.testing.assert_allclose(row[:4], mean, atol=2e-3)
        np.testing.assert_allclose(row[4:], std, rtol=2e-3, atol=1e-4)
    facts = json.loads((folder / "manifest.json").read_text())
    assert facts.pop("vae") == sd_models.fingerprint(sd_models.load_network(type(tiny.make_vae("tiny")), vae, "vae"))
    assert facts == {"size": SIZE, "scaling_factor": 0.5, "vae_name": str(vae), "latents": "moments", "mirror": True,
                     "classes": ["ant", "bee"], "count": 20}  # fmt: skip


def test_features_are_a_scaled_sample_each_in_the_official_layout(vae, images, tmp_path):
    folder = run(vae, images, tmp_path / "out", "features", "--seed=5")
    expected = encoded(vae, images)
    stems = sorted(path.stem for path in (folder / "set_features").iterdir())
    assert stems == sorted(path.stem for path in (folder / "set_labels").iterdir())
    assert [int(stem) for stem in stems] == [2 * n + mirrored for n in KEPT for mirrored in (0, 1)]
    for stem in stems:
        number, mirrored = divmod(int(stem), 2)
        mean, std = expected[number, bool(mirrored)]
        noise = torch.randn(mean.shape, generator=seeding.generator(5, "feature", int(stem)))
        stored, label = np.load(folder / f"set_features/{stem}.npy"), np.load(folder / f"set_labels/{stem}.npy")
        assert stored.shape == (1, 4, SIDE, SIDE) and stored.dtype == np.float32
        assert label.tolist() == [int(number >= 5)] and label.dtype == np.int64
        np.testing.assert_allclose(stored[0], (mean + std * noise) * 0.5, atol=1e-4)


def test_shards_hold_the_moments_in_a_mixed_order(vae, images, tmp_path):
    folder = run(vae, images, tmp_path / "out", "shards")
    assert sorted(path.name for path in folder.glob("*.tar")) == [f"latents-{n:05d}.tar" for n in range(4)]
    raws = [raw for path in sorted(folder.glob("*.tar")) for raw in data.read_shard(str(path))]
    assert [raw["__key__"] for raw in raws].count("__manifest__") == 4
    labels = [int(raw["cls"]) for raw in raws if "cls" in raw]
    assert labels.count(0) == labels.count(1) == 10 and labels != sorted(labels), "blocks of one class shuffle badly"
    arrays = np.load(run(vae, images, tmp_path / "arrays", "arrays") / "latents.npy")
    stored = {np.load(latent_files.io.BytesIO(raw["latent.npy"])).tobytes() for raw in raws if "cls" in raw}
    for array in arrays:  # batches of other images round differently
        assert min(np.abs(np.frombuffer(one, np.float16) - array.flatten()).max() for one in stored) < 4e-3


@pytest.mark.parametrize("output_format", latent_files.FORMATS)
def test_what_is_written_is_what_training_reads(vae, images, tmp_path, output_format):
    options = wanted(run(vae, images, tmp_path / "out", output_format))
    rows = latents.open_rows(options, pytest.fail)
    facts = latents.read_facts(options, rows)
    assert (latents.epoch_size(facts, rows), facts["scaling_factor"], facts["classes"]) == (20, 0.5, ["ant", "bee"])
    accelerator = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    batches = latents.open_batches(options, rows, 5, accelerator, 0, data.start_position(), pytest.fail)
    expected, seen = encoded(vae, images), []
    for _ in range(30 if output_format == "shards" else 4):  # a stream shuffles several passes together
        batch = next(batches)
        kind = "latents" if output_format == "features" else "moments"
        assert set(batch) == {kind, "labels"}
        for row, label in zip(batch[kind].float(), batch["labels"].tolist(), strict=True):
            if kind == "moments":
                key = min(expected, key=lambda key: (row[0] - expected[key][0]).abs().max())
                assert (row[0] - expected[key][0]).abs().max() < 2e-3 and label == int(key[0] >= 5)
                seen.append(key)
    assert kind == "latents" or len(set(seen)) == 20
    clean = sd_inputs.sample_latents(batch, None, facts["scaling_factor"], 1, torch.Generator().manual_seed(0))
    assert clean.shape == (5, 4, SIDE, SIDE) and clean.dtype == torch.float32
    with pytest.raises(UserError, match="images of 32 pixels; --image_size is 64"):
        latents.open_rows(options._replace(image_size=64), print)


@pytest.mark.parametrize(
    "output_format, renames",
    # of 4 parts: settings, per part files and record, at the end labels and latents of arrays, manifest
    [("shards", (1, 2, 5, 10)), ("arrays", (1, 5, 9, 10, 11, 12)), ("features", (1, 2, 15, 46))],
)
def test_a_killed_run_goes_on_to_the_same_bytes(vae, images, tmp_path, monkeypatch, output_format, renames):
    whole = contents(run(vae, images, tmp_path / "whole", output_format))
    replace = latent_files.os.replace
    for stop_at in renames:
        output, left = tmp_path / f"killed-{stop_at}", iter(range(1, stop_at))

        def killed(*paths, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(*paths)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(latent_files.os, "replace", killed)
            run(vae, images, output, output_format)
        times = {path: path.stat().st_mtime_ns for path in (output / ".parts").glob("0*.json")}
        assert contents(run(vae, images, output, output_format)) == whole
        assert times == {path: path.stat().st_mtime_ns for path in times}, "finished parts are left alone"


def test_a_finished_run_encodes_nothing_again(vae, images, tmp_path, monkeypatch, capsys):
    before = contents(run(vae, images, tmp_path, "arrays"))
    monkeypatch.setattr(precompute, "encode_classes", pytest.fail)
    capsys.readouterr()
    assert contents(run(vae, images, tmp_path, "arrays")) == before
    assert "20 samples of 2 classes written" in capsys.readouterr().out


@pytest.mark.parametrize("output_format", latent_files.FORMATS)
def test_processes_write_disjoint_parts_of_the_same_output(vae, images, tmp_path, monkeypatch, output_format):
    alone = contents(run(vae, images, tmp_path / "alone", output_format))
    written = {0: [], 1: []}
    write = latent_files.LatentParts.write

    def process(rank, order):
        def note(self, number, *rest):
            written[rank].append(number)
            write(self, number, *rest)

        state = SimpleNamespace(process_index=rank, num_processes=2, device=torch.device("cpu"), is_main_process=order == 1,
                                is_local_main_process=False, main_process_first=contextlib.nullcontext,
                                wait_for_everyone=lambda: None)  # fmt: skip
        monkeypatch.setattr(accelerate, "Accelerator", lambda **settings: state)
        monkeypatch.setattr(latent_files.LatentParts, "write", note)
        run(vae, images, tmp_path / "two", output_format, "--dataloader_num_workers=2")

    monkeypatch.setenv("WORLD_SIZE", "2")
    process(1, 0)
    process(0, 1)
    assert written == {0: [0, 2], 1: [1, 3]}
    assert contents(tmp_path / "two") == alone


def test_processes_that_do_not_know_of_each_other_are_refused(vae, images, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched"):
        run(vae, images, tmp_path / "out", "arrays")
    assert not (tmp_path / "out").exists()


def test_one_class_and_no_mirror_images(vae, images, tmp_path):
    precompute.main([f"--pretrained_teacher_model={vae}", f"--train_data_dir={images / 'ant'}", f"--output_dir={tmp_path}",
                     "--class_labels=none", "--mirror=False", "--resolution=32", "--output_format=arrays"])  # fmt: skip
    assert np.load(tmp_path / "labels.npy").tolist() == [0] * 5
    assert json.loads((tmp_path / "manifest.json").read_text())["classes"] == []
    options = wanted(tmp_path, label_type="none", num_classes=1)
    assert len(latents.open_rows(options, pytest.fail)) == 5


@pytest.mark.parametrize("given, known", [("ema", "stabilityai/sd-vae-ft-ema"), ("mse", "stabilityai/sd-vae-ft-mse")])
def test_short_names_of_a_vae_are_those_of_training(vae, images, tmp_path, monkeypatch, given, known):
    load, asked = sd_models.load_network, []
    monkeypatch.setattr(sd_models, "load_network", lambda cls, source, *rest: asked.append(source) or load(cls, vae, *rest))
    run(given, images, tmp_path, "arrays")
    assert asked == [known] and json.loads((tmp_path / "manifest.json").read_text())["vae_name"] == known


def test_other_settings_need_another_folder(vae, images, tmp_path):
    run(vae, images, tmp_path, "arrays")
    with pytest.raises(UserError, match=r"was begun with other settings \(mirror, seed\): give an empty folder"):
        run(vae, images, tmp_path, "arrays", "--seed=1", "--mirror=False")


def test_nothing_usable_is_an_error(vae, tmp_path):
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/1.png").write_bytes(b"")
    for output_format in latent_files.FORMATS:
        with pytest.raises(UserError, match="0 of 1 samples usable, 1 x unreadable image"):
            run(vae, tmp_path / "in", tmp_path / output_format, output_format)


def test_a_vae_that_cannot_take_the_images(vae, images, tmp_path):
    with pytest.raises(UserError, match="--resolution 30 must be a multiple of 4"):
        run(vae, images, tmp_path, "arrays", "--resolution=30")
    shifted = tiny.make_vae("tiny")
    shifted.register_to_config(shift_factor=0.1)
    shifted.save_pretrained(tmp_path / "shifted")
    with pytest.raises(UserError, match="shifts its latents by 0.1"):
        run(tmp_path / "shifted", images, tmp_path, "arrays")


@pytest.mark.parametrize(
    "flags, match",
    [
        (("--class_labels", "--vae=v", "--train_data_dir=d", "--random_flip"), "--random_flip has no effect with --class_labels"),
        (("--vae=v", "--train_data_dir=d", "--mirror=False"), "--mirror has no effect without --class_labels"),
        (("--class_labels", "--vae=v"), "--class_labels needs --train_data_dir"),
        (("--class_labels", "--train_data_dir=d"), "are required: --pretrained_teacher_model"),
        (("--vae=v", "--train_data_dir=d"), "are required: --pretrained_teacher_model"),
        (("--class_labels=other", "--vae=v", "--train_data_dir=d"), "invalid choice"),
    ],
)
def test_flags_of_the_other_mode_are_refused(flags, match):
    with pytest.raises(UserError, match=match):
        precompute.parse_args(["--output_dir=o", *flags])
