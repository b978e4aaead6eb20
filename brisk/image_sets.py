"""Images to be measured: a folder of pictures, a list of them or an array in an .npz file, read in fixed blocks.

A block holds the same images however many processes read, so that features do not depend on their number.
Letters: N images, B images of a block, H height, W width.
"""

import os
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from brisk.options import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR, "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX, "nearest": Image.Resampling.NEAREST,
}  # fmt: skip
ARRAYS = ("arr_0", "samples", "images")  # names of the array of images in an .npz file, in order of preference
READERS = min(8, os.cpu_count() or 1)


class Resize(NamedTuple):
    """How images are brought to one size; `size` None leaves them as they are."""

    size: tuple | None  # (W, H)
    filter: Image.Resampling

    def apply(self, image):
        """A PIL image in the size (W, H), its aspect ratio ignored; smaller ones are antialiased."""
        return image if self.size in (None, image.size) else image.resize(self.size, self.filter)


class ImageSet:
    """N images of one size. `names`: of all of them; `unreadable`: of those left out, as far as they have been met."""

    def __init__(self, source, names, size, read_block, unreadable=()):
        """Args: `size` (W, H); `read_block`: list of numbers -> list of uint8 arrays (H, W, 3), None where unreadable."""
        self.source, self.names, self.size, self.unreadable = source, names, size, list(unreadable)
        self._read_block = read_block

    def __len__(self):
        """N, unreadable ones included: an image keeps its number whatever happens to the others."""
        return len(self.names)

    def batches(self, batch_size, rank=0, world=1):
        """Yield (numbers, uint8 array (B, H, W, 3)) of the readable images in blocks of `batch_size` numbers.

        Block b is read by process b % `world`; names of images that cannot be decoded go to `unreadable` of that process.
        UserError where none of all can be decoded.
        """
        starts = range(rank * batch_size, len(self), world * batch_size)
        blocks = [list(range(first, min(first + batch_size, len(self)))) for first in starts]
        with ThreadPoolExecutor(1) as ahead:  # the next block is decoded while this one is used
            coming = [ahead.submit(self._read_block, numbers) for numbers in blocks[:1]]
            for place, numbers in enumerate(blocks):
                images = coming.pop().result()
                coming += [ahead.submit(self._read_block, following) for following in blocks[place + 1 : place + 2]]
                bad = [self.names[n] for n, image in zip(numbers, images, strict=True) if image is None]
                self.unreadable += [name for name in bad if name not in self.unreadable]
                if len(bad) < len(numbers):
                    kept = [(n, image) for n, image in zip(numbers, images, strict=True) if image is not None]
                    yield [n for n, _ in kept], np.stack([image for _, image in kept])
        if len(self.unreadable) == len(self):
            raise UserError(f"none of the {len(self):,} images of {self.source} can be decoded.")


def open_images(source, pattern=None, flag="--images", resize=None, resize_filter="bicubic"):
    """The `ImageSet` of a folder, of an .npz file with uint8 images (N, H, W, 3), (N, H, W, 1) or (N, H, W), or of a list of files.

    Of files nothing but the headers is read now. Folders are searched to the bottom for `SUFFIXES`, or for `pattern` like
    **/*.png; their images are in the order of their paths, those of a list in its own; grid_batch*.png (pictures of several)
    and dot files of a folder are left out.
    Args: `flag`: for messages; `resize`: a side, or (W, H), to which images are brought by the Pillow filter `resize_filter`.
    UserError for what is missing, empty, of mixed sizes, or no image.
    """
    if resize_filter not in FILTERS:
        raise UserError(f"--resize_filter is {resize_filter}; it must be one of {', '.join(FILTERS)}.")
    size = (resize, resize) if isinstance(resize, int) else resize and tuple(resize)
    resized = Resize(size, FILTERS[resize_filter])
    if isinstance(source, (list, tuple)):
        return _open_files([Path(file) for file in source], [str(file) for file in source], flag, resized)
    path = Path(source)
    if path.is_dir():
        files = _find(path, pattern, flag)
        return _open_files(files, [file.relative_to(path).as_posix() for file in files], f"{flag} {path}", resized)
    if path.is_file() and path.suffix == ".npz":
        return _open_array(path, flag, resized)
    if path.exists():
        raise UserError(f"{flag} {path} is neither a folder nor an .npz file.")
    raise UserError(f"{flag} {path} does not exist; give a folder of images or an .npz file.")


def _open_files(paths, names, source, resized):
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(_size, paths))
    unreadable = [name for name, size in zip(names, sizes, strict=True) if size is None]
    if len(unreadable) == len(names):
        raise UserError(f"none of the {len(names):,} images of {source} can be read{f', e.g. {names[0]}' if names else ''}.")
    counts = Counter(size for size in sizes if size is not None)
    if len(counts) > 1 and not resized.size:
        (large, many), (small, few) = counts.most_common(2)
        raise UserError(
            f"{source} holds images of {len(counts)} sizes, as {many:,} of {large[0]}x{large[1]} "
            f"({names[sizes.index(large)]}) and {few:,} of {small[0]}x{small[1]} ({names[sizes.index(small)]}); give --resize N."
        )

    def read_block(numbers):
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(lambda number: _decode(paths[number], resized), numbers))

    return ImageSet(source, names, resized.size or next(iter(counts)), read_block, unreadable)


def _find(folder, pattern, flag):
    """The image files below `folder` by their paths in it."""
    try:
        found = folder.glob(pattern or "**/*")
        files = [(path.relative_to(folder), path) for path in found if path.suffix.lower() in SUFFIXES and path.is_file()]
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"'{pattern}' cannot be looked for in {flag} {folder} ({error}); give a pattern like **/*.png.") from None
    shown = {name.as_posix(): path for name, path in files
             if not name.match("grid_batch*.png") and not any(part.startswith(".") for part in name.parts)}  # fmt: skip
    if not shown:
        matching = f" whose path matches '{pattern}'" if pattern else ""
        raise UserError(f"{flag} {folder} holds no images ({' '.join(SUFFIXES)}){matching}.")
    return [shown[name] for name in sorted(shown)]


def _opened(path, use):
    """`use(image)` of an image file, None if Pillow cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return use(image)
    except Exception:  # Pillow's decoders raise many kinds
        return None


def _size(path):
    return _opened(path, lambda image: image.size)


def _decode(path, resized):
    return _opened(path, lambda image: np.asarray(resized.apply(image.convert("RGB"))))


def _open_array(path, flag, resized):
    name, shape, data_start = _array_of(path, flag)
    shape = (*shape, 1) if len(shape) == 3 else shape
    count, height, width, channels = shape
    stream = zipfile.ZipFile(path).open(name)

    def read(number):
        stream.seek(data_start + number * height * width * channels)
        pixels = np.frombuffer(stream.read(height * width * channels), np.uint8).reshape(height, width, channels)
        pixels = np.repeat(pixels, 3, axis=2) if channels == 1 else pixels
        return np.asarray(resized.apply(Image.fromarray(pixels)))

    def read_block(numbers):
        try:
            return [read(number) for number in numbers]
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{flag} {path} is damaged ({error}).") from None

    names = [f"{path.name}[{number}]" for number in range(count)]
    return ImageSet(f"{flag} {path}", names, resized.size or (width, height), read_block)


def _array_of(path, flag):
    """(member of the zip file, shape, byte where its values start) of the images in an .npz file.

    The array is read from there in parts: 50,000 images of 512 pixels take 39 GB as a whole. UserError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            chosen = next((name for name in ARRAYS if name in names), names[0] if len(names) == 1 else None)
            if chosen is None:
                held, known = ", ".join(names) or "no array", " or ".join(ARRAYS)
                raise UserError(f"{flag} {path} holds {held}; it must hold one array of images, or one named {known}.")
            with archive.open(f"{chosen}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, transposed, dtype = header[version](stream)
                start = stream.tell()
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        raise UserError(f"{flag} {path} cannot be read as an .npz file of numpy.") from None
    fits = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    if dtype != np.uint8 or transposed or not fits or 0 in shape:
        order = " in Fortran order" if transposed else ""
        raise UserError(f"{flag} {path} holds {chosen} of shape {shape} and type {dtype}{order}; images must be uint8 of shape "
                        "(N, H, W, 3), (N, H, W, 1) or (N, H, W).")  # fmt: skip
    return f"{chosen}.npy", shape, start
