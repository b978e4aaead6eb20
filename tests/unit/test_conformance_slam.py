"""Golden numbers of SLAM: every file of a known name under `--conformance DIR`/slam is run."""

import json
from pathlib import Path

import pytest
import torch

from brisk import splam
from brisk.optim import lerp_
from brisk.schedules import signal_and_noise, solver_grid, to_x0_eps

TENSOR = {"atol": 5e-5, "rtol": 5e-5}
KNOWN = (
    "schedules", "boundary_scalings", "gamma_embedding", "train_step_epsilon", "train_step_v_prediction",
    "train_step_v_prediction_zero_snr", "train_step_sample", "losses", "ema", "gaussian_closed_form",
    "snr_matched", "flops",
)  # fmt: skip


def close(actual, expected, atol=5e-5, rtol=5e-5):
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=rtol)


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def alphas_cumprod(scheduler):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**scheduler).alphas_cumprod


def check_schedules(golden):
    from diffusers import LCMScheduler

    for table in golden["tables"]:
        steps = table["num_ddim_timesteps"]
        grid = solver_grid(alphas_cumprod(golden["scheduler"]), steps)
        rescaled = solver_grid(alphas_cumprod({**golden["scheduler"], "rescale_betas_zero_snr": True}), steps)
        assert golden["num_train_timesteps"] // steps == table["k"]
        assert grid.start_timesteps.tolist() == table["start_timesteps"]
        assert grid.end_timesteps.tolist() == table["end_timesteps"]
        assert grid.alpha_cumprod_start.dtype == grid.alpha_cumprod_end.dtype == torch.float32
        close(grid.alpha_cumprod_start, table["alpha_cumprod_start"], 1e-6, 1e-5)
        close(grid.alpha_cumprod_end, table["alpha_cumprod_prev"], 1e-6, 1e-5)
        close(rescaled.alpha_cumprod_start, table["zero_snr_alpha_cumprod_start"], 1e-6, 1e-5)
        close(rescaled.alpha_cumprod_end, table["zero_snr_alpha_cumprod_prev"], 1e-6, 1e-5)
        for count, timesteps in table["lcm_inference_timesteps"].items():
            lcm = LCMScheduler(**golden["scheduler"], original_inference_steps=steps)
            lcm.set_timesteps(int(count))
            assert lcm.timesteps.tolist() == timesteps


def check_boundary_scalings(golden):
    for case in golden["cases"]:
        c_skip, c_out = splam.boundary_scalings(
            tensor(case["timesteps"]), case["timestep_scaling"], golden["sigma_data"]
        )
        close(c_skip, case["c_skip"], 1e-8, 1e-5)
        close(c_out, case["c_out"], 1e-6, 1e-6)


def check_gamma_embedding(golden):
    for case in golden["cases"]:
        gamma = tensor(case["gamma"])
        close(splam.gamma_embedding(gamma, case["dim"]), case["embedding"], golden["note_atol"], 0)
        close(10 - 10 * gamma, case["w_prime"], 1e-5, 0)
        close(11 - 10 * gamma, case["guidance_scale"], 1e-5, 0)


def check_train_step(golden):
    abar = alphas_cumprod(golden["scheduler"])
    prediction_type = golden["prediction_type"]
    for case in golden["cases"]:
        grid = solver_grid(abar, case["num_ddim_timesteps"])
        inputs = {name: tensor(values) for name, values in case["inputs"].items()}
        index, gamma, expected = torch.tensor(case["index"]), tensor(case["gamma"]), case["expected"]
        latents = inputs["latents"]
        start, end = grid.start_timesteps[index], grid.end_timesteps[index]
        a, s = signal_and_noise(grid.alpha_cumprod_start[index], latents)
        a_end, s_end = signal_and_noise(grid.alpha_cumprod_end[index], latents)
        noisy = a * latents + s * inputs["noise"]
        x_prev, x0, eps = splam.guided_ddim_step(
            inputs["teacher_cond"], inputs["teacher_uncond"], noisy, a, s, a_end, s_end, case["w"], prediction_type
        )
        target_x0, _ = to_x0_eps(inputs["target_out"], x_prev, a_end, s_end, prediction_type)
        target = splam.consistency_output(x_prev, target_x0, end)
        point, sigma = splam.sub_path_point(noisy, x_prev, gamma, a, s, a_end, s_end)
        output = inputs["student_out"].requires_grad_()
        pred_x0 = splam.sub_path_x0(output, point, a, s, sigma, prediction_type)
        prediction = splam.consistency_output(point, pred_x0, start)

        assert start.tolist() == expected["start_t"] and end.tolist() == expected["end_t"]
        found = {
            "noisy": noisy, "cfg_pred_x0": x0, "cfg_pred_eps": eps, "x_prev": x_prev, "target": target,
            "inter_input": point, "sigma_gamma": sigma.flatten(), "pred_x0_gamma": pred_x0, "model_pred": prediction,
        }  # fmt: skip
        for name, value in found.items():
            close(value.detach(), expected[name], **TENSOR)
        for name, timesteps in (("start", start), ("end", end)):
            c_skip, c_out = splam.boundary_scalings(timesteps)
            close(c_skip, expected[f"c_skip_{name}"], **TENSOR)
            close(c_out, expected[f"c_out_{name}"], **TENSOR)
        for loss_type in ("l2", "huber"):
            loss = splam.distillation_loss(prediction, target, loss_type, case["huber_c"])
            close(loss.detach(), expected[f"loss_{loss_type}"], 0, 1e-5)
            (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
            close(gradient, expected[f"grad_{loss_type}_wrt_student_out"], 5e-5, 2e-4)


def check_losses(golden):
    prediction, target = tensor(golden["model_pred"]).requires_grad_(), tensor(golden["target"])
    close(splam.distillation_loss(prediction, target, "l2").detach(), golden["l2"], 0, 1e-5)
    for huber_c, expected in golden["huber"].items():
        loss = splam.distillation_loss(prediction, target, "huber", float(huber_c))
        close(loss.detach(), expected, 0, 1e-5)
        if float(huber_c) == 0.001:
            close(torch.autograd.grad(loss, prediction)[0], golden["huber_grad_wrt_model_pred_c0_001"], 5e-5, 2e-4)


def check_ema(golden):
    target = [tensor(golden["target_initial"])]
    for student, expected in zip(golden["student_per_step"], golden["target_after_each_step"], strict=True):
        lerp_(target, [tensor(student)], golden["decay"])
        close(target[0], expected, 1e-6, 1e-6)


def check_snr_matched(golden):
    abar = alphas_cumprod(golden["scheduler"])
    grid, table = solver_grid(abar, golden["num_ddim_timesteps"]), splam.log_snr_table(abar)
    cases = golden["cases"]
    index, gamma = torch.tensor([case["index"] for case in cases]), tensor([case["gamma"] for case in cases])
    x = torch.ones(len(cases), 1, 1, 1)
    a, s = signal_and_noise(grid.alpha_cumprod_start[index], x)
    a_end, s_end = signal_and_noise(grid.alpha_cumprod_end[index], x)
    point, sigma = splam.sub_path_point(x, x, gamma, a, s, a_end, s_end)
    scaled, tau, rho = splam.snr_matched_input(point, sigma, a, table)
    assert grid.start_timesteps[index].tolist() == [case["start_t"] for case in cases]
    assert grid.end_timesteps[index].tolist() == [case["end_t"] for case in cases]
    close(sigma.flatten(), [case["sigma_gamma"] for case in cases])
    close(rho.flatten(), [case["rho"] for case in cases])
    close(tau, [case["tau"] for case in cases], 2e-3, 0)
    close(scaled * rho, point.double())


def lcm_sampling(case, abar, timesteps):
    """Mean and standard deviation of multi-step consistency samples that start from N(0, 1)."""
    index = {t: i for i, t in enumerate(solver_grid(abar, case["num_ddim_timesteps"]).start_timesteps.tolist())}
    mean, variance = 0.0, 1.0
    for now, after in zip(timesteps, [*timesteps[1:], None], strict=True):
        F, G = case["consistency_slope_F"][index[now]], case["consistency_bias_G"][index[now]]
        mean, variance = F * mean + G, F * F * variance
        if after is not None:
            level = abar[after].item()
            mean, variance = level**0.5 * mean, level * variance + 1 - level
    return mean, variance**0.5


def check_gaussian_closed_form(golden):
    """At the closed-form optimum of the student the training loss is 0, for every gamma and both types."""
    abar = alphas_cumprod(golden["scheduler"])
    for case in golden["cases"]:
        grid = solver_grid(abar, case["num_ddim_timesteps"])
        x = torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(1, 1, 1, 7)
        for row in case["optimal_student"]:
            check_gaussian_row(case, row, grid, x)
        for sampling in case["lcm_sampling"]:
            mean, std = lcm_sampling(case, abar, sampling["timesteps"])
            assert mean == pytest.approx(sampling["mean"], rel=1e-5)
            assert std == pytest.approx(sampling["std"], rel=1e-5)


def check_gaussian_row(case, row, grid, x):
    i = torch.tensor([row["index"]])
    a, s = signal_and_noise(grid.alpha_cumprod_start[i].double(), x)
    a_end, s_end = signal_and_noise(grid.alpha_cumprod_end[i].double(), x)
    # the teacher: exact Gaussian denoisers, guided, one DDIM step
    raw = {}
    for part in ("cond", "uncond"):
        mu, std = case[f"mu_{part}"], case[f"std_{part}"]
        x0 = mu + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mu)
        raw[part] = (x - a * x0) / s
    x_end, _, _ = splam.guided_ddim_step(raw["cond"], raw["uncond"], x, a, s, a_end, s_end, case["w"], "epsilon")
    close(x_end, case["ddim_slope_m"][row["index"]] * x + case["ddim_bias_q"][row["index"]], 1e-6, 1e-6)
    gamma = torch.tensor([row["gamma"]], dtype=torch.float64)
    point, sigma = splam.sub_path_point(x, x_end, gamma, a, s, a_end, s_end)
    close(sigma.flatten(), [row["sigma_gamma"]], 1e-6, 1e-6)
    close(point, row["inter_slope_vs_noisy"] * x + row["inter_bias"], 1e-6, 1e-6)
    target = case["consistency_slope_F"][row["index"]] * x + case["consistency_bias_G"][row["index"]]
    for kind, short in (("epsilon", "eps"), ("v_prediction", "v")):
        output = row[f"{short}_slope"] * point + row[f"{short}_bias"]
        pred_x0 = splam.sub_path_x0(output, point, a, s, sigma, kind)
        prediction = splam.consistency_output(point, pred_x0, grid.start_timesteps[i])
        close(splam.distillation_loss(prediction, target), case["optimal_loss"], 1e-10, 0)


def check_flops(golden):
    from brisk.tiny import count_flops

    for entry in golden["models"]:
        params, flops = count_flops(entry["name"], entry.get("latent") or entry.get("pixels"))
        if entry["name"] == "clip_l_text_encoder":  # golden number without attention: 12 layers, 2 products, 77 tokens
            flops -= 12 * 2 * 2 * 77 * 77 * 768
        assert flops / 1e9 == pytest.approx(entry["gflop_forward"], rel=1e-6), entry
        if "params" in entry:
            assert params == entry["params"], entry


CHECKS = {name: globals()["check_train_step" if name.startswith("train_step") else f"check_{name}"] for name in KNOWN}


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--conformance")) / "slam"
    found = [folder / f"{name}.json" for name in KNOWN if (folder / f"{name}.json").is_file()]
    metafunc.parametrize("path", found or [folder], ids=lambda path: path.stem)


def test_golden(path):
    assert path.is_file(), f"no golden file of a known name in {path}"
    CHECKS[path.stem](json.loads(path.read_text()))
