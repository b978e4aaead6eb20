"""From the flags that name a model to its `denoisers.Denoiser`."""

from typing import NamedTuple

import torch

from brisk import denoisers
from brisk.options import UserError


class ModelOptions(NamedTuple):
    """The values of the flags of `epd_options.add_model_options` that say which model it is."""

    dataset_name: str | None = None
    backend: str | None = None
    source: str | None = None  # --pretrained_model_name_or_path
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    resolution: int | None = None
    gmm_file: str | None = None


def load(wanted, device="cpu", dtype=torch.float32):
    """The frozen `denoisers.Denoiser` of `ModelOptions`, its network in `dtype`. UserError."""
    if wanted.gmm_file:
        return denoisers.load_mixture(wanted.gmm_file, device)
    raise UserError("give --gmm_file.")
