"""Folders of generated images: files that are whole or not there, what they were made with, pictures of several."""

import json

from brisk.options import UserError


def read_json(path):
    """What a JSON file holds; {} if there is no such file or it holds no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_settings(folder, file, settings, remedy):
    """UserError if the "settings" in `folder` / `file` differ from these; `remedy`: what to do about it."""
    for name, before in read_json(folder / file).get("settings", {}).items():
        if name in settings and settings[name] != before:
            name, pair = name.replace("_", " "), f"is {before}, not {settings[name]}"
            difference = f"whose {name} {pair}" if len(pair) <= 200 else f"made with other {name}"
            raise UserError(f"{folder} holds samples {difference}: {remedy}.")


def save(path, values, quality=None):
    """Write a picture (H, W, 3) as .png, or as .jpg of `quality`, or latents as .npy, so that no half-written file can be seen."""
    import numpy as np
    from PIL import Image

    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    if path.suffix == ".jpg":
        Image.fromarray(values).save(temporary, quality=quality)
    elif path.suffix == ".png":
        Image.fromarray(values).save(temporary)
    else:
        np.save(temporary, values)
    temporary.replace(path)


def quantise(images):
    """Images (B, 3, H, W) in about [-1, 1] -> (B, H, W, 3) uint8 on the CPU: round(255 clamp((x + 1) / 2))."""
    levels = (255 * ((images.float() + 1) / 2).clamp(0, 1)).round()
    return levels.byte().permute(0, 2, 3, 1).cpu().numpy()


def tile(images):
    """One picture of `images` (B, H, W, 3), floor(sqrt(B)) of them in a row."""
    import numpy as np

    columns = int(len(images) ** 0.5)
    missing = -len(images) % columns
    images = np.concatenate([images, np.zeros_like(images[:1]).repeat(missing, 0)])
    rows = [np.concatenate(list(images[first : first + columns]), 1) for first in range(0, len(images), columns)]
    return np.concatenate(rows, 0)


def picture_file(folder, seed, subdirs=True):
    """Where the picture of a seed goes: {seed:06d}.png, in a folder per 1000 seeds where `subdirs`."""
    return folder / (f"{seed - seed % 1000:06d}" if subdirs else "") / f"{seed:06d}.png"


def grid_file(folder, number):
    """Where the picture of a whole batch goes."""
    return folder / f"grid_batch{number:04d}.png"


def intermediate(folder):
    """Where unfinished states go: not into `folder`, whose pictures evaluators take to be the samples."""
    return folder.with_name(f"{folder.name}_inters")


def unfinished_file(folder, file, suffix):
    """Where the picture of an unfinished state goes whose finished one is `file` below `folder`."""
    return intermediate(folder) / file.relative_to(folder).with_stem(file.stem + suffix)


def is_drawn(folder, file, suffixes=()):
    """Whether `file` below `folder` is there, and the pictures of its unfinished states with these `suffixes`."""
    return file.exists() and all(unfinished_file(folder, file, suffix).exists() for suffix in suffixes)


def named(folder, files, pictures):
    """[(path, picture)] of batches [(suffix, (B, H, W, 3))] for the `files` below `folder`; with a suffix in `intermediate`.

    Their folders are made.
    """
    found = []
    for suffix, values in pictures:
        for file, value in zip(files, values, strict=True):
            path = unfinished_file(folder, file, suffix) if suffix else file
            path.parent.mkdir(parents=True, exist_ok=True)
            found.append((path, value))
    return found


def pictures_in(folder):
    """The files in `folder` that `picture_file` and `grid_file` name, and those named after them."""
    return [path for pattern in ("[0-9]*/[0-9]*.png", "[0-9]*.png", "grid_batch*.png") for path in folder.glob(pattern)]
