"""Counts of parameters and multiply-accumulates, against counts by hand."""

import pytest
import torch
from torch import nn

from brisk import macs, tiny

pytestmark = pytest.mark.quick


def count(network, *shape, **call):
    return macs.count(network.to("meta"), input=torch.empty(*shape, device="meta"), **call)


def test_linear_layers_and_convolutions_are_counted_by_hand():
    size = count(nn.Linear(3, 5), 2, 7, 3)
    assert size == macs.Size(3 * 5 + 5, 0, 2 * 7 * 3 * 5, 0, 0)
    assert count(nn.Linear(3, 5, bias=False), 2, 7, 3).linear == 2 * 7 * 3 * 5
    size = count(nn.Conv2d(3, 8, 3, stride=2, padding=1), 2, 3, 10, 10)
    assert size == macs.Size(3 * 8 * 9 + 8, 2 * 5 * 5 * 8 * 3 * 9, 0, 0, 0)
    assert count(nn.Conv2d(4, 4, 3, groups=4, padding=1), 1, 4, 6, 6).conv == 6 * 6 * 4 * 9


def test_layer_norms_count_four_an_element_in_the_published_numbers_alone():
    size = count(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2), nn.LayerNorm(2)), 3, 6)
    assert size.layer_norm_elements == 3 * 6 + 3 * 2
    assert size.total == 3 * 6 * 2 and size.published == size.total + 4 * (18 + 6)


@pytest.mark.parametrize("context", [None, 7])
def test_attention_products_are_counted_apart_and_only_in_the_total(context):
    from diffusers.models.attention_processor import Attention

    heads, width, tokens = 2, 8, 5
    with torch.device("meta"):
        attention = Attention(query_dim=width, cross_attention_dim=context and 6, heads=heads, dim_head=width // heads)
        text = {"encoder_hidden_states": torch.empty(3, context, 6)} if context else {}
        size = macs.count(attention, hidden_states=torch.empty(3, tokens, width), **text)
    keys, source = context or tokens, 6 if context else width
    assert size.attention == 2 * 3 * tokens * keys * width, "scores and mixing of the values"
    assert size.linear == 3 * (2 * tokens * width * width + 2 * keys * source * width)
    assert size.total == size.linear + size.attention and size.published == size.linear


def test_counting_needs_no_memory_and_leaves_no_hook():
    with torch.device("meta"):
        unet = tiny.make_unet("tiny")
    size = macs.count(unet, **macs.unet_inputs(unet.config, 1, 8, device="meta"))
    assert size.parameters == sum(p.numel() for p in tiny.make_unet("tiny").parameters())
    assert not any(module._forward_hooks for module in unet.modules())
    assert min(size.conv, size.linear, size.attention, size.layer_norm_elements) > 0
    with pytest.raises(TypeError):
        macs.count(unet, nonsense=1)
    assert not any(module._forward_hooks for module in unet.modules())


def test_size_of_a_config_grows_with_latents_and_tokens_where_it_should():
    config = dict(tiny.make_unet("tiny_xl").config)
    small, large, long = (macs.unet_size(config, latent, tokens) for latent, tokens in ((8, 77), (16, 77), (8, 154)))
    assert large.conv == 4 * small.conv and large.parameters == small.parameters
    assert long.conv == small.conv and long.linear > small.linear and long.attention > small.attention
    assert long.layer_norm_elements == small.layer_norm_elements


@pytest.mark.parametrize("size", ["tiny", "tiny_xl"])
def test_inputs_fit_the_network_and_repeat_with_the_generator(size):
    unet = tiny.make_unet(size, time_cond_proj_dim=6)
    one, two = (macs.unet_inputs(unet.config, 2, 8, 5, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    assert unet(**one)[0].shape == (2, 4, 8, 8) and one["timestep_cond"].shape == (2, 6)
    assert one["encoder_hidden_states"].shape == (2, 5, unet.config.cross_attention_dim)
    assert torch.equal(one["sample"], two["sample"]) and ("added_cond_kwargs" in one) == (size == "tiny_xl")
