"""What the golden-number tests of EPD-Solver share: the comparison, the mixture worlds, a counting direction, tables."""

import json

import torch

from brisk import denoiser_maps, epd, mixture

TIGHT, ROUNDED, SINGLE = 1e-8, 1e-6, 2e-4  # of float64, of files whose inputs are rounded, of float32


def close(found, expected, tolerance=TIGHT):
    """|a - b| <= tolerance max(1, |b|), elementwise."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    found = found.detach().double() if isinstance(found, torch.Tensor) else torch.tensor(found, dtype=torch.float64)
    found = found.reshape(expected.shape)
    error = ((found - expected).abs() / expected.abs().clamp(min=1)).max().item()
    assert error <= tolerance, f"off by {error:.2e}"


def precisions(tolerance):
    return (torch.float64, tolerance), (torch.float32, SINGLE)


def world_of(folder, name, dtype=torch.float64):
    world = json.loads((folder / "denoiser.json").read_text())["world"][name]
    lists = (world["means"], world["stds"], world["weights"], world.get("class_weights"))
    return mixture.from_lists(*lists, dtype=dtype), tuple(world["shape"])


def samples(values, shape, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype).reshape(-1, *shape)


class Counted:
    """A direction with or without classes and guidance that counts its calls and rows."""

    def __init__(self, world, flow=False, classes=None, guidance=1.0):
        self.world, self.flow, self.guidance, self.calls, self.rows = world, flow, guidance, 0, 0
        self.classes = None if classes is None else torch.tensor(classes)

    def __call__(self, x, sigma, rows=None):
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        unconditional = mixture.direction(self.world, x, sigma, flow=self.flow)
        if self.classes is None:
            return unconditional
        labels = denoiser_maps.take_rows(self.classes, rows)
        return denoiser_maps.guide(unconditional, mixture.direction(self.world, x, sigma, labels), self.guidance)


def tables_of(lists, dtype=torch.float64):
    """`Tables` of a dict of lists; missing scales are ones."""
    r, weight = (torch.tensor(lists[name], dtype=dtype) for name in ("r", "weight"))
    scales = (lists.get("scale_dir"), lists.get("scale_time"))
    return epd.Tables(r, weight, *(torch.ones_like(r) if s is None else torch.tensor(s, dtype=dtype) for s in scales))
