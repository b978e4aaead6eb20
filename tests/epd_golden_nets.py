"""Checks of the golden numbers of the EDM networks: names, shapes and outputs."""

import math

import torch

from brisk import edm_nets


def fill(network):
    """The deterministic weights that the file describes, written into `network`."""
    with torch.no_grad():
        for place, (name, parameter) in enumerate(sorted(network.named_parameters())):
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            values = torch.sin(0.9 * (place + 1) + 0.37 * index).reshape(parameter.shape)
            module, leaf = name.split(".")[-2:]
            if parameter.ndim >= 2:
                values = values * math.sqrt(2 * parameter.shape[0] / parameter.numel())
            else:
                values = 1 + 0.1 * values if "norm" in module and leaf == "weight" else 0.1 * values
            parameter.copy_(values)
        for name, buffer in network.named_buffers():
            if name.endswith("freqs"):
                buffer.copy_(0.3 * (torch.arange(len(buffer)) + 1))
    return network


def check_edm_nets(golden, folder):
    assert golden["cases"]
    for case in golden["cases"]:
        network = fill(edm_nets.make_network(case["config"]))
        assert {name: list(value.shape) for name, value in network.named_parameters()} == case["parameters"], case["name"]
        assert {name: list(value.shape) for name, value in network.named_buffers()} == case["buffers"], case["name"]
        side, count = case["config"]["img_resolution"], len(case["sigma"])
        shape = (count, case["config"]["img_channels"], side, side)
        sigma = torch.tensor(case["sigma"])
        x = sigma[:, None, None, None] * torch.sin(0.13 * torch.arange(math.prod(shape)).double()).reshape(shape).float()
        labels = None
        if case["classes"]:
            labels = torch.nn.functional.one_hot(torch.tensor(case["classes"]), case["config"]["label_dim"]).float()
        with torch.no_grad():
            found = network(x, sigma, labels)
            direction = network.double().direction(x.double(), sigma.double(), labels)
        expected = torch.tensor(case["D"]).reshape(shape)
        assert ((found - expected).abs() <= 2e-4 * expected.abs().clamp(min=1)).all(), case["name"]
        implied = (x.double() - expected) / sigma[:, None, None, None]
        assert ((direction - implied).abs() <= 1e-3 * implied.abs().clamp(min=1)).all(), case["name"]
