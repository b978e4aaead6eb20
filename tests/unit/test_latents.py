"""Latents with labels: every format read back with the right pairs, exact positions, what is refused and why."""

import contextlib
import io
import json
import pickle
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from brisk import data, latent_rows, latents, sd_inputs, tiny
from brisk.options import UserError

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]
C, H, K = 4, 2, 30
OPENED = []


@pytest.fixture(autouse=True)
def end_the_workers():
    """The garbage collector would wait five seconds for each of them."""
    yield
    for batches in OPENED:
        getattr(batches.batches, "_shutdown_workers", lambda: None)()
    OPENED.clear()


def wanted(**changes):
    nothing = dict.fromkeys(("feature_path", "train_shards_path_or_url", "train_data_dir", "synthetic_data", "label_dim"))
    given = {"dataset_name": "set", "in_channels": C, "sample_size": H, "num_classes": K, "label_type": "class",
             "image_size": 16, "random_flip": False, "num_workers": 0}  # fmt: skip
    return latents.LatentOptions(**{**nothing, **given, **changes})


def accelerator(rank=0, processes=1):
    return SimpleNamespace(process_index=rank, num_processes=processes, gradient_accumulation_steps=1,
                           device=torch.device("cpu"))  # fmt: skip


def open_batches(options, batch_size=4, rank=0, processes=1, seed=3, position=None):
    rows = latents.open_rows(options, lambda said: None)
    position = position or data.start_position()
    made = latents.open_batches(options, rows, batch_size, accelerator(rank, processes), seed, position, pytest.fail)
    OPENED.append(made)
    return made


def latent(number, shape=(C, H, H), dtype=np.float32):
    """A latent that says its number, and in its last value where that is."""
    array = np.full(shape, number, dtype)
    array[..., -1] += 0.5
    return array


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_features(folder, stems, label_of=None, shape=(1, C, H, H)):
    """The official layout; the label of stem "12" or "n12" is 12, its latent 12 everywhere."""
    for kind in ("features", "labels"):
        (folder / f"set_{kind}").mkdir(exist_ok=True)
    for stem in stems:
        number = int("".join(letter for letter in stem if letter.isdigit()))
        np.save(folder / f"set_features/{stem}.npy", latent(number, shape))
        np.save(folder / f"set_labels/{stem}.npy", label_of(number) if label_of else np.array([number]))
    return wanted(feature_path=str(folder))


def write_arrays(folder, count=12, shape=(C, H, H), dtype=np.float32, labels="count"):
    np.save(folder / "latents.npy", np.stack([latent(n, shape, dtype) for n in range(count)]))
    if labels is not None:
        np.save(folder / "labels.npy", np.arange(count) if isinstance(labels, str) else labels)
    return wanted(feature_path=str(folder))


def write_shards(folder, members_of, shards=2, samples=6, manifest=None):
    """Tars whose sample n holds the files {suffix: bytes} of `members_of(n)`."""
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            files = [("__manifest__.json", json.dumps(manifest).encode())] * (manifest is not None)
            for number in range(shard * samples, (shard + 1) * samples):
                files += [(f"{number:05d}.{suffix}", content) for suffix, content in members_of(number).items()]
            for name, content in files:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return wanted(feature_path=str(folder))


def plain_members(number, shape=(C, H, H)):
    return {"latent.npy": npy(latent(number, shape)), "cls": str(number).encode()}


def check_pairs(batches, kind="latents", count=3, shape=(C, H, H), dtype=torch.float32):
    """Latents of the shape that is expected, each beside its own label; the labels seen."""
    seen = []
    for _ in range(count):
        batch = next(batches)
        assert set(batch) == {kind, "labels"} and batch["labels"].dtype == torch.int64
        assert batch[kind].shape[1:] == shape and batch[kind].dtype == dtype
        assert batch[kind].flatten(1)[:, 0].tolist() == batch["labels"].tolist()
        assert (batch[kind][..., -1] == batch[kind][..., 0] + 0.5).all()
        seen += batch["labels"].tolist()
    return seen


@pytest.mark.parametrize("stems", [[str(n) for n in range(12)], [f"n{n:02d}" for n in range(12)]])
@pytest.mark.parametrize("shape", [(1, C, H, H), (C, H, H)])
def test_features_are_paired_by_stem_and_sorted_by_number(tmp_path, stems, shape):
    options = write_features(tmp_path, stems[::-1], shape=shape)
    rows = latents.open_rows(options, pytest.fail)
    assert [str(stem) for stem in rows.stems] == stems, "2 before 10"
    assert sorted(check_pairs(open_batches(options))) == list(range(12))


def test_features_without_labels_for_unconditional_sets(tmp_path):
    options = write_features(tmp_path, ["1", "2", "3", "4"])
    for path in (tmp_path / "set_labels").iterdir():
        path.unlink()
    (tmp_path / "set_labels").rmdir()
    with pytest.raises(UserError, match="set_labels beside it; only --unsupervised"):
        latents.open_rows(options, print)
    batch = next(open_batches(options._replace(label_type="none", num_classes=1)))
    assert batch["labels"].tolist() == [0] * 4 and sorted(batch["latents"][:, 0, 0, 0].tolist()) == [1, 2, 3, 4]


def test_features_that_do_not_pair_are_named(tmp_path):
    options = write_features(tmp_path, [str(n) for n in range(12)])
    for stem in (2, 3, 10, 11):
        (tmp_path / f"set_labels/{stem}.npy").unlink()
    with pytest.raises(UserError, match="4 files .* have no label file of the same name: 2, 3, 10 and 1 more"):
        latents.open_rows(options, print)
    for stem in (2, 3, 10, 11, 5):
        (tmp_path / f"set_features/{stem}.npy").unlink()
    with pytest.raises(UserError, match="1 files .* have no feature file of the same name: 5"):
        latents.open_rows(options, print)
    for path in (tmp_path / "set_features").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="set_features holds no .npy file"):
        latents.open_rows(options, print)


@pytest.mark.parametrize("shape", [(C, H + 1, H), (3, H, H), (H, H), (C, 2 * H, 2 * H), (3, C, H, H)])
def test_latents_of_another_shape_are_refused(tmp_path, shape):
    for layout in ("features", "arrays"):
        (tmp_path / layout).mkdir()
    for options in (write_features(tmp_path / "features", ["1"], shape=shape), write_arrays(tmp_path / "arrays", shape=shape)):
        match = r"is float32 of shape .*needs floating-point latents of shape \(4, 2, 2\), or means"
        with pytest.raises(UserError, match=match):
            latents.open_rows(options, print)
    np.save(tmp_path / "arrays/latents.npy", np.zeros((12, C, H, H), np.int32))
    with pytest.raises(UserError, match="is int32"):
        latents.open_rows(options, print)


def test_wrong_files_in_the_middle_are_skipped_and_a_wrong_class_is_an_error(tmp_path):
    options = write_features(tmp_path, [str(n) for n in range(12)])
    np.save(tmp_path / "set_features/3.npy", latent(3, (C, H, H + 1)))
    (tmp_path / "set_features/0.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "set_features/5.npy", np.full((C, H, H), np.nan, np.float32))
    np.save(tmp_path / "set_labels/7.npy", np.array([1.5]))
    np.save(tmp_path / "set_features/6.npy", latent(6, (2 * C, H, H)))
    rows, said = latents.open_rows(options, print), []
    batches = latents.open_batches(options, rows, 4, accelerator(), 3, data.start_position(), said.append)
    assert not {0, 3, 5, 6, 7} & set(check_pairs(batches, count=12))
    assert set(batches.skipped) == {"wrong latent shape", "unreadable array", "latent not finite", "unusable label"}
    assert said
    np.save(tmp_path / "set_labels/7.npy", np.array([K]))
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"sample 7 has class 30; --num_classes {K} allows 0 to 29"):
            check_pairs(open_batches(options._replace(num_workers=workers)), count=12)
    np.save(tmp_path / "set_labels/1.npy", np.array([-1]))
    with pytest.raises(UserError, match="sample 1 has class -1"):
        latents.open_rows(options, print)


def test_nothing_readable_is_an_error_at_the_start(tmp_path):
    options = write_features(tmp_path, ["1", "2"])
    for path in (tmp_path / "set_features").iterdir():
        path.write_bytes(b"no array")
    with pytest.raises(UserError, match="the first samples of .* cannot be used for training: unreadable array"):
        latents.open_rows(options, print)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_arrays_of_latents_and_of_moments(tmp_path, dtype):
    torch_dtype = torch.float32 if dtype == np.float32 else torch.float16
    batches = open_batches(write_arrays(tmp_path, dtype=dtype))
    assert sorted(check_pairs(batches, dtype=torch_dtype)) == list(range(12))
    options = write_arrays(tmp_path, shape=(2 * C, H, H), dtype=dtype)
    batches = open_batches(options)
    assert sorted(check_pairs(batches, "moments", shape=(2, C, H, H), dtype=torch_dtype)) == list(range(12))
    both = np.concatenate([np.zeros((12, C, H, H)), np.ones((12, C, H, H))], axis=1).astype(dtype)
    np.save(tmp_path / "latents.npy", both)
    moments = next(open_batches(options))["moments"]
    assert (moments[:, 0] == 0).all() and (moments[:, 1] == 1).all(), "mean first, deviation second"


def test_arrays_are_checked_against_their_labels(tmp_path):
    options = write_arrays(tmp_path)
    for labels, match in ((np.arange(11), r"of shape \(11,\); 12 latents need whole numbers of shape \(12,\)"),
                          (np.zeros(12), "is float64"), (np.zeros((12, 3), int), r"\(12, 3\)"),
                          (np.arange(12) + 19, "labels.npy has class 30; --num_classes 30 allows 0 to 29"),
                          (np.arange(12) - 1, "class -1")):  # fmt: skip
        np.save(tmp_path / "labels.npy", labels)
        with pytest.raises(UserError, match=match):
            latents.open_rows(options, print)
    write_arrays(tmp_path, labels=np.arange(12)[:, None].astype(np.uint16))
    assert sorted(check_pairs(open_batches(options))) == list(range(12))
    (tmp_path / "labels.npy").unlink()
    with pytest.raises(UserError, match="holds latents.npy and no labels.npy"):
        latents.open_rows(options, print)
    assert next(open_batches(options._replace(label_type="none")))["labels"].tolist() == [0] * 4
    broken, empty = "cannot be read as an array", "holds no sample"
    for content, match in ((b"", broken), (npy(latent(1))[:-4], broken), (npy(latent(1)[:0]), empty), (npy(np.float32(1)), empty)):
        (tmp_path / "latents.npy").write_bytes(content)
        with pytest.raises(UserError, match=match):
            latents.open_rows(options._replace(label_type="none"), print)


def test_arrays_are_memory_mapped_and_never_pickled(tmp_path):
    options = write_arrays(tmp_path, count=3000)._replace(num_classes=3000)
    rows = latents.open_rows(options, print)
    assert isinstance(rows[1]["latent.npy"], np.memmap)
    copy = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 2000 and (copy[2]["latent.npy"] == latent(2)).all()


@pytest.mark.parametrize("layout", ["features", "arrays", "shards"])
def test_label_vectors(tmp_path, layout):
    vectors = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float16)
    if layout == "features":
        options = write_features(tmp_path, [str(n) for n in range(12)], lambda number: vectors[number][None])
    elif layout == "arrays":
        options = write_arrays(tmp_path, labels=vectors)
    else:
        options = write_shards(tmp_path, lambda n: {"latent.npy": npy(latent(n)), "label.npy": npy(vectors[n])})
    options = options._replace(label_type="vector", label_dim=5)
    batch = next(open_batches(options))
    numbers = batch["latents"][:, 0, 0, 0].long()
    assert batch["labels"].dtype == torch.float32
    assert torch.equal(batch["labels"], torch.from_numpy(vectors).float()[numbers])
    with pytest.raises(UserError, match="unusable label|need floating-point numbers of shape"):
        latents.open_rows(options._replace(label_dim=6), print)


@pytest.mark.parametrize("shape", [(C, H, H), (2, C, H, H)])
def test_shards_of_latents_and_of_moments(tmp_path, shape):
    options = write_shards(tmp_path, lambda number: plain_members(number, shape))
    kind = "moments" if len(shape) == 4 else "latents"
    assert set(check_pairs(open_batches(options), kind, 12, shape)) == set(range(12))
    named = wanted(train_shards_path_or_url=f"{tmp_path}/{{0..1}}.tar")
    assert set(check_pairs(open_batches(named), kind, 12, shape)) == set(range(12))


def test_shards_with_moments_beside_each_other_and_label_arrays(tmp_path):
    options = write_shards(tmp_path, lambda n: {"moments.npy": npy(latent(n, (2 * C, H, H))), "label.npy": npy(np.int64(n))})
    assert set(check_pairs(open_batches(options), "moments", 12, (2, C, H, H))) == set(range(12))


def test_the_first_shard_is_opened_once_before_training(tmp_path, monkeypatch):
    opened, read = [], data.read_shard

    def noting(url):
        if url.startswith(str(tmp_path)):  # the thread of another test's loader may still open shards of its own
            opened.append(url)
        return read(url)

    monkeypatch.setattr(data, "read_shard", noting)
    options = write_shards(tmp_path, plain_members, manifest={"count": 12})
    rows = latents.open_rows(options, print)
    assert latents.read_facts(options, rows)["count"] == 12 and len(opened) == 1
    latents.open_rows(options, print)
    assert len(opened) == 2, "a new run looks anew"


def test_bad_shards(tmp_path):
    def refused(members_of, match):
        with pytest.raises(UserError, match=match):
            latents.open_rows(write_shards(tmp_path, members_of), print)

    refused(lambda n: plain_members(n, (C, H, H + 1)), r"sample 0*0 of .* is float32 of shape \(4, 2, 3\)")
    refused(lambda n: {"cls": b"1"}, "first samples of .*: no latent")
    refused(lambda n: {"latent.npy": npy(latent(n))}, "first samples of .*: no label")
    refused(lambda n: {**plain_members(n), "cls": b"dog"}, "first samples of .*: unusable label")
    refused(lambda n: {**plain_members(n), "cls": b"77"}, "has class 77; --num_classes")
    refused(lambda n: {}, "first samples of .*: there is none")
    (tmp_path / "0.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match="the shard .*0.tar cannot be read"):
        latents.open_rows(wanted(feature_path=str(tmp_path)), print)
    options = write_shards(tmp_path, lambda n: {**plain_members(n), "cls": b"99" if n == 11 else b"1"})
    with pytest.raises(UserError, match="sample 0*11 has class 99"):
        [next(batches) for batches in [open_batches(options)] for _ in range(9)]


def test_manifests_are_checked(tmp_path):
    facts = {"size": 16, "scaling_factor": 0.2, "vae": "v", "classes": ["a"] * 12}
    options = write_shards(tmp_path, plain_members, manifest=facts)
    said = []
    assert latents.open_rows(options, said.append) is None
    assert said == ["--num_classes is 30, the data have 12 classes."]
    assert latents.read_facts(options, None) == facts and latents.epoch_size(facts, None) is None
    (tmp_path / "manifest.json").write_text(json.dumps({**facts, "count": 12}))
    assert latents.epoch_size(latents.read_facts(options, None), None) == 12
    with pytest.raises(UserError, match="the latents are those of images of 16 pixels; --image_size is 32"):
        latents.open_rows(options._replace(image_size=32), print)
    with pytest.raises(UserError, match="the data have 12 classes; --num_classes is 11"):
        latents.open_rows(options._replace(num_classes=11), print)
    check_pairs(open_batches(options), count=12)
    (tmp_path / "1.tar").rename(tmp_path / "2.tar")
    write_shards(tmp_path, plain_members, shards=1, manifest={**facts, "vae": "w"})
    with pytest.raises(UserError, match="stale .vae"):
        check_pairs(open_batches(options), count=12)


def test_manifests_of_arrays_and_features_count_the_samples(tmp_path):
    options = write_arrays(tmp_path)
    for count in (12, 13):
        (tmp_path / "manifest.json").write_text(json.dumps({"count": count, "size": 16, "scaling_factor": 0.2}))
        with pytest.raises(UserError, match="counts 13 samples and there are 12") if count == 13 else contextlib.nullcontext():
            rows = latents.open_rows(options, pytest.fail)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="the manifest .* cannot be read"):
        latents.read_facts(options, rows)
    (tmp_path / "latents.npy").unlink()
    options = write_features(tmp_path, ["1", "2"])
    (tmp_path / "set_manifest.json").write_text('{"count": 3}')
    with pytest.raises(UserError, match="counts 3 samples and there are 2"):
        latents.open_rows(options, print)


def test_the_source_must_be_there_and_unambiguous(tmp_path):
    with pytest.raises(UserError, match="gone is not a folder"):
        latents.open_rows(wanted(feature_path="gone"), print)
    with pytest.raises(UserError, match="must hold one of .* it holds none of them"):
        latents.open_rows(wanted(feature_path=str(tmp_path)), print)
    write_arrays(tmp_path)
    options = write_features(tmp_path, ["1"])
    with pytest.raises(UserError, match="it holds arrays and features"):
        latents.open_rows(options, print)
    with pytest.raises(UserError, match="no label vectors"):
        latents.open_rows(wanted(train_data_dir=str(tmp_path), label_type="vector", label_dim=3), print)


def test_synthetic_latents_are_the_same_each_time_and_differ_by_class():
    options = wanted(synthetic_data=12, num_classes=3, sample_size=16)
    rows = latents.open_rows(options, pytest.fail)
    assert len(rows) == 12 and latents.epoch_size({}, rows) == 12
    again = latents.open_rows(options, pytest.fail)
    assert all((rows[n]["latent.npy"] == again[n]["latent.npy"]).all() for n in range(12))
    means = torch.stack([torch.from_numpy(rows[n]["latent.npy"]).mean((1, 2)) for n in range(6)])
    torch.testing.assert_close(means[:3], means[3:], atol=0.15, rtol=0)
    assert (means[0] - means[1]).abs().max() > 0.3
    assert sorted(next(open_batches(options, batch_size=12))["labels"].tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    vector = next(open_batches(options._replace(label_type="vector", label_dim=7)))["labels"]
    assert vector.shape == (4, 7) and vector.dtype == torch.float32
    assert next(open_batches(options._replace(label_type="none", num_classes=1)))["labels"].tolist() == [0] * 4


def class_folder(folder, count=6):
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        tiny.random_image(np.random.default_rng(number), 20, 24).save(path)
    return wanted(train_data_dir=str(folder), num_classes=2)


def test_an_image_folder_gives_pixels_and_classes(tmp_path):
    options = class_folder(tmp_path)
    rows = latents.open_rows(options, pytest.fail)
    assert latents.read_facts(options, rows) == {"classes": ["a", "b"]} and latents.epoch_size({}, rows) == 6
    batch = next(open_batches(options, 6))
    assert batch["pixels"].shape == (6, 3, 16, 16) and batch["pixels"].dtype == torch.uint8
    assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]
    flipped = next(open_batches(options._replace(random_flip=True), 6))["pixels"]
    mirrored = (flipped != batch["pixels"]).flatten(1).any(1)
    assert 0 < mirrored.sum() < 6
    assert torch.equal(flipped[mirrored], batch["pixels"][mirrored].flip(-1))
    with pytest.raises(UserError, match="the data have 2 classes; --num_classes is 1"):
        latents.open_rows(options._replace(num_classes=1), print)


def sources_of(tmp_path):
    """One source per way of reading."""
    folders = {name: tmp_path / name for name in ("features", "arrays", "images")}
    for folder in folders.values():
        folder.mkdir()
    return [write_features(folders["features"], [str(n) for n in range(23)]), write_arrays(folders["arrays"], 23),
            class_folder(folders["images"], 7)._replace(random_flip=True), wanted(synthetic_data=23)]  # fmt: skip


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("number", range(4), ids=["features", "arrays", "images", "synthetic"])
def test_a_position_is_resumed_exactly_at_any_number_of_workers(tmp_path, number):
    options = sources_of(tmp_path)[number]
    whole = open_batches(options)
    expected = [next(whole) for _ in range(12)]
    first = open_batches(options._replace(num_workers=2))
    assert all(same(next(first), batch) for batch in expected[:7])
    position = json.loads(json.dumps(first.position))
    again = open_batches(options, position=position)
    assert all(same(next(again), batch) for batch in expected[7:])


def test_a_stream_of_shards_is_resumed_exactly(tmp_path):
    options = write_shards(tmp_path, plain_members, shards=3)._replace(num_workers=2)
    whole = open_batches(options)
    expected = [next(whole) for _ in range(12)]
    first = open_batches(options)
    assert all(same(next(first), batch) for batch in expected[:5])
    again = open_batches(options, position=json.loads(json.dumps(first.position)))
    assert all(same(next(again), batch) for batch in expected[5:])


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_share_an_epoch_out(tmp_path, workers):
    options = write_arrays(tmp_path, count=24)._replace(num_workers=workers)
    seen = [check_pairs(open_batches(options, rank=rank, processes=2)) for rank in (0, 1)]
    assert sorted(seen[0] + seen[1]) == list(range(24))


def test_a_run_goes_on_where_its_checkpoint_stands(tmp_path):
    options = write_arrays(tmp_path)
    rows, state = latents.open_rows(options, print), {"step": 3, "processes": 1}

    def find(options, seed=7, resume=None, say=pytest.fail):
        return latents.find_position(options, rows, seed, resume, state, accelerator(), say)

    start = find(options)
    assert start == data.start_position(start["source"])
    saved = {**start, "samples": 12, "batches": 3}
    (tmp_path / "rank_state_0.json").write_text(json.dumps(saved))
    assert find(options, resume=tmp_path) == saved
    for other, seed in ((options._replace(dataset_name="other"), 7), (options, 8)):
        said = []
        assert find(other, seed, tmp_path, said.append)["samples"] == 0 and "starts afresh" in said[0]


def test_clean_latents_are_sampled_anew_and_scaled():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(3, C, H, H).half()
    assert torch.equal(sd_inputs.sample_latents({"latents": plain}, None, 0.5, 1, None), plain.float())
    mean, std = torch.randn(3, C, H, H), torch.rand(3, C, H, H)
    batch = {"moments": torch.stack([mean, std], dim=1)}
    one, two = (sd_inputs.sample_latents(batch, None, 0.5, 1, generator) for _ in range(2))
    noise = torch.randn(2, 3, C, H, H, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one, 0.5 * (mean + std * noise[0]))
    assert not torch.equal(one, two)
    torch.manual_seed(0)
    vae = tiny.make_vae("tiny").eval()
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found = sd_inputs.sample_latents({"pixels": pixels}, vae, 0.5, 2, torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
    xi = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, 0.5 * (posterior.mean + posterior.std * xi), atol=1e-5, rtol=1e-4)


def test_numbers_in_names_are_compared_as_numbers():
    names = ["10", "9", "a2", "a10", "b1", "2", "02"]
    assert sorted(names, key=latent_rows.numeric_order) == ["02", "2", "9", "10", "a2", "a10", "b1"]
