"""The built-in data: the split, the tinting, the captions and the shards."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from brisk import handwriting


def test_split_is_stratified_and_complete():
    train, train_digits = handwriting.load_strokes("train")
    test, test_digits = handwriting.load_strokes("test")
    assert len(train) + len(test) == 1797
    assert 1450 <= len(train) <= 1550
    for digit, total in enumerate(np.bincount(load_digits().target)):
        assert (test_digits == digit).sum() == total // handwriting.HELD_OUT_EVERY
        assert (train_digits == digit).sum() == total - total // handwriting.HELD_OUT_EVERY
    # No scan of the held-out part occurs in the training part.
    assert torch.cdist(test.flatten(1), train.flatten(1)).min() > 0


def test_strokes_are_smooth_copies_of_the_scans():
    strokes, digits = handwriting.load_strokes("train")
    assert strokes.shape[1:] == (32, 32) and strokes.dtype == torch.float32 and digits.dtype == torch.int64
    assert strokes.min() >= 0 and strokes.max() <= 1
    bunch = load_digits()
    small = torch.nn.functional.avg_pool2d(strokes[:1, None], 4)[0, 0]
    assert digits[0] == bunch.target[0]
    assert (small - torch.from_numpy(bunch.images[0] / 16).float()).abs().mean() < 0.05
    # Enlarging by repetition would leave steps as high as the ink.
    assert (strokes[:, :, 1:] - strokes[:, :, :-1]).abs().max() < 0.6


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="validation"):
        handwriting.load_strokes("validation")


def test_tint_blends_between_the_two_colours():
    strokes = torch.zeros(2, 32, 32)
    strokes[0, 3, 4], strokes[1, 3, 4] = 1.0, 0.5
    colours = list(handwriting.COLOURS)
    ink = torch.tensor([colours.index("red"), colours.index("white")])
    paper = torch.tensor([colours.index("yellow"), colours.index("blue")])
    images = handwriting.tint(strokes, ink, paper)
    rgb = {name: torch.tensor(value) * 2 - 1 for name, value in handwriting.COLOURS.items()}
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    torch.testing.assert_close(images[0, :, 3, 4], rgb["red"])
    torch.testing.assert_close(images[0, :, 0, 0], rgb["yellow"])
    torch.testing.assert_close(images[1, :, 3, 4], (rgb["white"] + rgb["blue"]) / 2)


def test_captions_round_trip():
    colours = list(handwriting.COLOURS)
    example = handwriting.caption(7, colours.index("red"), colours.index("yellow"))
    assert example == "a red handwritten seven on a yellow background"
    seen = set()
    for digit in range(10):
        for ink in range(8):
            for paper in range(8):
                text = handwriting.caption(digit, ink, paper)
                assert handwriting.parse_caption(text) == (digit, ink, paper)
                seen.add(text)
    assert len(seen) == 640


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "does not read"),
        ("a red seven on a yellow background", "does not read"),
        ("a red handwritten seven on a yellow paper", "does not read"),
        ("a red handwritten eleven on a yellow background", "'eleven' is not a digit word"),
        ("a beige handwritten seven on a yellow background", "'beige' is not a known colour"),
        ("a red handwritten seven on a beige background", "'beige' is not a known colour"),
    ],
)
def test_other_captions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        handwriting.parse_caption(text)


def test_draw_is_a_function_of_the_seed():
    first, again, other = (handwriting.draw("test", 300, seed) for seed in (5, 5, 6))
    assert first["captions"] == again["captions"] and torch.equal(first["images"], again["images"])
    assert first["captions"] != other["captions"]
    assert first["images"].shape == (300, 3, 32, 32)
    assert (first["foregrounds"] != first["backgrounds"]).all()
    for name, top in (("digits", 10), ("foregrounds", 8), ("backgrounds", 8)):
        assert set(first[name].tolist()) == set(range(top)), name
    labels = zip(*(first[name].tolist() for name in ("digits", "foregrounds", "backgrounds")), strict=True)
    assert first["captions"] == [handwriting.caption(*label) for label in labels]


def read_tar(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def test_shards_hold_every_scan_in_different_colours(tmp_path):
    paths = handwriting.write_shards(tmp_path, seed=1, copies=2, samples_per_shard=1200)
    count = 2 * len(handwriting.load_strokes("train")[0])
    assert [path.name for path in paths] == [f"handwriting-{n:05d}.tar" for n in range(-(-count // 1200))]
    assert sorted(tmp_path.iterdir()) == paths
    parts = [read_tar(path) for path in paths]
    assert [len(part) for part in parts] == [3600, 3600, 3 * (count - 2400)]
    content = {name: data for part in parts for name, data in part.items()}
    assert len(content) == 3 * count
    seen = {}
    for name in content:
        key, extension = name.split(".")
        if extension != "png":
            continue
        image = np.asarray(Image.open(io.BytesIO(content[name])))
        assert image.shape == (32, 32, 3) and json.loads(content[f"{key}.json"]) == {"width": 32, "height": 32}
        digit, ink, paper = handwriting.parse_caption(content[f"{key}.txt"].decode())
        assert ink != paper
        seen[image.tobytes()] = digit
    assert len(seen) == count
    digits = handwriting.load_strokes("train")[1]
    assert np.array_equal(np.bincount(list(seen.values())), 2 * np.bincount(digits))


def test_shard_images_are_the_tinted_scans(tmp_path):
    path = handwriting.write_shards(tmp_path, seed=1, copies=1, samples_per_shard=5000)[0]
    content = read_tar(path)
    digit, ink, paper = handwriting.parse_caption(content["000000.txt"].decode())
    image = torch.from_numpy(np.array(Image.open(io.BytesIO(content["000000.png"])))).permute(2, 0, 1) / 127.5 - 1
    strokes, digits = handwriting.load_strokes("train")
    tinted = handwriting.tint(strokes, torch.full_like(digits, ink), torch.full_like(digits, paper))
    distance = (tinted - image).abs().amax(dim=(1, 2, 3))
    assert distance.min() <= 0.5 / 127.5 + 1e-6
    assert digits[distance.argmin()] == digit


def test_shards_are_reproducible_and_stale_ones_go(tmp_path):
    first = handwriting.write_shards(tmp_path / "a", seed=3, copies=1, samples_per_shard=500)
    again = handwriting.write_shards(tmp_path / "b", seed=3, copies=1, samples_per_shard=500)
    other = handwriting.write_shards(tmp_path / "c", seed=4, copies=1, samples_per_shard=500)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != other[0].read_bytes()
    fewer = handwriting.write_shards(tmp_path / "a", seed=3, copies=1, samples_per_shard=1000)
    assert len(fewer) < len(first) and sorted((tmp_path / "a").iterdir()) == fewer


@pytest.mark.parametrize("arguments, name", [({"copies": 0}, "copies"), ({"copies": 57}, "copies"),
                                             ({"samples_per_shard": 0}, "samples_per_shard")])  # fmt: skip
def test_bad_shard_sizes_are_refused(tmp_path, arguments, name):
    with pytest.raises(ValueError, match=name):
        handwriting.write_shards(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())
