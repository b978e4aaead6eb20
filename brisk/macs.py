"""How large a network is: parameters and multiply-accumulates of one forward pass, counted without running it."""

from typing import NamedTuple

import torch

CONVOLUTIONS, LINEAR = {"convolution"}, {"mm", "addmm"}  # what else is counted are the products inside attention


class Size(NamedTuple):
    """Parameters, and multiply-accumulates by kind. The published counts leave the attention products out."""

    parameters: int
    conv: int
    linear: int
    attention: int
    layer_norm_elements: int

    @property
    def total(self):
        """All multiply-accumulates."""
        return self.conv + self.linear + self.attention

    @property
    def published(self):
        """As the tools behind the papers' tables (thop) count: no attention products, four per LayerNorm element."""
        return self.conv + self.linear + 4 * self.layer_norm_elements


def count(network, **call):
    """The `Size` of `network` for `network(**call)`, tensors and weights on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    normalised = [0]

    def add(module, inputs, output):
        normalised[0] += output.numel()

    hooks = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, torch.nn.LayerNorm)]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(**call)
    finally:
        for hook in hooks:
            hook.remove()
    flops = {"conv": 0, "linear": 0, "attention": 0}
    for operation, amount in counter.get_flop_counts().get("Global", {}).items():
        name = operation.__name__.split(".")[0]
        flops["conv" if name in CONVOLUTIONS else "linear" if name in LINEAR else "attention"] += amount
    macs = {kind: amount // 2 for kind, amount in flops.items()}
    return Size(sum(p.numel() for p in network.parameters()), **macs, layer_norm_elements=normalised[0])


def unet_size(config, latent, tokens=77):
    """The `Size` of the U-Net with `config` on one `latent` x `latent` sample and `tokens` text tokens."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return count(unet, **unet_inputs(unet.config, 1, latent, tokens, device="meta"))


def unet_inputs(config, batch, latent, tokens=77, device="cpu", dtype=torch.float32, generator=None):
    """Random call arguments of a U-Net: latents (B, 4, h, h), timesteps (B,), prompt and SDXL embeddings."""
    draw = {"device": device, "dtype": dtype, "generator": generator}
    inputs = {
        "sample": torch.randn(batch, config.in_channels, latent, latent, **draw),
        "timestep": torch.full((batch,), 500, device=device),
        "encoder_hidden_states": torch.randn(batch, tokens, config.cross_attention_dim, **draw),
    }
    if config.time_cond_proj_dim:
        inputs["timestep_cond"] = torch.randn(batch, config.time_cond_proj_dim, **draw)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, pooled, **draw), "time_ids": torch.ones(batch, 6, device=device),
        }  # fmt: skip
    return inputs
