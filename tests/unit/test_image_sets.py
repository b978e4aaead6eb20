"""Folders and arrays of images: what is read, in which blocks, and every mistake in one sentence."""

import threading

import numpy as np
import pytest
from PIL import Image

from brisk import image_sets
from brisk.image_sets import open_images
from brisk.options import UserError

pytestmark = pytest.mark.quick


def pictures(count, height=6, width=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write(folder, names, images):
    for name, image in zip(names, images, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def read(images, batch_size=4, rank=0, world=1):
    return [(numbers, batch.copy()) for numbers, batch in images.batches(batch_size, rank, world)]


def test_a_folder_is_read_to_the_bottom_in_the_order_of_paths(tmp_path):
    values = pictures(7)
    write(tmp_path, ["b/2.png", "a.PNG", "c.bmp", "b/1.png", "grid_batch0000.png", ".half.png", ".cache/x.png"], values)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path)
    assert images.names == ["a.PNG", "b/1.png", "b/2.png", "c.bmp"]
    assert (len(images), images.size, images.unreadable) == (4, (4, 6), [])
    ((numbers, batch),) = read(images)
    assert numbers == [0, 1, 2, 3] and batch.dtype == np.uint8
    np.testing.assert_array_equal(batch, values[[1, 3, 0, 2]])
    assert open_images(str(tmp_path), pattern="b/*").names == ["b/1.png", "b/2.png"]


def test_a_list_of_files_keeps_its_order(tmp_path):
    values = pictures(3)
    write(tmp_path, ["a/1.png", "b/0.png", "grid_batch0.png"], values)
    files = [tmp_path / "b/0.png", tmp_path / "a/1.png", tmp_path / "lost.png", tmp_path / "grid_batch0.png"]
    images = open_images(files)
    assert images.names == [str(file) for file in files] and images.unreadable == [str(files[2])]
    ((numbers, batch),) = read(images)
    assert numbers == [0, 1, 3]
    np.testing.assert_array_equal(batch, values[[1, 0, 2]])
    with pytest.raises(UserError, match="none of the 0 images of --images can be read."):
        open_images([])


def test_every_format_and_mode_becomes_rgb(tmp_path):
    colour = Image.new("RGB", (8, 8), (200, 30, 90))
    for name in ("a.jpg", "b.jpeg", "c.webp", "d.bmp", "e.png"):
        colour.save(tmp_path / name)
    colour.convert("L").save(tmp_path / "f.png")
    colour.convert("P").save(tmp_path / "g.png")
    colour.convert("RGBA").save(tmp_path / "h.png")
    ((_, batch),) = read(open_images(tmp_path), 8)
    assert batch.shape == (8, 8, 8, 3)
    assert np.abs(batch[[0, 1, 2, 3, 4, 7]].astype(int) - (200, 30, 90)).max() < 8
    assert len(set(batch[5, 0, 0])) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_do_not_depend_on_the_number_of_processes(tmp_path, world):
    write(tmp_path, [f"{n:02d}.png" for n in range(11)], pictures(11))
    (tmp_path / "05.png").write_bytes((tmp_path / "05.png").read_bytes()[:60])  # the header is whole
    np.savez(tmp_path / "all.npz", pictures(11))
    for source, missing in ((tmp_path, {5}), (tmp_path / "all.npz", set())):
        sets = [open_images(source) for _ in range(world)]
        found = [batch for rank in range(world) for batch in read(sets[rank], 3, rank, world)]
        blocks = {tuple(numbers): batch for numbers, batch in found}
        wanted = [tuple(n for n in range(first, min(first + 3, 11)) if n not in missing) for first in range(0, 11, 3)]
        assert sorted(blocks) == sorted(wanted)
        for numbers, batch in blocks.items():
            np.testing.assert_array_equal(batch, pictures(11)[list(numbers)])
        assert sum((images.unreadable for images in sets), []) == [f"{n:02d}.png" for n in missing]


def test_unreadable_images_are_left_out_and_named_once(tmp_path):
    write(tmp_path, [f"{n}.png" for n in range(5)], pictures(5))
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:60])
    images = open_images(tmp_path)
    assert images.unreadable == ["1.png"] and len(images) == 5
    for _ in range(2):
        assert [numbers for numbers, _ in read(images, 2)] == [[0], [2], [4]]
    assert images.unreadable == ["1.png", "3.png"]
    # a block without any is no batch
    assert [numbers for numbers, _ in read(images, 1)] == [[0], [2], [4]]


def test_nothing_readable_is_an_error(tmp_path):
    write(tmp_path, ["0.png", "1.png"], pictures(2))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="none of the 2 images of --images .* can be decoded"):
        read(open_images(tmp_path))
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 images of --reference .* can be read, e.g. 0.png"):
        open_images(tmp_path, flag="--reference")


def test_resizing_is_pillows_with_antialiasing_and_ignores_the_aspect_ratio(tmp_path):
    tall, wide = pictures(1, 24, 16)[0], pictures(1, 12, 40, seed=1)[0]
    write(tmp_path, ["a.png", "b.png"], [tall, wide])
    images = open_images(tmp_path, resize=8)
    ((_, batch),) = read(images)
    assert images.size == (8, 8)
    for image, found in zip((tall, wide), batch, strict=True):
        np.testing.assert_array_equal(found, np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BICUBIC)))
    images = open_images(tmp_path, resize=(8, 12), resize_filter="box")
    assert images.size == (8, 12) and read(images)[0][1].shape == (2, 12, 8, 3)
    means = tall.reshape(12, 2, 8, 2, 3).mean((1, 3), dtype=np.float64)
    np.testing.assert_allclose(read(images)[0][1][0], means, atol=1)  # Pillow rounds after each direction
    np.savez(tmp_path / "tall.npz", tall[None])
    ((_, batch),) = read(open_images(tmp_path / "tall.npz", resize=8, resize_filter="lanczos"))
    np.testing.assert_array_equal(batch[0], np.asarray(Image.fromarray(tall).resize((8, 8), Image.Resampling.LANCZOS)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "arrays", [{"arr_0": 0, "images": 1}, {"samples": 0, "images": 1, "x": 1}, {"images": 0, "label": 1}, {"only": 0}]
)
def test_the_array_of_images_is_found_by_its_name(tmp_path, arrays, save):
    values = (pictures(5), np.zeros(5))
    save(tmp_path / "set.npz", **{name: values[which] for name, which in arrays.items()})
    images = open_images(tmp_path / "set.npz")
    assert (len(images), images.size, images.names[4]) == (5, (4, 6), "set.npz[4]")
    for _ in range(2):  # the second pass goes back to the start
        np.testing.assert_array_equal(np.concatenate([batch for _, batch in read(images, 2)]), values[0])


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 6, 4, 1)])
def test_grey_arrays_become_rgb(tmp_path, shape):
    grey = pictures(3)[..., :1]
    np.savez(tmp_path / "grey.npz", grey.reshape(shape))
    ((_, batch),) = read(open_images(tmp_path / "grey.npz"))
    np.testing.assert_array_equal(batch, grey.repeat(3, axis=3))


def test_an_array_is_not_taken_into_memory_as_a_whole(tmp_path, monkeypatch):
    np.savez(tmp_path / "many.npz", pictures(200, 32, 32))
    monkeypatch.setattr(np, "load", None)
    batches = open_images(tmp_path / "many.npz").batches(10, rank=1, world=2)
    assert next(batches)[0] == list(range(10, 20))


def test_mixed_sizes_are_refused_with_an_example_of_two(tmp_path):
    write(tmp_path, ["a.png", "b.png"], pictures(2, 32, 32))
    write(tmp_path, ["c.png"], pictures(1, 64, 48))
    said = r"2 sizes, as 2 of 32x32 \(a.png\) and 1 of 48x64 \(c.png\); give --resize N"
    with pytest.raises(UserError, match=said):
        open_images(tmp_path)
    assert open_images(tmp_path, resize=32).size == (32, 32)


def bad_arrays(folder):
    np.savez(folder / "float.npz", pictures(2).astype(np.float32))
    np.savez(folder / "planes.npz", pictures(2).transpose(0, 3, 1, 2))
    np.savez(folder / "empty.npz", pictures(2)[:0])
    np.savez(folder / "two.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    np.savez(folder / "objects.npz", np.array([{}, {}], dtype=object))
    np.savez(folder / "fortran.npz", np.asfortranarray(pictures(2)))
    (folder / "text.npz").write_text("no archive")
    np.savez(folder / "cut.npz", pictures(2))
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:200])
    (folder / "empty").mkdir()
    (folder / "image.png").write_bytes(b"")


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("float.npz", {}, r"holds arr_0 of shape \(2, 6, 4, 3\) and type float32; images must be uint8"),
        ("planes.npz", {}, r"shape \(2, 3, 6, 4\) and type uint8"),
        ("empty.npz", {}, r"shape \(0, 6, 4, 3\)"),
        ("two.npz", {}, "holds mu, sigma; it must hold one array of images, or one named arr_0 or samples or images"),
        ("objects.npz", {}, r"shape \(2,\) and type object"),
        ("fortran.npz", {}, "in Fortran order"),
        ("text.npz", {}, "cannot be read as an .npz file"),
        ("cut.npz", {}, "cannot be read as an .npz file"),
        ("empty", {}, r"holds no images \(.png .jpg .jpeg .webp .bmp\)\."),
        ("empty", {"pattern": "a/*.png"}, "holds no images .* whose path matches 'a/\\*.png'"),
        ("empty", {"pattern": "/*"}, "'/\\*' cannot be looked for"),
        ("image.png", {}, "neither a folder nor an .npz"),
        ("nowhere", {}, "--images .*nowhere does not exist"),
        ("empty", {"resize_filter": "sinc"}, "--resize_filter is sinc; it must be one of bicubic"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, name, settings, message):
    bad_arrays(tmp_path)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / name, **settings)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_array_is_told(tmp_path, save):
    """Damage in a compressed file makes a wrong checksum or a code that cannot be, by its place."""
    save(tmp_path / "set.npz", pictures(400, 32, 32) // 64)
    whole = (tmp_path / "set.npz").read_bytes()
    for place in range(20_000, 300_000, 15_000):
        (tmp_path / "set.npz").write_bytes(whole[:place] + b"\xff" * 100 + whole[place + 100 :])
        with pytest.raises(UserError, match="--images .*set.npz is damaged"):
            read(open_images(tmp_path / "set.npz"))


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    write(tmp_path, ["0.png", "1.png"], pictures(2))
    decoded, lock = [], threading.Lock()
    real = image_sets._decode

    def watched(path, resized):
        with lock:
            decoded.append(path.name)
        return real(path, resized)

    monkeypatch.setattr(image_sets, "_decode", watched)
    images = open_images(tmp_path)
    assert decoded == []
    read(images)
    assert sorted(decoded) == ["0.png", "1.png"]
