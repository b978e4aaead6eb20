"""Tiny DiT and FPDM networks whose every weight is random, the zero-initialised head included."""

import torch

from brisk import fpdm

TINY = {"sample_size": 4, "image_size": 16, "patch_size": 2, "hidden_size": 16, "num_layers": 6, "num_attention_heads": 2,
        "num_classes": 10, "fixed_point": True}  # fmt: skip


def make_network(seed=0, **changes):
    """An `FPDMTransformer2DModel` in eval mode: `TINY`, its config changed by `changes`."""
    network = fpdm.FPDMTransformer2DModel(**{**TINY, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return network.eval()
