"""Batches from shards and folders: grouping, faults, exact positions over resumes, workers and processes."""

import copy
import io
import json
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from brisk import data
from brisk.options import UserError
from brisk.samples import FolderRows, Skip

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")]


def write_tar(path, members, raw_end=b""):
    """A tar of (name, bytes) pairs, a folder for bytes None."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    with open(path, "ab") as file:
        file.write(raw_end)
    return str(path)


def number_shards(folder, shards=5, samples=13):
    """Shards whose samples say their number in their caption."""
    urls = []
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        urls.append(write_tar(folder / f"{shard:02d}.tar", [(f"{n:05d}.txt", str(n).encode()) for n in numbers]))
    return urls


def decode(raw, rng):
    if raw["txt"].startswith(b"bad"):
        raise Skip("bad sample")
    return {"id": torch.tensor(int(raw["txt"])), "draw": torch.tensor(rng.random())}


def decode_pixel(raw, rng):
    """The number that `number_folder` wrote into the corner of the picture."""
    from PIL import Image

    try:
        red, green, _ = Image.open(io.BytesIO(raw["png"])).convert("RGB").getpixel((0, 0))
    except Exception:
        raise Skip("unreadable image") from None
    return {"id": torch.tensor(red * 256 + green), "draw": torch.tensor(rng.random())}


def number_folder(folder, count=23):
    from PIL import Image

    for n in range(count):
        Image.new("RGB", (2, 2), (n // 256, n % 256, 0)).save(folder / f"{n:04d}.png")
    return [(folder / f"{n:04d}.png", "x") for n in range(count)]


def shards_of(urls, position=None, rank=0, seed=3, batch=4, shuffle=10, **settings):
    return data.ShardBatches(urls, decode, batch, seed, rank, position or data.start_position(), shuffle, **settings)


def folder_of(files, position=None, rank=0, world=1, seed=3, batch=4):
    return data.FolderBatches(FolderRows(files), decode_pixel, batch, seed, rank, world, position or data.start_position())


OPENED = []


@pytest.fixture(autouse=True)
def end_the_workers():
    """The garbage collector would wait five seconds for each of them."""
    yield
    for batches in OPENED:
        getattr(batches, "_shutdown_workers", lambda: None)()
    OPENED.clear()


def stream(dataset, workers=0, world=1, say=None, **settings):
    say = say or (lambda message: None)
    made = data.TrainingBatches(dataset, workers, False, dataset.batch_size * world, say, **settings)
    OPENED.append(made.batches)
    return made


def ids(batches, count):
    return [next(batches)["id"].tolist() for _ in range(count)]


def contents(batch):
    return batch["id"].tolist(), batch["draw"].tolist()


def test_shard_lists_are_expanded_with_their_zero_padding():
    urls = data.expand_shards("pipe:curl -L -s https://host/cc12m-train-{00000..01099}.tar?download=true")
    assert len(urls) == 1100
    assert urls[0] == "pipe:curl -L -s https://host/cc12m-train-00000.tar?download=true"
    assert urls[-1].endswith("cc12m-train-01099.tar?download=true")
    assert data.expand_shards("a.tar::b-{8..10}.tar::") == ["a.tar", "b-8.tar", "b-9.tar", "b-10.tar"]
    with pytest.raises(UserError, match="unbalanced braces"):
        data.expand_shards("a-{0..3.tar")
    for nothing in ("", "::"):
        with pytest.raises(UserError, match="names no shard"):
            data.expand_shards(nothing)


def test_shards_are_grouped_by_key_suffix_and_shard(tmp_path):
    members = [
        ("a.jpg", b"1"), ("a.TXT", b"2"), ("b.jpg", b"3"), ("b.jpg", b"4"), ("dir.x", None), ("dir.x/b.jpg", b"5"),
        ("dir.x/b.latent.npy", b"6"), ("other/b.jpg", b"7"), ("README", b"no suffix"), (".hidden.jpg", b"8"),
        ("c.txt", b"9"),
    ]  # fmt: skip
    groups = list(data.read_shard(write_tar(tmp_path / "a.tar", members)))
    assert groups == [
        {"__key__": "a", "jpg": b"1", "txt": b"2"}, {"__key__": "b", "jpg": b"3"}, {"__key__": "b", "jpg": b"4"},
        {"__key__": "dir.x/b", "jpg": b"5", "latent.npy": b"6"}, {"__key__": "other/b", "jpg": b"7"},
        {"__key__": "c", "txt": b"9"},
    ]  # fmt: skip


def test_equal_keys_in_neighbouring_shards_are_two_samples(tmp_path):
    urls = [write_tar(tmp_path / "a.tar", [("k.txt", b"1")]), write_tar(tmp_path / "b.tar", [("k.json", b"2")])]
    groups = shards_of(urls)._groups((3, 0, 0, 0), 0, 0)
    assert {tuple(sorted(next(groups)[1])) for _ in range(2)} == {("__key__", "txt"), ("__key__", "json")}


def test_pipe_command_with_trailing_padding_is_read_without_complaint(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.txt", b"1")], raw_end=b"\0" * 2**20)
    assert [raw["txt"] for raw in data.read_shard(f"pipe:cat '{path}'")] == [b"1"]


def test_a_truncated_shard_keeps_its_good_samples_and_the_stream_goes_on(tmp_path):
    urls = number_shards(tmp_path, 2)
    whole = (tmp_path / "00.tar").read_bytes()
    (tmp_path / "00.tar").write_bytes(whole[: 512 * 2 * 5 + 512 + 1])  # five samples and a part of the sixth's
    notes = []
    seen = {n for batch in ids(stream(shards_of(urls), say=notes.append), 40) for n in batch}
    assert seen == {0, 1, 2, 3, 4, *range(13, 26)}
    assert notes and "00.tar is broken after 5 samples" in notes[0]


def test_an_empty_and_a_nonsense_shard_are_passed_over(tmp_path):
    urls = number_shards(tmp_path, 1)
    urls.append(write_tar(tmp_path / "empty.tar", []))
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "page.tar").write_bytes(b"<html>404 not found</html>" * 100)
    notes = []
    batches = stream(shards_of([*urls, str(tmp_path / "zero.tar"), str(tmp_path / "page.tar")]), say=notes.append)
    assert {n for batch in ids(batches, 40) for n in batch} == set(range(13))
    assert any("page.tar" in note for note in notes) and any("zero.tar" in note for note in notes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "url", ["{}/missing.tar", "pipe:exit 22", "pipe:cat {}/missing.tar 2>/dev/null", "{}/empty.tar"]
)
def test_unreachable_shards_stop_with_one_sentence(tmp_path, url, workers):
    write_tar(tmp_path / "empty.tar", [])
    url = url.format(tmp_path)
    with pytest.raises(UserError, match="3 shards in a row gave no sample") as error:
        next(stream(shards_of([url]), workers))
    assert url.split()[-1] in str(error.value) and "\n" not in str(error.value)


def test_shards_that_hold_only_a_manifest_stop_with_one_sentence(tmp_path):
    url = write_tar(tmp_path / "a.tar", [("__manifest__.json", b'{"vae": "v"}')])
    with pytest.raises(UserError, match="gave no sample"):
        next(stream(shards_of([url], manifest={"vae": "v"})))


def test_patience_lasts_over_a_hundred_shards_but_not_for_ever(tmp_path):
    good = number_shards(tmp_path, 1)
    missing = [f"{tmp_path}/missing-{n}.tar" for n in range(40)]
    assert len(ids(stream(shards_of(good + missing)), 8)) == 8, "two passes' failures may meet"
    with pytest.raises(UserError, match="100 shards in a row"):
        next(stream(shards_of([f"{tmp_path}/missing-{n}.tar" for n in range(300)])))


def test_no_secret_of_a_shard_url_is_said(tmp_path):
    secret = "hf_abcdefGHIJ1234567890"
    broken = f"pipe:curl -H 'Authorization: Bearer {secret}' file://{tmp_path}/missing 2>/dev/null"
    notes = []
    batches = stream(shards_of([broken, *number_shards(tmp_path, 1)]), say=notes.append)
    ids(batches, 12)
    assert notes and secret not in " ".join(notes)
    with pytest.raises(UserError) as error:
        next(stream(shards_of([broken])))
    assert secret not in str(error.value)
    with pytest.raises(UserError) as error:
        data.read_first_manifest([broken])
    assert secret not in str(error.value)


def test_a_stale_manifest_in_any_shard_stops_the_run(tmp_path):
    first = [("__manifest__.json", b'{"vae": "v"}'), ("a.txt", b"1")]
    stale = [("__manifest__.json", b'{"vae": "old"}'), ("b.txt", b"2")]
    urls = [write_tar(tmp_path / "a.tar", first), write_tar(tmp_path / "b.tar", stale)]
    assert data.read_first_manifest(urls) == {"vae": "v"}
    with pytest.raises(UserError, match="vae old instead of v"):
        ids(stream(shards_of(urls, manifest={"vae": "v"})), 3)
    assert {n for batch in ids(stream(shards_of(urls[:1], manifest={"vae": "v"})), 3) for n in batch} == {1}


def test_shards_of_another_origin_are_refused(tmp_path):
    with pytest.raises(UserError, match="no manifest"):
        data.read_first_manifest([write_tar(tmp_path / "a.tar", [("a.txt", b"1")])])
    with pytest.raises(UserError, match="cannot be read"):
        data.read_first_manifest([str(tmp_path / "missing.tar")])


def test_a_folder_gives_every_file_once_per_epoch_in_new_orders(tmp_path):
    files = number_folder(tmp_path, 12)
    flat = [n for batch in ids(stream(folder_of(files)), 6) for n in batch]
    assert sorted(flat[:12]) == sorted(flat[12:24]) == list(range(12)) and flat[:12] != flat[12:24]
    ranks = [ids(stream(folder_of(files, rank=rank, world=3), world=3), 2) for rank in range(3)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == ids(stream(folder_of(files)), 6)


def test_a_stream_gives_every_sample_once_per_pass(tmp_path):
    flat = [n for batch in ids(stream(shards_of(number_shards(tmp_path, 4, 15), batch=5)), 24) for n in batch]
    assert sorted(flat[:60]) == sorted(flat[60:]) == list(range(60)) and flat[:60] != flat[60:]
    assert flat[:60] != sorted(flat[:60])


def test_ranks_workers_and_seeds_see_different_orders(tmp_path):
    urls = number_shards(tmp_path)
    orders = [ids(stream(shards_of(urls, rank=rank, seed=seed)), 6) for rank in (0, 1) for seed in (3, 4)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    two = ids(stream(shards_of(urls), workers=2), 6)
    assert two[0::2] != two[1::2] and two != orders[0]


def test_the_same_seed_gives_the_same_order_in_another_process(tmp_path, root):
    urls = number_shards(tmp_path)
    code = """
import json, sys
sys.path.insert(0, "tests/unit")
import test_data
batches = test_data.stream(test_data.shards_of(json.loads(sys.argv[1])))
print(json.dumps([test_data.contents(next(batches)) for _ in range(6)]))
"""
    done = subprocess.run([sys.executable, "-c", code, json.dumps(urls)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    batches = stream(shards_of(urls))
    assert json.loads(done.stdout) == [list(contents(next(batches))) for _ in range(6)]


MAKERS = {
    "shards": lambda source, position, rank, world: shards_of(source, position, rank),
    "folder": lambda source, position, rank, world: folder_of(source, position, rank, world),
}


@pytest.fixture(params=["shards", "folder"])
def source(request, tmp_path):
    made = number_shards(tmp_path) if request.param == "shards" else number_folder(tmp_path)
    return request.param, made


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_resumed_run_sees_exactly_what_an_unbroken_one_sees(source, workers, rank):
    """Cut twice, at places that are no multiple of the workers, the shuffle block or the epoch."""
    kind, made = source
    unbroken = stream(MAKERS[kind](made, None, rank, 2), workers, 2)
    expected = [contents(next(unbroken)) for _ in range(34)]
    position, found = None, []
    for count in (5, 22, 7):
        batches = stream(MAKERS[kind](made, position, rank, 2), workers, 2)
        found += [contents(next(batches)) for _ in range(count)]
        saved = json.loads(json.dumps(batches.position))
        say = []
        position = data.continue_position(saved, 99, workers, True, kind == "folder", "skip", say.append)
        assert position == saved and say == []
    assert found == expected
    assert position["samples"] == 34 * 4 * 2 and position["batches"] == 34


def test_loading_ahead_does_not_move_the_saved_position(tmp_path):
    batches = stream(shards_of(number_shards(tmp_path)), 2)
    ids(batches, 3)
    before = copy.deepcopy(batches.position)
    time.sleep(0.3)  # the workers decode further batches meanwhile
    assert batches.position == before and before["batches"] == 3


def test_a_resume_reads_no_sample_that_was_used(tmp_path):
    """A resumed stream decodes nothing again: the first sample it decodes is a new one."""
    urls, decoded = number_shards(tmp_path), []

    def counting(raw, rng):
        decoded.append(int(raw["txt"]))
        return decode(raw, rng)

    first = stream(shards_of(urls))
    ids(first, 9)
    dataset = shards_of(urls, json.loads(json.dumps(first.position)))
    dataset.decode = counting
    assert next(stream(dataset))["id"].tolist() == decoded and len(decoded) == 4


@pytest.mark.parametrize("before, after", [(0, 3), (3, 0), (2, 3)])
def test_a_folder_goes_on_exactly_with_another_number_of_workers(tmp_path, before, after):
    files = number_folder(tmp_path)
    unbroken = stream(folder_of(files))
    expected = [contents(next(unbroken)) for _ in range(20)]
    first = stream(folder_of(files), before)
    found = [contents(next(first)) for _ in range(7)]
    position = data.continue_position(first.position, 7, after, True, True, "skip", pytest.fail)
    second = stream(folder_of(files, position), after)
    assert found + [contents(next(second)) for _ in range(13)] == expected


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3)])
def test_a_folder_goes_on_exactly_with_another_number_of_processes(tmp_path, before, after):
    files = number_folder(tmp_path)
    expected = ids(stream(folder_of(files)), 18)
    first = [stream(folder_of(files, None, rank, before), 0, before) for rank in range(before)]
    found = [batch for step in zip(*(ids(s, 6 // before) for s in first), strict=True) for batch in step]
    position = data.continue_position(first[0].position, 3, 0, False, True, "skip", pytest.fail)
    second = [stream(folder_of(files, position, rank, after), 0, after) for rank in range(after)]
    found += [batch for step in zip(*(ids(s, 12 // after) for s in second), strict=True) for batch in step]
    assert found == expected


def test_a_stream_starts_afresh_with_a_message_where_it_cannot_go_on(tmp_path):
    urls = number_shards(tmp_path)
    first = stream(shards_of(urls), 2)
    start = ids(first, 4)
    for workers, same_ranks, saved in ((3, True, first.position), (2, False, first.position), (2, True, None)):
        said = []
        position = data.continue_position(saved, 4, workers, same_ranks, False, "skip", said.append)
        assert len(said) == 1 and "starts afresh" in said[0]
        assert position["fresh_from"] == 4 and position["cursors"] == {}
        again = ids(stream(shards_of(urls, position), workers), 4)
        assert again != start, "not the same data from the start"


def test_fresh_data_on_request_and_a_later_exact_resume_of_it(tmp_path):
    urls = number_shards(tmp_path)
    first = stream(shards_of(urls))
    start = ids(first, 4)
    position = data.continue_position(first.position, 4, 0, True, False, "fresh", pytest.fail)
    fresh = stream(shards_of(urls, position))
    expected = ids(fresh, 3)
    assert expected != start[:3]
    saved = json.loads(json.dumps(fresh.position))
    rest = ids(fresh, 5)
    assert (
        ids(stream(shards_of(urls, data.continue_position(saved, 7, 0, True, False, "skip", pytest.fail))), 5) == rest
    )


def test_in_process_loading_and_one_worker_are_interchangeable(tmp_path):
    urls = number_shards(tmp_path)
    first = stream(shards_of(urls), 1)
    found = ids(first, 5)
    position = data.continue_position(first.position, 5, 0, True, False, "skip", pytest.fail)
    assert found + ids(stream(shards_of(urls, position)), 5) == ids(stream(shards_of(urls)), 10)


def test_batches_are_always_full(tmp_path):
    batches = stream(shards_of(number_shards(tmp_path, 1, 3), batch=7))
    assert all(len(batch) == 7 for batch in ids(batches, 5))


def test_number_of_steps():
    seed_command = {"images_per_epoch": 4_000_000, "batch_size": 12, "processes": 1, "workers": 8, "accumulation": 1}
    assert data.total_steps(1, **seed_command) == 333_336
    assert data.total_steps(1, 4_000_000, 12, 2, 8, 1) == 166_672  # ceil(4e6 / 192) * 8
    assert data.total_steps(3, 10, 4, 1, 0, 1) == 9
    assert data.total_steps(3, 10, 4, 1, 0, 2) == 6, "an epoch's odd micro-step makes a step too"
    assert data.total_steps(1, 1, 16, 4, 8, 4) == 2


def test_prefetch_keeps_the_order_and_passes_errors_on():
    def items():
        yield from range(20)
        raise UserError("broken")

    fetched = data.prefetch(items(), 3)
    assert [next(fetched) for _ in range(20)] == list(range(20))
    with pytest.raises(UserError, match="broken"):
        next(fetched)


def test_unexpected_errors_of_a_decoder_are_not_swallowed(tmp_path):
    dataset = shards_of(number_shards(tmp_path, 1))
    dataset.decode = lambda raw, rng: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(stream(dataset))


def test_collate_stacks_every_tensor():
    batch = data.collate([{"a": torch.zeros(2), "b": torch.tensor(n)} for n in range(3)])
    assert batch["a"].shape == (3, 2) and batch["b"].tolist() == [0, 1, 2]


def test_blocks_grow_so_that_the_first_batch_comes_early(tmp_path, monkeypatch):
    """The first batch must not wait for the whole shuffle buffer."""
    monkeypatch.setattr(data, "FIRST_BLOCK", 4)
    read = []
    dataset = shards_of(number_shards(tmp_path, 4, 50), shuffle=64)
    groups = dataset._groups

    def counting(*args):
        for group in groups(*args):
            read.append(group[0])
            yield group

    dataset._groups = counting
    monkeypatch.setattr(data, "prefetch", lambda items, size: items)
    batches = stream(dataset)
    sizes = []
    for _ in range(20):
        next(batches)
        sizes.append(len(read))
    assert sizes[0] == 4 and sizes[1:3] == [12, 12] and sizes[-1] >= 80
    assert np.diff(sizes).max() <= 64
