"""The source that the flags name: its rows, batches, number of steps, place to go on from, and lists of lines."""

import io
import json
import tarfile
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from brisk import data, options, samples, sources, tiny
from brisk.options import UserError

pytestmark = pytest.mark.quick

MANIFEST = {"vae": "v"}


def wanted(**values):
    """`DataOptions` with the defaults of the flags."""
    parser = options.Parser("a test")
    options.add_data_options(parser)
    args, _ = options.parse(parser, [])
    return options.DataOptions(**{name: getattr(args, name) for name in options.DataOptions._fields})._replace(**values)


def tokenize(text):
    return {"input_ids_0": torch.tensor([len(text)])}


def accelerator(processes=1, rank=0, accumulation=1):
    return SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"),
                           gradient_accumulation_steps=accumulation)  # fmt: skip


def batches_of(options_, rows=None, batch=2, manifest=MANIFEST, **settings):
    position = data.start_position()
    return sources.open_batches(options_, rows, tokenize, batch, 16, manifest, accelerator(), 3, position, print, **settings)


@pytest.fixture
def folder(tmp_path):
    """Five pictures with captions of one to five letters."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number in range(5):
        Image.new("RGB", (20, 16), (number, 0, 0)).save(path / f"{number}.png")
        (path / f"{number}.txt").write_text("x" * (number + 1))
    return path


def caption_lengths(batches, count):
    return [n for _ in range(count) for n in next(batches)["input_ids_0"].flatten().tolist()]


def test_rows_are_those_of_the_folder_the_dataset_or_none(folder, tmp_path):
    said = []
    rows = sources.open_rows(wanted(train_data_dir=str(folder)), None, said.append)
    assert len(rows) == 5 and rows.captions() == ["x", "xx", "xxx", "xxxx", "xxxxx"] and said == []
    images = [Image.new("RGB", (20, 16), (n, 0, 0)) for n in range(3)]
    made = datasets.Dataset.from_dict({"picture": images, "alt": ["a", "b", "c"]}).cast_column("picture", datasets.Image())
    made.save_to_disk(tmp_path / "saved")
    named = wanted(dataset_name=str(tmp_path / "saved"), image_column="picture", caption_column="alt")
    rows = sources.open_rows(named, None, said.append)
    assert isinstance(rows, samples.DatasetRows) and rows.captions() == ["a", "b", "c"]
    for shards in ({"train_shards_path_or_url": "a"}, {"precomputed_shards": "a"}, {}):
        assert sources.open_rows(wanted(**shards), None, said.append) is None
    assert said == []


def test_images_without_a_caption_are_announced_and_columns_reach_the_metadata(folder):
    said = []
    (folder / "3.txt").unlink()
    sources.open_rows(wanted(train_data_dir=str(folder)), None, said.append)
    assert said == ["1 of 5 images have no caption: they are skipped."]
    (folder / "metadata.jsonl").write_text(json.dumps({"name": "3.png", "alt": ["one", "two"], "text": "no"}))
    named = wanted(train_data_dir=str(folder), image_column="name", caption_column="alt")
    assert sources.open_rows(named, None, pytest.fail).captions()[3] == ["one", "two"]


def test_batches_of_rows_come_with_the_wanted_cut_and_prompts(folder):
    rows = sources.open_rows(wanted(train_data_dir=str(folder)), None, pytest.fail)
    lengths = caption_lengths(batches_of(wanted(), rows), 5)
    assert sorted(lengths[:5]) == sorted(lengths[5:]) == [1, 2, 3, 4, 5]
    batch = next(batches_of(wanted(proportion_empty_prompts=1.0, center_crop=True, random_flip=True), rows,
                            extra_prompts=["x" * 9]))  # fmt: skip
    assert batch["empty"].all() and (batch["extra_input_ids_0"] == 9).all() and batch["pixels"].shape == (2, 3, 16, 16)
    assert all(crop == [0, 2] for crop in batch["crop_top_left"].tolist()), "20 x 16, cut at the centre"
    with pytest.raises(UserError, match="0 of 1000 samples usable: 1000 x smaller than the minimum size"):
        next(batches_of(wanted(wds_min_size=17), rows))


def test_too_many_broken_files_stop_where_a_share_is_given(folder):
    (folder / "3.png").write_bytes(b"")
    rows = sources.open_rows(wanted(train_data_dir=str(folder)), None, pytest.fail)
    assert 4 not in caption_lengths(batches_of(wanted(), rows, batch=5), 10)
    with pytest.raises(UserError, match="[12] samples are unreadable, more than 1% of 5: mend the data"):
        caption_lengths(batches_of(wanted(), rows, batch=5, broken_share=0.01), 10)


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return str(path)


def latents():
    stream = io.BytesIO()
    np.save(stream, np.ones((2, 4, 2, 2), np.float16))
    return stream.getvalue()


def test_precomputed_shards_with_captions_are_tokenized_and_checked(tmp_path):
    head = ("__manifest__.json", json.dumps({**MANIFEST, "text_embeddings": False}).encode())
    members = [head, *[(f"{n}.{kind}", content) for n in range(3)
                       for kind, content in (("latent.npy", latents()), ("txt", b"x" * (n + 1)))]]  # fmt: skip
    url = write_shard(tmp_path / "a.tar", members)
    batches = batches_of(wanted(precomputed_shards=url), batch=3, extra_prompts=["x" * 9])
    batch = next(batches)
    assert (batch["extra_input_ids_0"] == 9).all() and batch["moments"].shape == (3, 2, 4, 2, 2)
    assert set(caption_lengths(batches, 9)) == {1, 2, 3}
    with pytest.raises(UserError, match="stale.*vae v instead of w"):
        batches_of(wanted(precomputed_shards=url), manifest={"vae": "w"})


def test_shards_are_streamed_and_filtered(tmp_path):
    tiny.write_shards(tmp_path, shards=1, samples=4)
    url = str(tmp_path / "synthetic-00000.tar")
    batch = next(batches_of(wanted(train_shards_path_or_url=url)))
    assert batch["pixels"].shape == (2, 3, 16, 16) and batch["original_size"].tolist() == [[40, 48]] * 2
    with pytest.raises(UserError, match="1000 x smaller than the minimum size"):
        next(batches_of(wanted(train_shards_path_or_url=url, wds_min_size=41)))


def test_a_dry_run_without_data_gets_grey_images():
    batch = next(batches_of(wanted()))
    assert (batch["pixels"] == 128).all() and batch["input_ids_0"].flatten().tolist() == [len(tiny.CAPTION)] * 2


def test_steps_are_counted_over_the_rows_or_what_is_asked_for():
    rows = samples.FolderRows([("a.png", "x")] * 10)
    assert sources.plan_steps(wanted(), rows, 3, None, 4, 1, 1) == 9
    assert sources.plan_steps(wanted(max_train_samples=4), rows, 3, None, 4, 1, 1) == 3
    assert sources.plan_steps(wanted(max_train_samples=100), None, 1, None, 4, 2, 2) == 7
    assert sources.plan_steps(wanted(), rows, 3, 55, 4, 1, 1) == 55
    assert sources.plan_steps(wanted(), None, 2, None, 4, 1, 1) == 2, "a dry run without data"


def test_only_what_the_source_needs_stays(tmp_path):
    parts = SimpleNamespace(vae="vae", text_encoders=["one", "two"])
    assert sources.unused_modules(wanted(train_data_dir="d"), parts) == []
    for stored, needed in ((True, []), (False, ["one", "two"]), (None, [])):
        manifest = MANIFEST if stored is None else {**MANIFEST, "text_embeddings": stored}
        url = write_shard(tmp_path / "a.tar", [("__manifest__.json", json.dumps(manifest).encode())])
        unused = sources.unused_modules(wanted(precomputed_shards=url), parts)
        assert unused == ["vae", *(name for name in ("one", "two") if name not in needed)]
        assert sources.unused_modules(wanted(precomputed_shards=url), parts, needs_text=True) == ["vae"]


def test_a_saved_position_is_of_use_to_the_same_source_and_seed_alone(tmp_path):
    (tmp_path / "rank_state_0.json").write_text("{}")
    rows, state = samples.FolderRows([("a.png", "x")] * 10), {"step": 3, "processes": 1}

    def find(options_, seed=7, say=pytest.fail, resume=None):
        return sources.find_position(options_, rows, seed, resume, state, accelerator(accumulation=2), say)

    named = [{"train_data_dir": "d"}, {"train_data_dir": "e"}, {"dataset_name": "d"}, {"dataset_name": "e"},
             {"train_shards_path_or_url": "d"}, {"precomputed_shards": "d"}]  # fmt: skip
    found = [find(wanted(**one)) for one in named]
    assert len({one["source"] for one in found}) == 6
    assert all(one == data.start_position(one["source"]) for one in found)
    saved = {**found[0], "samples": 12, "batches": 6}
    (tmp_path / "rank_state_0.json").write_text(json.dumps(saved))
    assert find(wanted(**named[0]), resume=tmp_path) == saved
    for options_, seed in ((wanted(**named[1]), 7), (wanted(**named[0]), 8)):
        said = []
        position = find(options_, seed, said.append, tmp_path)
        assert "starts afresh" in said[0] and position["samples"] == 0 and position["fresh_from"] == 6


def test_lines_of_a_file(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("Größe\n\n  two words \n", encoding="utf-8")
    assert sources.read_lines("--extra", path) == ["Größe", "two words"]
    path.write_text(" \n")
    with pytest.raises(UserError, match="--extra .*lines.txt holds no line"):
        sources.read_lines("--extra", path)
    path.write_bytes(b"\xff\xfe")
    for broken in (path, tmp_path / "gone.txt"):
        with pytest.raises(UserError, match=f"--extra {broken} cannot be read"):
            sources.read_lines("--extra", broken)
