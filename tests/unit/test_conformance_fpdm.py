"""Golden numbers of FPDM: every file of a known name under `--conformance DIR`/fpdm is run."""

import json
import math
from pathlib import Path

import pytest
import torch

from brisk import dit, fixed_point, gaussian

TYPES = {"eps": "epsilon", "v": "v_prediction", "v_zero_snr": "v_prediction"}


def fill(name, shape, gain):
    """The deterministic weights of the files' README, float64."""
    count = math.prod(shape)
    h = sum((j + 1) * ord(character) for j, character in enumerate(name)) % 1009
    i = torch.arange(count, dtype=torch.int64)
    amplitude = gain / math.sqrt(count / shape[0]) if len(shape) >= 2 else 0.1
    return (amplitude * torch.sin(h + 1.3 * i.double() + 0.017 * (i * i % 1000).double())).reshape(shape)


def build(config, dtype=torch.float64):
    network = dit.DiT(
        sample_size=config["sample_size"], patch_size=config["patch_size"], in_channels=config["in_channels"],
        out_channels=config["in_channels"] * (2 if config["learn_sigma"] else 1), hidden_size=config["hidden_size"],
        num_attention_heads=config["num_heads"], num_classes=config["num_classes"], fixed_point=True,
        pre_depth=config["pre_depth"], post_depth=config["post_depth"],
        pre_post_timestep_conditioning=config["pre_post_timestep_conditioning"],
    )  # fmt: skip
    network.load_state_dict({n: fill(n, p.shape, config["gain"]) for n, p in network.state_dict().items()})
    return network.to(dtype).eval()


def models(folder):
    """{name: config} of model_forward.json, which other files refer to."""
    return {config["name"]: config for config in json.loads((folder / "model_forward.json").read_text())["configs"]}


def close(found, expected, atol=1e-7, rtol=1e-7):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.detach().double().reshape(-1), expected.reshape(-1), atol=atol, rtol=rtol)


def check_weights_fill(golden, folder):
    configs = models(folder)
    for entry in golden:
        network = build(configs[entry["name"]])
        parameters = dict(network.named_parameters())
        assert parameters.keys() == entry["params"].keys()
        for name, facts in entry["params"].items():
            assert list(parameters[name].shape) == facts["shape"]
            close(fill(name, facts["shape"], configs[entry["name"]]["gain"]).flatten()[:3], facts["first"], 1e-9, 1e-9)


def inputs(config, dtype):
    x = torch.tensor(config["x"], dtype=dtype).reshape(config["x_shape"])
    return x, torch.tensor(config["t"]), torch.tensor(config["y"])


def check_model_forward(golden, folder):
    for config in golden["configs"]:
        for dtype, atol in ((torch.float64, 2e-5), (torch.float32, 5e-5)):
            check_forward(config, build(config, dtype), dtype, atol)


@torch.no_grad()
def check_forward(config, network, dtype, atol):
    x, t, y = inputs(config, dtype)
    for count, expected in config["outputs"].items():
        close(network(x, t, y, int(count)).sample, expected, atol, 0)
        rho = []
        for k in range(1, int(count) + 1):  # the residual of the k-th iteration
            rho.append(network(x, t, y, k, solver={"solver": "picard"}).residual.tolist())
        for found, wanted in zip(rho, config["rel_residual"][count], strict=True):
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    reuse = config["reuse"]
    first_time, second_time = (torch.full_like(t, reuse[name]) for name in ("t0", "t1"))
    first = network(x, first_time, y, reuse["n"])
    close(first.sample, config["reuse_out_first"], atol, 0)
    close(network(0.9 * x, second_time, y, reuse["n"], first.state).sample, config["reuse_out_second"], atol, 0)
    close(network(0.9 * x, second_time, y, reuse["n"]).sample, config["noreuse_out_second"], atol, 0)


@torch.no_grad()
def check_cfg(golden, folder):
    config = models(folder)[golden["model"]] | {"gain": golden["gain"]}
    network = build(config, torch.float32)
    x = torch.tensor(golden["x"]).reshape(golden["x_shape"])
    y = torch.tensor(golden["y"])
    t = torch.full_like(y, golden["t"])
    labels = torch.cat([y, torch.full_like(y, golden["null"])])
    output = network(torch.cat([x, x]), torch.cat([t, t]), labels, golden["n"]).sample
    for channels, name in ((4, "guided_all_channels"), (3, "guided_first3_channels")):
        close(dit.guide(output, golden["guidance"], channels), golden[name], 1e-4, 0)


def check_sjfb_grad(golden, folder):
    configs = models(folder)
    for case in golden["cases"]:
        config = configs[case["model"]] | {"gain": case["gain"]}
        for recompute in (False, True):
            network = build(config)
            x, t, y = inputs(config, torch.float64)
            output = network(x, t, y, (case["n_no_grad"], case["m_with_grad"]), recompute=recompute)
            loss = output.sample.square().mean()
            assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
            loss.backward()
            parameters = dict(network.named_parameters())
            for name, facts in case["grads"].items():
                grad = parameters[name].grad
                assert grad is not None, name
                if facts["norm"] > 1e-6:
                    assert grad.norm().item() == pytest.approx(facts["norm"], rel=1e-3), name
                    assert grad.flatten()[:3].tolist() == pytest.approx(facts["first"], rel=1e-3, abs=1e-6), name


def betas_of(zero_snr):
    betas = gaussian.linear_betas()
    return gaussian.zero_terminal_snr(betas) if zero_snr else betas


def check_betas(golden, folder):
    linear, zero = (gaussian.make_tables(betas_of(zero_snr)) for zero_snr in (False, True))
    close(linear.alphas_cumprod[::50], golden["linear_alphas_cumprod_every50"], 1e-9, 1e-9)
    close(zero.alphas_cumprod[::20], golden["zero_snr_alphas_cumprod_every20"], 1e-9, 1e-9)
    close(zero.alphas_cumprod[-5:], golden["zero_snr_last5"], 1e-9, 1e-9)
    close(gaussian.zero_terminal_snr(gaussian.linear_betas()), golden["zero_snr_betas"], 1e-9, 1e-9)
    assert zero.alphas_cumprod[-1] == 0 and zero.betas[-1] == 1


def check_schedules(golden, folder):
    for count, timesteps in golden["respaced_timesteps"].items():
        assert gaussian.respaced_timesteps(int(count)) == timesteps
    for name, facts in golden["respaced"].items():
        count, zero_snr = (int(part.split("=")[1]) for part in name.split(","))
        tables = gaussian.make_tables(betas_of(zero_snr), gaussian.respaced_timesteps(count))
        close(tables.betas, facts["betas"], 1e-10, 1e-10)
        close(tables.alphas_cumprod, facts["alphas_cumprod"], 1e-10, 1e-10)
    for case in golden["iteration_allocation"]:
        found = fixed_point.iteration_schedule(case["num_steps"], case["mean_iters"], case["type"])
        assert found == case["iters_by_timestep_index"], case["type"]
        assert sum(found) == case["num_steps"] * case["mean_iters"]


def check_losses(golden, folder):
    def tensor(name, channels=1):
        shape = list(golden["shape"])
        shape[1] *= channels
        return torch.tensor(golden[name], dtype=torch.float32).reshape(shape)

    x0, noise, output, index = tensor("x0"), tensor("noise"), tensor("model_output", 2), torch.tensor(golden["t"])
    prediction, logits = output.chunk(2, dim=1)
    for name, case in golden["cases"].items():
        kind, tables = TYPES[name], gaussian.make_tables(betas_of(name == "v_zero_snr"))
        x_t = gaussian.noised(tables, x0, noise, index)
        close(x_t, case["x_t"], 1e-6, 1e-4)
        recovered, _ = gaussian.recover(tables, prediction, x_t, index, kind)
        close(recovered, case["pred_x0"], 1e-5, 1e-4)
        target = gaussian.target(tables, x0, noise, index, kind)
        close(target, case["target"], 1e-6, 1e-4)
        mse = gaussian.flat_mean((prediction - target) ** 2)
        close(mse, case["mse_uniform"], 1e-6, 1e-4)
        close(gaussian.variational_bound(tables, x0, x_t, index, output, kind), case["vb"], 1e-6, 5e-3)
        close(gaussian.learned_log_variance(tables, logits, index), case["log_variance"], 1e-5, 1e-4)
        close(gaussian.posterior_mean(tables, recovered, x_t, index), case["mean"], 1e-5, 1e-4)
        signal = tables.alphas_cumprod[index]
        close(signal / (1 - signal), case["snr"], 1e-9, 1e-4)
        for weighting, expected in case["weights"].items():
            close(gaussian.loss_weights(tables, index, weighting.removesuffix("_5"), kind), expected, 1e-7, 1e-4)
        official = "p2" if kind == "v_prediction" else "uniform"  # the reference weights v alone
        close(gaussian.loss_weights(tables, index, official, kind) * mse, case["official_mse_term"], 1e-6, 1e-4)


def check_trajectories(golden, folder):
    start = torch.tensor(golden["x_T"], dtype=torch.float64).reshape(golden["shape"])
    for case in golden["cases"]:
        steps = gaussian.respaced_timesteps(case["num_steps"])
        assert steps == case["timesteps"]
        tables, x = gaussian.make_tables(betas_of(case["zero_snr"]), steps), start
        k = torch.arange(x.numel(), dtype=torch.float64)
        for number, i in enumerate(reversed(range(len(steps))), 1):
            index, t = torch.full((len(x),), i), steps[i]
            prediction = 0.8 * x * (0.3 + t / 1000) + 0.1 * torch.sin(3 * x + 5 * t / 1000)
            output = torch.cat([prediction, torch.tanh(0.7 * x - t / 1000)], 1)
            noise = (1.2 * torch.sin(100 + i + 0.71 * k + 0.013 * (k * k % 700))).reshape(x.shape)
            if case["sampler"] == "ddpm":
                x = gaussian.ddpm_step(tables, output, x, index, case["prediction"], noise)
            else:
                x = gaussian.ddim_step(tables, prediction, x, index, case["prediction"], noise, case["eta"])
            if number == 1:
                close(x, case["after_first"], 2e-4, 2e-4)
            if number == len(steps) // 2 + 1:
                close(x, case["after_half"], 2e-4, 2e-4)
        close(x, case["final"], 2e-4, 2e-4)


def check_solver(golden, folder):
    shape = (golden["batch"], golden["d"])
    a, b, z0 = (torch.tensor(golden[name], dtype=torch.float64) for name in ("A", "b", "z0"))
    a, b, z0 = a.reshape(golden["d"], golden["d"]), b.reshape(-1, golden["d"]), z0.reshape(shape)

    def step(z):
        return torch.tanh(z @ a.T) + b

    close(fixed_point.picard(step, z0, 400), golden["fixed_point"], 1e-8, 0)
    for case in golden["cases"]:
        if case["solver"] == "anderson":
            mixer, state = fixed_point.Anderson(case["window"], case["ridge"], case["beta"]), z0
            for _ in range(case["n"]):
                found = step(state)
                state = mixer.mix(state, found)
        else:
            found = fixed_point.picard(step, z0, case["n"])
        close(found, case["z"], 1e-8, 0)


def check_counts(golden, folder):
    for entry in golden["params"]:
        fixed = {"fixed_point": True, "pre_depth": entry["pre"], "post_depth": entry["post"]} if entry["fixed_point"] else {}
        with torch.device("meta"):
            network = dit.DiT(**dit.size_of(entry["model"]), out_channels=8 if entry["learn_sigma"] else 4,
                              num_classes=entry["num_classes"], **fixed)  # fmt: skip
        assert sum(parameter.numel() for parameter in network.parameters()) == entry["params"], entry
    for entry in golden["macs_per_forward_256px"]:
        size = dit.size_of(entry["model"])
        found = dit.macs(size["hidden_size"], entry["tokens"])
        assert (found["block"], found["injection"], found["injection_hoisted"]) == (
            entry["block_macs"], entry["injection_macs_per_iter"], entry["injection_macs_per_iter_hoisted"])  # fmt: skip
        assert size["num_layers"] * found["block"] == entry["dit_block_macs"]
        for name, expected in entry.items():
            if name.startswith("fpdm_"):
                pre, post, count = (int(part) for part in name.removeprefix("fpdm_").split("_"))
                for hoisted in (False, True):
                    total = dit.fixed_point_macs(size["hidden_size"], entry["tokens"], pre, post, count, hoisted)
                    assert total == expected["hoisted" if hoisted else "plain"]


KNOWN = {name: globals()[f"check_{name}"] for name in (
    "weights_fill", "model_forward", "cfg", "sjfb_grad", "schedules", "betas", "losses", "trajectories", "solver", "counts",
)}  # fmt: skip


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--conformance")) / "fpdm"
    found = [folder / f"{name}.json" for name in KNOWN if (folder / f"{name}.json").is_file()]
    metafunc.parametrize("path", found or [folder], ids=lambda path: path.stem)


def test_golden(path):
    assert path.is_file(), f"no golden file of a known name in {path}"
    KNOWN[path.stem](json.loads(path.read_text()), path.parent)
