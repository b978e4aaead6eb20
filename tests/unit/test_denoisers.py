"""Denoisers of EDM networks and of mixtures, guidance, against golden numbers and the networks called by hand."""

import json
from pathlib import Path

import pytest
import torch
from epd_golden import close, samples

from brisk import denoisers, edm_nets
from brisk.options import UserError

pytestmark = pytest.mark.quick
EDM = {"img_resolution": 8, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "model_channels": 8,
       "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}  # fmt: skip
KINDS = {"ddpmpp": {}, "ncsnpp": {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
                                  "resample_filter": [1, 3, 3, 1]},
         "adm": {"model_type": "DhariwalUNet", "model_channels": 64, "label_dim": 4}}  # fmt: skip


def make_edm(kind, dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = EDM | KINDS[kind] | more
    return denoisers.edm(edm_nets.make_network(config), config, dtype=dtype)


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        metafunc.parametrize("golden", [Path(metafunc.config.getoption("--conformance")) / "epd/denoiser.json"], ids=["denoiser"])


def test_golden_directions_of_loaded_mixtures(golden, tmp_path):
    content, views = json.loads(golden.read_text()), set()
    for case in content["cases"]:
        world = content["world"][case["world"]] | {"flow": case["view"] == "flow"}
        (tmp_path / "world.json").write_text(json.dumps({"world": {"other": {}, case["world"]: world}}))
        denoiser = denoisers.load_mixture(f"{tmp_path / 'world.json'}:{case['world']}")
        x = samples(case["x"], denoiser.shape)
        labels = torch.tensor(case["classes"]) if "classes" in case else None
        guidance = ("cfg", case["guidance"]) if case["view"] == "edm_cfg" else ()
        direction = denoisers.direction_for(denoiser, labels, len(x), *guidance)
        sigma = torch.tensor(case["sigma"], dtype=torch.float64).expand(len(x))
        found = direction(x, sigma)
        close(x - sigma.reshape(-1, *[1] * (x.ndim - 1)) * found, case["D"])
        for row in range(len(x)):
            close(direction(x[row : row + 1], sigma[row : row + 1], torch.tensor([row])), found[row : row + 1])
        assert direction(x.float(), sigma.float()).dtype == torch.float32
        views.add(case["view"])
    assert views >= {"edm", "edm_cfg", "flow"}


@pytest.mark.parametrize("kind", KINDS)
def test_edm_networks_give_the_quotient_in_the_precision_of_the_state(kind):
    denoiser = make_edm(kind)
    labels = torch.tensor([1, 3, 0]) if denoiser.classes else None
    one_hot = None if labels is None else torch.eye(4)[labels]
    level = torch.tensor([0.1, 1.0, 40.0])
    x = torch.randn(3, *denoiser.shape) * (level**2 + 0.25).sqrt()[:, None, None, None]
    direction = denoisers.direction_for(denoiser, labels, 3)
    with torch.no_grad():
        exact = direction(x.double(), level.double())
        assert exact.dtype == torch.float64
        quotient = (x - denoiser.network(x, level, one_hot)) / level[:, None, None, None]
        torch.testing.assert_close(quotient, exact.float(), atol=1e-4, rtol=1e-4)
        rows = torch.tensor([2, 2, 0])
        torch.testing.assert_close(direction(x[rows], level[rows], rows), exact[rows].float(), atol=1e-5, rtol=1e-5)
        for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
            half = denoisers.direction_for(make_edm(kind, dtype), labels, 3)(x, level)
            assert half.dtype == torch.float32
            assert 0 < ((half - exact).norm() / exact.norm()).item() < tolerance
    x.requires_grad_()
    direction(x, level).square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(not weight.requires_grad for weight in denoiser.network.parameters())


def test_frequencies_of_ncsnpp_keep_their_digits_in_half_precision():
    whole, half = make_edm("ncsnpp"), make_edm("ncsnpp", torch.bfloat16)
    assert torch.equal(whole.network.model.map_noise.freqs, half.network.model.map_noise.freqs)
    assert half.network.model.map_layer0.weight.dtype == torch.bfloat16


def test_edm_classes_zeros_for_none_and_guidance():
    denoiser = make_edm("adm")
    x, level, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.5, 5.0]), torch.tensor([2, 1])
    with torch.no_grad():
        parts = [denoiser.network.direction(x, level, one_hot) for one_hot in (torch.zeros(2, 4), torch.eye(4)[labels])]
        for guidance, expected in (((), parts[1]), (("uncond", 3.0), parts[0]), (("cfg", 1.0), parts[1]),
                                   (("cfg", 3.0), parts[0] + 3 * (parts[1] - parts[0]))):  # fmt: skip
            found = denoisers.direction_for(denoiser, labels, 2, *guidance)(x, level)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="guidance cfg needs a model with classes or prompts"):
        denoisers.direction_for(make_edm("ddpmpp"), None, 2, "cfg", 2.0)


def test_ranges_of_edm_networks_are_the_published_ones_where_the_config_has_none():
    assert (make_edm("ddpmpp").sigma_min, make_edm("ddpmpp").sigma_max) == (0.002, 80.0)
    wide, narrow = make_edm("ddpmpp", sigma_min=0, sigma_max=float("inf")), make_edm("ddpmpp", sigma_min=0.02, sigma_max=50.0)
    assert (wide.sigma_min, wide.sigma_max) == (0.002, 80.0) and (narrow.sigma_min, narrow.sigma_max) == (0.02, 50.0)
    assert denoisers.grid(narrow, "polynomial", 3)[[0, -1]].tolist() == pytest.approx([50.0, 0.02])


def test_mixtures_that_cannot_be_read_are_refused(tmp_path):
    good = {"shape": [1, 1, 2], "means": [[0, 1], [2, 3]], "stds": [1, 1], "weights": [1, 1]}
    file = tmp_path / "world.json"
    for content, words in (
        (good | {"shape": [3]}, "has not the 2 values"), (good | {"stds": [1]}, "needs means"), ({"means": []}, "it has no 'stds'"),
        ({"world": {"a": good}}, "it has no 'b'"), ([], "cannot be read"),
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            denoisers.load_mixture(f"{file}:b" if "world" in content else file)
    file.write_text(json.dumps(good | {"flow": True}))
    flow = denoisers.load_mixture(file)
    assert flow.flow and denoisers.grid(flow, "flowmatch", 3)[0] == 1 and flow.decode(torch.zeros(2, 1, 1, 2)).shape == (2, 3, 1, 2)
