"""The built-in data set: scikit-learn's scanned digits, enlarged to 32x32 and tinted in two of eight named colours."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_SIZE = 32
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "black": (0.06, 0.06, 0.08),
    "white": (0.96, 0.96, 0.94),
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.62, 0.20),
    "blue": (0.12, 0.25, 0.88),
    "yellow": (0.98, 0.86, 0.12),
    "cyan": (0.12, 0.80, 0.86),
    "magenta": (0.86, 0.20, 0.78),
}
# One scan in six of each digit is kept out of everything that is trained.
HELD_OUT_EVERY = 6
# The images by class are on this paper: their colours are no part of the class, and 56 pairs of them are harder than the digits.
CLASS_PAPER = "black"


def load_strokes(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (strokes (N, 32, 32) float32 in [0, 1], digits (N,) int64) of the fixed split "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}.')
    from sklearn.datasets import load_digits

    bunch = load_digits()
    held_out = np.zeros(len(bunch.target), dtype=bool)
    for digit in range(10):
        held_out[np.flatnonzero(bunch.target == digit)[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    chosen = held_out if split == "test" else ~held_out
    size = (IMAGE_SIZE, IMAGE_SIZE)
    scans = (bunch.images[chosen] / 16.0).astype(np.float32)
    strokes = np.stack([np.asarray(Image.fromarray(scan).resize(size, Image.Resampling.BICUBIC)) for scan in scans])
    return torch.from_numpy(strokes.clip(0.0, 1.0)), torch.from_numpy(bunch.target[chosen].astype(np.int64))


def tint(strokes: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Blend strokes (N, 32, 32) in [0, 1] between two colours given as (N,) indices into COLOURS.

    Returns float32 images (N, 3, 32, 32) in [-1, 1]."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    ink = palette[foreground][:, :, None, None]
    paper = palette[background][:, :, None, None]
    weight = strokes.float()[:, None]
    return (paper + weight * (ink - paper)) * 2.0 - 1.0


def caption(digit: int, foreground: int, background: int) -> str:
    """Describe an image, for example "a red handwritten seven on a yellow background"."""
    names = list(COLOURS)
    return f"a {names[foreground]} handwritten {DIGIT_WORDS[digit]} on a {names[background]} background"


def parse_caption(text: str) -> tuple[int, int, int]:
    """Invert `caption`: return (digit, foreground, background), or raise ValueError saying what is wrong."""
    words = text.split()
    names = list(COLOURS)
    if len(words) != 8 or [words[i] for i in (0, 2, 4, 5, 7)] != ["a", "handwritten", "on", "a", "background"]:
        raise ValueError(f'{text!r} does not read "a COLOUR handwritten DIGIT on a COLOUR background".')
    if words[3] not in DIGIT_WORDS:
        raise ValueError(f"{words[3]!r} is not a digit word; use one of {', '.join(DIGIT_WORDS)}.")
    for word in (words[1], words[6]):
        if word not in COLOURS:
            raise ValueError(f"{word!r} is not a known colour; use one of {', '.join(COLOURS)}.")
    return DIGIT_WORDS.index(words[3]), names.index(words[1]), names.index(words[6])


def draw(split: str, count: int, seed: int, paper: str | None = None) -> dict:
    """Draw `count` tinted images with replacement, the same ones for the same seed; with `paper` all on that colour.

    Returns images (count, 3, 32, 32) in [-1, 1], captions (list of str), and int64 tensors digits, foregrounds and
    backgrounds (count,); the two colours of an image always differ."""
    return draw_from(*load_strokes(split), count, torch.Generator().manual_seed(seed), paper)


def draw_from(
    strokes: torch.Tensor, digits: torch.Tensor, count: int, generator: torch.Generator, paper: str | None = None
) -> dict:
    """Do what `draw` does with strokes (N, 32, 32) and digits (N,) already in memory."""
    which = torch.randint(len(strokes), (count,), generator=generator)
    foregrounds = torch.randint(len(COLOURS), (count,), generator=generator)
    offset = torch.randint(1, len(COLOURS), (count,), generator=generator)
    backgrounds = (foregrounds + offset) % len(COLOURS)
    if paper:
        backgrounds = torch.full((count,), list(COLOURS).index(paper))
        foregrounds = (backgrounds + offset) % len(COLOURS)
    digits = digits[which]
    rows = zip(digits.tolist(), foregrounds.tolist(), backgrounds.tolist(), strict=True)
    return {
        "images": tint(strokes[which], foregrounds, backgrounds),
        "captions": [caption(*item) for item in rows],
        "digits": digits,
        "foregrounds": foregrounds,
        "backgrounds": backgrounds,
    }


def _train_samples(seed, copies, papers):
    """[(stroke (32, 32), digit, ink, paper)] of the train split, each scan in `copies` colour pairs, in one shuffled order."""
    pairs = [(ink, paper) for ink in range(len(COLOURS)) for paper in papers if ink != paper]
    if not 1 <= copies <= len(pairs):
        raise ValueError(f"copies must be between 1 and {len(pairs)}, got {copies}.")
    strokes, digits = load_strokes("train")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(len(pairs), generator=generator)[:copies] for _ in strokes])
    places = [divmod(place, copies) for place in torch.randperm(chosen.numel(), generator=generator).tolist()]
    return [(strokes[row], int(digits[row]), *pairs[int(chosen[row, copy])]) for row, copy in places]


def write_shards(folder: str | Path, seed: int = 0, copies: int = 4, samples_per_shard: int = 1000) -> list[Path]:
    """Write the train split as WebDataset shards `handwriting-00000.tar`, ...; return their paths.

    Each scan appears in `copies` different colour pairs (1 to 56), in one shuffled order. A sample is KEY.png, KEY.txt
    (caption) and KEY.json (width, height). Equal arguments give equal bytes. Each shard is written under a temporary
    name and renamed; shards of an earlier call with more of them are removed."""
    samples = _train_samples(seed, copies, range(len(COLOURS)))
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard must be at least 1, got {samples_per_shard}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(samples), samples_per_shard):
        path = folder / f"handwriting-{len(paths):05d}.tar"
        temporary = path.with_suffix(".tar.partial")
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(samples[start : start + samples_per_shard], start):
                _add_sample(tar, f"{number:06d}", *sample)
        temporary.replace(path)
        paths.append(path)
    for stale in set(folder.glob("handwriting-?????.tar")) - set(paths):
        stale.unlink()
    return paths


def write_class_folders(folder: str | Path, seed: int = 0, copies: int = 4) -> int:
    """Write the train split on `CLASS_PAPER` as FOLDER/0/NUMBER.png ... FOLDER/9/NUMBER.png by digit; return how many images.

    Each scan appears in `copies` different inks (1 to 7). Equal arguments give equal bytes."""
    samples = _train_samples(seed, copies, [list(COLOURS).index(CLASS_PAPER)])
    for digit in range(len(DIGIT_WORDS)):
        (Path(folder) / str(digit)).mkdir(parents=True, exist_ok=True)
    for number, (stroke, digit, ink, paper) in enumerate(samples):
        _picture(stroke, ink, paper).save(Path(folder) / str(digit) / f"{number:06d}.png")
    return len(samples)


def _picture(stroke, ink, paper):
    image = tint(stroke[None], torch.tensor([ink]), torch.tensor([paper]))[0]
    return Image.fromarray(((image + 1.0) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _add_sample(tar: tarfile.TarFile, key: str, stroke: torch.Tensor, digit: int, ink: int, paper: int) -> None:
    png = io.BytesIO()
    _picture(stroke, ink, paper).save(png, format="PNG")
    sizes = json.dumps({"width": IMAGE_SIZE, "height": IMAGE_SIZE})
    parts = (("png", png.getvalue()), ("txt", caption(digit, ink, paper).encode()), ("json", sizes.encode()))
    for extension, content in parts:
        # A fresh TarInfo has mtime 0 and no owner, so that the same call gives the same bytes.
        entry = tarfile.TarInfo(f"{key}.{extension}")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
