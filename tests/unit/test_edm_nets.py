"""The EDM networks beyond the golden numbers: published sizes, labels, precision at small noise, configs that fit none."""

import pytest
import torch

from brisk import edm_nets

pytestmark = pytest.mark.quick
TINY = {"img_resolution": 8, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1, 2],
        "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
SONG = {"img_channels": 3, "model_type": "SongUNet", "model_channels": 128, "num_blocks": 4, "attn_resolutions": [16],
        "augment_dim": 9, "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
        "channel_mult_noise": 1, "resample_filter": [1, 1], "dropout": 0.13, "use_fp16": False}  # fmt: skip
PUBLISHED = {  # parameters in millions, as stated in arXiv 2206.00364
    "cifar10": (55.7, SONG | {"img_resolution": 32, "channel_mult": [2, 2, 2]}),
    "ffhq": (61.8, SONG | {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}),
    "imagenet64": (295.9, {"img_resolution": 64, "img_channels": 3, "label_dim": 1000, "model_type": "DhariwalUNet",
                           "model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
                           "attn_resolutions": [32, 16, 8], "use_fp16": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_their_size(name):
    millions, config = PUBLISHED[name]
    with torch.device("meta"):
        network = edm_nets.make_network(config)
    assert round(sum(value.numel() for value in network.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("changes", [{}, {"model_type": "DhariwalUNet", "model_channels": 64}], ids=["song", "adm"])
def test_rows_do_not_depend_on_each_other(changes):
    network = edm_nets.make_network(TINY | changes | {"label_dim": 4}).double()
    x, sigma, labels = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.01, 1.0, 80.0]), torch.eye(4)[[2, 0, 3]]
    with torch.no_grad():
        whole = network(x, sigma, labels)
        for row in range(3):
            one = slice(row, row + 1)
            torch.testing.assert_close(network(x[one], sigma[row], labels[one]), whole[one], atol=1e-12, rtol=1e-12)
        assert torch.equal(network(x, 2.0), network(x, torch.full((3,), 2.0), torch.zeros(3, 4)))
        assert not torch.equal(network(x, 2.0, labels), network(x, 2.0))


def test_direction_is_the_quotient_and_keeps_its_digits():
    network = edm_nets.make_network(TINY)
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        for sigma in (0.002, 0.5, 80.0):
            noisy = x * max(sigma, 0.5)
            exact = network.double().direction(noisy.double(), sigma)
            torch.testing.assert_close((noisy - network(noisy.double(), sigma)) / sigma, exact, atol=1e-9, rtol=1e-9)
            found = network.float().direction(noisy, sigma)
            assert found.dtype == torch.float32
            assert ((found - exact).abs().max() / exact.abs().max()) < 1e-5


def test_gradients_reach_every_weight_and_the_input():
    network = edm_nets.make_network(TINY | {"label_dim": 4, "augment_dim": 9, "encoder_type": "residual", "dropout": 0.2}).train()
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    network.model(x, torch.ones(2), torch.eye(4)[:2], torch.randn(2, 9)).square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(value.grad is not None for value in network.parameters())


def test_configs_of_no_published_network_are_refused():
    for changes, words in (
        ({"model_type": "UNet"}, "model_type is 'UNet'"),
        ({"encoder_type": "skip"}, "'skip' where it must have one of standard, residual"),
        ({"decoder_type": "skip"}, "'skip' where it must have one of standard"),
        ({"embedding_type": "learned"}, "one of positional, fourier"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
        ({"model_channels": "8"}, "cannot be built from its config"),
        ({"img_resolution": None}, "cannot be built from its config"),
        ({"model_channels": 2}, "cannot be built from its config"),
    ):
        with pytest.raises(ValueError, match=words):
            edm_nets.make_network(TINY | changes)
