"""Scorers of generated images: the classifier that judges samples of the built-in handwriting data."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from brisk.handwriting import COLOURS, DIGIT_WORDS


class HandwritingOracle(nn.Module):
    """A small CNN that reads the digit and both colours of 32x32 RGB images in [-1, 1]."""

    def __init__(self, width: int = 32, feature_dim: int = 48):
        super().__init__()
        self.config = {"width": width, "feature_dim": feature_dim}
        stages, channels = [], 3
        for out in (width, 2 * width, 2 * width):
            stages += [
                nn.Conv2d(channels, out, 3, stride=1, padding=1), nn.BatchNorm2d(out), nn.SiLU(),
                nn.Conv2d(out, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.SiLU(),
            ]  # fmt: skip
            channels = out
        self.trunk = nn.Sequential(*stages)
        self.project = nn.Linear(channels * 4 * 4, feature_dim)
        self.digit_head = nn.Linear(feature_dim, len(DIGIT_WORDS))
        self.foreground_head = nn.Linear(feature_dim, len(COLOURS))
        self.background_head = nn.Linear(feature_dim, len(COLOURS))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (N, 3, 32, 32) in [-1, 1] to feature vectors (N, feature_dim) for the Frechet distance."""
        if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
            raise ValueError(f"The oracle takes images of shape (N, 3, 32, 32), got {tuple(images.shape)}.")
        return nn.functional.silu(self.project(self.trunk(images).flatten(1)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the logits (digit (N, 10), foreground (N, 8), background (N, 8)) of images in [-1, 1]."""
        features = self.features(images)
        return self.digit_head(features), self.foreground_head(features), self.background_head(features)


def save_oracle(oracle: HandwritingOracle, folder: str | Path) -> None:
    """Write config.json and model.safetensors (float16) into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(oracle.config, indent=2) + "\n")
    state = {name: value.detach().cpu().contiguous() for name, value in oracle.state_dict().items()}
    weights = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(weights, folder / "model.safetensors")


def load_oracle(folder: str | Path) -> HandwritingOracle:
    """Load a saved oracle as a frozen float32 module in eval mode; FileNotFoundError if `folder` holds none."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no oracle: {name} is missing.")
    oracle = HandwritingOracle(**json.loads((folder / "config.json").read_text()))
    oracle.load_state_dict(load_file(folder / "model.safetensors"))
    return oracle.eval().requires_grad_(False)


@torch.no_grad()
def prompt_agreement(oracle, images, digits, foregrounds=None, backgrounds=None) -> dict[str, float]:
    """Fraction of images (N, 3, 32, 32) in [-1, 1] in which the oracle reads the given labels, each (N,).

    Returns {"digit", "foreground", "background", "all"}, colours that are not given left out; "all" counts images that
    agree in everything."""
    wanted = {"digit": digits, "foreground": foregrounds, "background": backgrounds}
    wanted = {name: labels for name, labels in wanted.items() if labels is not None}
    for name, labels in wanted.items():
        if len(labels) != len(images):
            raise ValueError(f"{len(images)} images need as many {name} labels, got {len(labels)}.")
    if len(images) == 0:
        raise ValueError("prompt_agreement needs at least one image.")
    device = next(oracle.parameters()).device
    chunks = [oracle(chunk) for chunk in images.to(device, torch.float32).split(256)]
    read = dict(zip(("digit", "foreground", "background"), map(torch.cat, zip(*chunks, strict=True)), strict=True))
    hits = {name: read[name].argmax(dim=1).cpu() == torch.as_tensor(labels).cpu() for name, labels in wanted.items()}
    hits["all"] = torch.stack(list(hits.values())).all(0)
    return {name: hit.float().mean().item() for name, hit in hits.items()}
