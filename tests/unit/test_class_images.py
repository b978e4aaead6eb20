"""Folders of images with a class each: numbering, metadata, what is refused; the centre crop against its definition."""

import json

import numpy as np
import pytest
from PIL import Image

from brisk import class_images, tiny
from brisk.options import UserError
from brisk.samples import Skip

pytestmark = pytest.mark.quick


def folder_of(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return folder


def listed(folder, **settings):
    files, classes = class_images.list_class_images(folder, **settings)
    return [(str(path.relative_to(folder)), label) for path, label in files], classes


def test_classes_are_the_sorted_sub_folders(tmp_path):
    folder = folder_of(tmp_path, "n10/1.png", "n2/x/2.png", "n2/3.JPG", "Z/1.webp")
    (folder / ".cache").mkdir()
    files, classes = listed(folder)
    assert classes == ["Z", "n10", "n2"], "as torchvision sorts them"
    assert files == [("Z/1.webp", 0), ("n10/1.png", 1), ("n2/3.JPG", 2), ("n2/x/2.png", 2)]
    assert listed(folder, has_classes=False) == ([(name, 0) for name, _ in files], [])


def test_metadata_gives_ids_or_names(tmp_path):
    folder = folder_of(tmp_path, "a.png", "b.png", "s/c.png")
    rows = [{"file_name": "a.png", "label": 2}, {"file_name": "b.png", "label": 0}, {"file_name": "s/c.png", "label": 2}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert listed(folder) == ([("a.png", 2), ("b.png", 0), ("s/c.png", 2)], ["0", "1", "2"])
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,label\na.png,dog\nb.png,cat\n")
    with pytest.raises(UserError, match="1 of 3 images have no label in the metadata file: c.png"):
        listed(folder)
    (folder / "s/metadata.csv").write_text("file_name,label\nc.png,dog\n")
    assert listed(folder) == ([("a.png", 1), ("b.png", 0), ("s/c.png", 1)], ["cat", "dog"])
    (folder / "metadata.csv").write_text("name,label\na.png,dog\n")
    with pytest.raises(UserError, match="every row needs file_name and label"):
        listed(folder)


def test_captions_alone_leave_the_classes_to_the_folders(tmp_path):
    folder = folder_of(tmp_path, "x/a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "x/a.png", "text": "a cat"}')
    assert listed(folder) == ([("x/a.png", 0)], ["x"])


def test_images_without_a_class_and_classes_without_an_image(tmp_path):
    folder = folder_of(tmp_path, "a.png", "x/b.png")
    with pytest.raises(UserError, match="1 images of .* have no class: a.png"):
        listed(folder)
    (folder / "a.png").unlink()
    (folder / "w").mkdir()
    with pytest.raises(UserError, match="these of .* hold no image: w"):
        listed(folder)
    with pytest.raises(UserError, match="is not a folder"):
        listed(folder / "gone")
    with pytest.raises(UserError, match="holds no images"):
        listed(folder / "w")


def test_unreadable_images_are_skipped(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    rows = class_images.ClassImageRows([(tmp_path / "a.png", 0), (tmp_path / "gone.png", 0)], [])
    for number in range(2):
        with pytest.raises(Skip, match="unreadable image"):
            class_images.CutClassImage(8)(rows[number], np.random.default_rng(0))


def box(x):
    return np.where((x > -0.5) & (x <= 0.5), 1.0, 0.0)


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resampled(image, side, kernel):
    """Image (H, W, 3) with its first axis scaled to `side`: every output pixel a weighted mean, halves rounded up."""
    scale = len(image) / side
    centres, pixels = (np.arange(side) + 0.5) * scale, np.arange(len(image)) + 0.5
    weights = kernel((pixels - centres[:, None]) / max(scale, 1))
    mean = np.einsum("ij,jkc->ikc", weights / weights.sum(1, keepdims=True), image)
    return np.clip(np.floor(mean + 0.5), 0, 255)


def both_axes(image, height, width, kernel):
    across = resampled(image.transpose(1, 0, 2), width, kernel).transpose(1, 0, 2)
    return resampled(across, height, kernel)


@pytest.mark.parametrize("height, width", [(16, 16), (40, 48), (64, 32), (31, 70), (131, 200), (12, 20), (300, 128)])
def test_the_centre_crop_is_that_of_adm(height, width):
    size, image = 16, tiny.random_image(np.random.default_rng(height), height, width)
    values = np.asarray(image).astype(float)
    while min(values.shape[:2]) >= 32:
        values = both_axes(values, values.shape[0] // 2, values.shape[1] // 2, box)
    short = min(values.shape[:2])
    values = both_axes(values, round(values.shape[0] * size / short), round(values.shape[1] * size / short), cubic)
    top, left = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    found = np.asarray(class_images.adm_crop(image, size)).astype(float)
    assert found.shape == (size, size, 3)
    assert np.abs(found - values[top : top + size, left : left + size]).max() <= 1
