"""Networks that turn images into feature vectors for distances between sets of images.

Weights come from local files alone; TorchScript is loaded, which holds a network and no Python.
Letters: B images, H height, W width, D features, C classes.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from brisk import builtin_protocol
from brisk.options import UserError

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SIDE = 299
NAMES = ("inception", "handwriting", "torchscript")


class Extractor(NamedTuple):
    """A loaded network. `read` maps a uint8 array (B, H, W, 3) to (features (B, D), probabilities (B, C) or None).

    Both are float32 CPU tensors; the probabilities, of inception alone, are asked for by `with_probabilities=True`.
    """

    name: str
    dimensions: int | None  # D; None of torchscript, whose images alone tell
    read: Callable  # (images, with_probabilities=False)
    digest: str  # of the file of weights, for the record


def load(name, weights=None, device="cpu", clean=False):
    """The `Extractor` of a name in `NAMES`.

    Args: `weights`: inception: the file of `INCEPTION_URL`, a TorchScript module of images (B, 3, H, W) in 0..255 with flags
    return_features and no_output_bias; torchscript: any such module of uint8 images that gives (B, D); handwriting: a folder
    with an oracle, None for the built-in one. `clean`: inception reads images that Pillow has resized to 299x299 by an
    antialiased bicubic filter (clean-fid, arXiv 2104.11222), not by the network's own bilinear one. UserError.
    """
    if name not in NAMES:
        raise UserError(f"there is no feature extractor {name}; there are {', '.join(NAMES)}.")
    if clean and name != "inception":
        raise UserError(f"clean resizing is for the extractor inception, not for {name}.")
    device = torch.device(device)
    if name == "handwriting":
        return _handwriting(Path(weights or builtin_protocol.ORACLE), device)
    if not weights or not Path(weights).is_file():
        lost = f"{weights} is no file" if weights else "no file is given"
        where = f"get inception-2015-12-05.pt from {INCEPTION_URL}" if name == "inception" else "save a network by torch.jit.save"
        raise UserError(f"the extractor {name} needs a TorchScript file, {lost}; {where} and give --weights {name}=FILE.")
    content = Path(weights).read_bytes()
    try:
        module = torch.jit.load(io.BytesIO(content), map_location=device).eval()
    except (RuntimeError, ValueError):
        raise UserError(f"--weights {name}={weights} is no TorchScript file.") from None
    flag, digest = f"--weights {name}={weights}", _digest(content)
    return _inception(module, flag, digest, device, clean) if name == "inception" else _torchscript(module, flag, digest, device)


def _inception(module, flag, digest, device, clean):
    @torch.no_grad()
    def read(images, with_probabilities=False):
        given = (resize_clean(images) if clean else torch.tensor(images).permute(0, 3, 1, 2)).to(device)
        features = _called(flag, module, given, return_features=True)
        # the flag leaves out the bias before the softmax, as the original inception score does
        probabilities = _called(flag, module, given, no_output_bias=True) if with_probabilities else None
        return features, probabilities

    dimensions = read(np.zeros((1, INCEPTION_SIDE, INCEPTION_SIDE, 3), np.uint8))[0].shape[1]
    return Extractor("inception", dimensions, read, digest)


def _torchscript(module, flag, digest, device):
    @torch.no_grad()
    def read(images, with_probabilities=False):
        return _called(flag, module, torch.tensor(images).permute(0, 3, 1, 2).to(device)), None

    return Extractor("torchscript", None, read, digest)


def _handwriting(folder, device):
    oracle = builtin_protocol.load_oracle(folder, f"--weights handwriting={folder}").to(device)

    @torch.no_grad()
    def read(images, with_probabilities=False):
        if images.shape[1:] != (32, 32, 3):
            size = f"{images.shape[2]}x{images.shape[1]}"
            raise UserError(f"the extractor handwriting reads images of 32x32 pixels, these have {size}; give --resize 32.")
        values = torch.tensor(images).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
        return oracle.features(values).cpu(), None

    digest = _digest((folder / "model.safetensors").read_bytes())
    return Extractor("handwriting", oracle.config["feature_dim"], read, digest)


def resize_clean(images):
    """Images (B, H, W, 3) uint8 -> (B, 3, 299, 299) float32 in 0..255 as clean-fid resizes: each colour by itself, not rounded."""
    side = (INCEPTION_SIDE, INCEPTION_SIDE)

    def resized(plane):
        return np.asarray(Image.fromarray(plane.astype(np.float32)).resize(side, Image.Resampling.BICUBIC))

    planes = [[resized(image[..., colour]) for colour in range(3)] for image in images]
    return torch.from_numpy(np.array(planes)).clamp(0, 255)


def _called(flag, module, images, **options):
    """What a module of unknown origin gives, checked: (B, D) as float32 on the CPU."""
    try:
        found = module(images, **options)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        size = f"{images.shape[3]}x{images.shape[2]}"
        remedy = "; for a network of another kind give --extractor torchscript" if options else ""
        raise UserError(f"{flag} cannot read images of {size} pixels ({_last_line(error)}){remedy}.") from None
    if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(images):
        what = f"shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
        raise UserError(f"{flag} gives {what} for {len(images)} images; features must be of shape ({len(images)}, D).")
    return found.float().cpu()


def _digest(content):
    return hashlib.sha256(content).hexdigest()[:16]


def _last_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
