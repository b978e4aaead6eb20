"""Random TorchScript networks that are called as the Inception network of FID is, and as any other, written to files."""

import torch
from torch import nn


class TinyInception(nn.Module):
    """D features and C class probabilities of images (B, 3, H, W) in 0..255 of any size."""

    def __init__(self, dimensions: int, classes: int):
        super().__init__()
        self.body = nn.Linear(3 * 16, dimensions)
        self.output = nn.Linear(dimensions, classes)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(img.float() / 128 - 1, (4, 4))
        features = torch.sin(self.body(x.flatten(1)) * 3)
        if return_features:
            return features
        logits = self.output(features)
        return torch.softmax((logits - self.output.bias if no_output_bias else logits) * 8, dim=1)


class TinyFeatures(nn.Module):
    """D features of uint8 images (B, 3, H, W) of 8x8 pixels alone."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.body = nn.Linear(3 * 64, dimensions)

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        assert img.dtype == torch.uint8
        return torch.tanh(self.body(img.float().flatten(1) / 255))


def write_inception(path, dimensions=6, classes=5, seed=0):
    """Save a `TinyInception`; return it."""
    return _save(path, lambda: TinyInception(dimensions, classes), seed)


def write_features(path, dimensions=6, seed=0):
    """Save a `TinyFeatures`; return it."""
    return _save(path, lambda: TinyFeatures(dimensions), seed)


def _save(path, make, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().eval()
    torch.jit.script(module).save(str(path))
    return module
