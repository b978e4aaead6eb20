"""Unusable samples: skipped, counted, a reason to stop where too many are broken; one pass over rows or shards."""

import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import (
    decode,
    decode_pixel,
    end_the_workers,  # noqa: F401
    folder_of,
    ids,
    number_folder,
    number_shards,
    shards_of,
    stream,
    write_tar,
)
from torch.utils.data import DataLoader

from brisk import data
from brisk.options import UserError
from brisk.samples import DatasetRows, FolderRows, Skip

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]


@pytest.mark.parametrize("workers", [0, 2])
def test_no_usable_sample_stops_naming_the_reasons(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(data, "HOPELESS", 50)
    url = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"bad") for n in range(10)])
    with pytest.raises(UserError, match="0 of 50 samples usable: 50 x bad sample"):
        next(stream(shards_of([url]), workers))
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match="0 of 50 samples usable: 50 x unreadable image"):
        next(stream(folder_of([(tmp_path / "a.png", "x")]), workers))


def test_bad_samples_are_skipped_and_counted(tmp_path):
    members = [(f"{n}.txt", b"bad" if n % 3 == 0 else str(n).encode()) for n in range(30)]
    batches = stream(shards_of([write_tar(tmp_path / "a.tar", members)], batch=5))
    seen = [n for batch in ids(batches, 4) for n in batch]
    assert sorted(seen) == [n for n in range(30) if n % 3]
    assert 9 <= batches.skipped["bad sample"] <= 10


def test_bad_files_of_a_folder_are_replaced_and_counted(tmp_path):
    files = number_folder(tmp_path, 12)
    for n in (2, 7):
        files[n][0].write_bytes(b"")
    batches = stream(folder_of(files, batch=4))
    seen = {n for batch in ids(batches, 9) for n in batch}
    assert seen == set(range(12)) - {2, 7}
    assert batches.skipped["unreadable image"] >= 4
    assert batches.position["samples"] == 36


def folder_with_bad_files(folder, count, bad):
    """Rows of a folder of which the files numbered `bad` are empty."""
    files = number_folder(folder, count)
    for number in bad:
        files[number][0].write_bytes(b"")
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_more_broken_files_than_allowed_of_an_epoch_stop_the_run(tmp_path, workers):
    files = folder_with_bad_files(tmp_path, 100, (3, 50))
    batches = stream(folder_of(files), workers, broken_share=0.01)
    with pytest.raises(UserError, match="2 samples are unreadable, more than 1% of 100: mend the data.") as error:
        ids(batches, 25)
    assert "\n" not in str(error.value)


def test_broken_files_go_on_without_a_limit_and_below_it(tmp_path):
    files = folder_with_bad_files(tmp_path, 100, (3, 50))
    for limit in (None, 0.05, 1.0):
        batches = stream(folder_of(files), broken_share=limit)
        seen = {n for batch in ids(batches, 50) for n in batch}
        assert len(seen) == 98 and batches.skipped["unreadable image"] >= 4


def test_as_many_broken_files_as_allowed_go_on(tmp_path):
    batches = stream(folder_of(folder_with_bad_files(tmp_path, 100, (3,))), broken_share=0.01)
    assert len({n for batch in ids(batches, 25) for n in batch}) == 99 and batches.skipped["unreadable image"] == 1


def test_a_share_below_the_limit_goes_on_in_every_epoch(tmp_path):
    """Wherever the broken file comes in the later epochs' orders."""
    files = folder_with_bad_files(tmp_path, 120, (3,))
    for seed in range(8):
        batches = stream(folder_of(files, seed=seed), broken_share=0.01)
        ids(batches, 3 * 30)
        assert batches.skipped["unreadable image"] >= 3


def test_each_of_several_ranks_judges_by_its_share_of_the_files(tmp_path):
    files = folder_with_bad_files(tmp_path, 400, range(0, 400, 10))
    with pytest.raises(UserError, match="are unreadable, more than 1% of 100"):
        ids(stream(folder_of(files, world=4), broken_share=0.01), 25)  # within its first epoch
    (tmp_path / "few").mkdir()
    files = folder_with_bad_files(tmp_path / "few", 400, (3, 50, 390))
    for rank in range(4):
        ids(stream(folder_of(files, rank=rank, world=4), broken_share=0.01), 25)


def test_only_unreadable_samples_count_as_broken(tmp_path):
    members = [(f"{n:03d}.txt", b"bad" if n % 2 else str(n).encode()) for n in range(40)]
    url = write_tar(tmp_path / "a.tar", members)
    batches = stream(shards_of([url]), broken_share=0.0)
    ids(batches, 20)
    assert batches.skipped["bad sample"] > 20

    def unreadable(raw, rng):
        if raw["txt"] == b"bad":
            raise Skip("unreadable array")
        return decode(raw, rng)

    dataset = shards_of([url])
    dataset.decode = unreadable
    with pytest.raises(UserError, match="samples are unreadable, more than 0% of"):
        ids(stream(dataset, broken_share=0.0), 20)


def test_broken_samples_of_a_stream_are_measured_over_at_least_a_thousand(tmp_path, monkeypatch):
    members = [(f"{n:03d}.png", b"" if n % 20 == 0 else b"x") for n in range(200)]
    url = write_tar(tmp_path / "a.tar", members)

    def one_in_twenty(raw, rng):
        if not raw["png"]:
            raise Skip("unreadable image")
        return {"id": torch.tensor(0)}

    def read(batches):
        dataset = shards_of([url])
        dataset.decode = one_in_twenty
        made = stream(dataset, broken_share=0.01)
        ids(made, batches)
        return made.skipped["unreadable image"]

    assert 1 < read(20) <= 10, "80 samples say little yet"
    with pytest.raises(UserError, match="11 samples are unreadable, more than 1% of 1000"):
        read(80)
    monkeypatch.setattr(data, "HOPELESS", 10)
    with pytest.raises(UserError, match="samples are unreadable"):
        read(20)


def once(sources, decoder, copies=1, rank=0, world=1, workers=0):
    found = data.OnePass(sources, decoder, copies, 3, rank, world)
    return list(DataLoader(found, batch_size=None, num_workers=workers))


def numbers(found):
    return [sample["id"].item() for sample in found if "skip" not in sample]


def number_dataset(count=7):
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    images = [Image.new("RGB", (2, 2), (0, n, 0)) for n in range(count)]
    made = datasets.Dataset.from_dict({"image": images, "text": ["x"] * count}, features=features)
    return DatasetRows(made, "image", "text")


@pytest.mark.parametrize("kind", ["folder", "dataset"])
@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_gives_every_row_once_divided_over_processes(tmp_path, kind, workers):
    rows = FolderRows(number_folder(tmp_path, 7)) if kind == "folder" else number_dataset()
    assert sorted(numbers(once(rows, decode_pixel, workers=workers))) == list(range(7))
    ranks = [numbers(once(rows, decode_pixel, rank=rank, world=3, workers=workers)) for rank in range(3)]
    assert sorted(n for rank in ranks for n in rank) == list(range(7)) and all(ranks)
    assert numbers(once(rows.first(2), decode_pixel)) == [0, 1]


def test_one_pass_draws_anew_for_every_copy_and_repeats_itself(tmp_path):
    rows = FolderRows(number_folder(tmp_path, 3))
    found = once(rows, decode_pixel, copies=3)
    assert numbers(found) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    draws = [sample["draw"].item() for sample in found]
    assert len(set(draws)) == 9 and draws == [sample["draw"].item() for sample in once(rows, decode_pixel, copies=3)]


def test_one_pass_over_shards_gives_every_sample_once(tmp_path):
    urls = number_shards(tmp_path, 3, 5)
    assert numbers(once(urls, decode)) == list(range(15))
    assert [numbers(once(urls, decode, rank=rank, world=2)) for rank in (0, 1)] == [
        [*range(5), *range(10, 15)], [*range(5, 10)],
    ]  # fmt: skip


def test_one_pass_reports_what_it_skips_and_goes_on(tmp_path):
    files = folder_with_bad_files(tmp_path, 5, (1,))
    files[3][0].unlink()
    found = once(FolderRows(files), decode_pixel, copies=2)
    assert numbers(found) == [0, 0, 2, 2, 4, 4]
    assert [sample["skip"] for sample in found if "skip" in sample] == ["unreadable image"] * 3, "the lost one once"
    shards = [*number_shards(tmp_path, 1, 4), str(tmp_path / "missing.tar")]
    found = once(shards, decode)
    assert numbers(found) == [0, 1, 2, 3] and "broken shard" in found[-1]["skip"] and "missing.tar" in found[-1]["skip"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_dataset_are_those_of_the_same_folder(tmp_path, workers):
    folder = stream(folder_of(number_folder(tmp_path, 7)), workers)
    dataset = folder_of([])
    dataset.rows = number_dataset()
    again = stream(dataset, workers)
    for _ in range(6):
        one, two = next(folder), next(again)
        assert np.array_equal(one["id"], two["id"]) and np.array_equal(one["draw"], two["draw"])


def test_a_run_that_dies_does_not_wait_for_its_loader_processes(tmp_path):
    """They outlive the first SIGTERM, which python sends at its end."""
    number_folder(tmp_path, 12)
    code = f"""
import test_data
from pathlib import Path
files = [(path, path.stem) for path in sorted(Path({str(tmp_path)!r}).glob("*.png"))]
batches = test_data.stream(test_data.folder_of(files), 2)
next(batches)
raise RuntimeError("out of luck")
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "out of luck" in done.stderr
