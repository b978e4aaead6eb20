"""SLAM's equations against float64 derivations, LCM, stock pipelines and the gradient's way through one step."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, LCMScheduler

from brisk import macs, optim, schedules, sd_inputs, sd_models, splam, tiny

pytestmark = pytest.mark.quick

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TYPES = ("epsilon", "v_prediction", "sample")


def table(**changes):
    return DDPMScheduler(**{**SD, **changes}).alphas_cumprod


def levels(index, like, steps=50, **changes):
    """(grid, t, t', a, s, a', s') of the solver steps `index`."""
    grid = schedules.solver_grid(table(**changes), steps)
    index = torch.as_tensor(index)
    start = schedules.signal_and_noise(grid.alpha_cumprod_start[index], like)
    end = schedules.signal_and_noise(grid.alpha_cumprod_end[index], like)
    return grid, grid.start_timesteps[index], grid.end_timesteps[index], *start, *end


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_x0_eps(o, x, a, s, kind):
    """Section 2 of the method, once more, in numpy."""
    if kind == "epsilon":
        return (x - s * o) / a, o
    if kind == "v_prediction":
        return a * x - s * o, a * o + s * x
    return o, (x - a * o) / s


@pytest.mark.parametrize("kind", TYPES)
def test_guided_ddim_step_matches_numpy(kind):
    cond, uncond, x = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), draw(3, 4, 2, 2, seed=2)
    abar, abar_end = np.array([0.9, 0.4, 0.01]), np.array([0.99, 0.5, 0.02])
    a, s = schedules.signal_and_noise(torch.tensor(abar), x)
    a_end, s_end = schedules.signal_and_noise(torch.tensor(abar_end), x)
    found = splam.guided_ddim_step(cond, uncond, x, a, s, a_end, s_end, 7.25, kind)
    for row in range(3):
        al, si, al_end, si_end = (
            abar[row] ** 0.5,
            (1 - abar[row]) ** 0.5,
            abar_end[row] ** 0.5,
            (1 - abar_end[row]) ** 0.5,
        )
        xc, ec = plain_x0_eps(cond[row].numpy(), x[row].numpy(), al, si, kind)
        xu, eu = plain_x0_eps(uncond[row].numpy(), x[row].numpy(), al, si, kind)
        x0, eps = 8.25 * xc - 7.25 * xu, 8.25 * ec - 7.25 * eu
        for value, expected in zip(found, (al_end * x0 + si_end * eps, x0, eps), strict=True):
            np.testing.assert_allclose(value[row].numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TYPES)
def test_one_teacher_without_guidance_gap_gives_plain_ddim(kind):
    """cond = uncond: the guidance weight must not matter, and noise of a clean sample is found again."""
    x0, noise = draw(2, 4, 2, 2), draw(2, 4, 2, 2, seed=1)
    _, _, _, a, s, a_end, s_end = (*levels([9, 40], x0)[:3], *(v.double() for v in levels([9, 40], x0)[3:]))
    raw = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[kind]
    x_end, found, eps = splam.guided_ddim_step(raw, raw, a * x0 + s * noise, a, s, a_end, s_end, 8.0, kind)
    torch.testing.assert_close(found, x0, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(eps, noise, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x_end, a_end * x0 + s_end * noise, atol=1e-6, rtol=1e-6)


def test_sub_path_end_points():
    x, x_end = draw(3, 4, 2, 2).float(), draw(3, 4, 2, 2, seed=1).float()
    _, _, _, a, s, a_end, s_end = levels([0, 10, 49], x)
    at_start, sigma_start = splam.sub_path_point(x, x_end, torch.ones(3), a, s, a_end, s_end)
    at_end, sigma_end = splam.sub_path_point(x, x_end, torch.zeros(3), a, s, a_end, s_end)
    assert torch.equal(at_start, x)
    torch.testing.assert_close(sigma_start, s, atol=0, rtol=1e-6)
    torch.testing.assert_close(at_end, a / a_end * x_end, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(sigma_end, a / a_end * s_end, atol=0, rtol=1e-6)


def test_sub_path_point_and_noise_level_match_numpy():
    x, x_end, gamma = draw(3, 4, 2, 2), draw(3, 4, 2, 2, seed=1), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    a, s, a_end, s_end = (value.double() for value in levels([0, 10, 49], x)[3:])
    point, sigma = splam.sub_path_point(x, x_end, gamma, a, s, a_end, s_end)
    for row in range(3):
        al, si, al_end, si_end = (value[row].item() for value in (a, s, a_end, s_end))
        g, r = gamma[row].item(), al / al_end
        delta = x[row].numpy() - r * x_end[row].numpy()
        np.testing.assert_allclose(point[row].numpy(), r * x_end[row].numpy() + g * delta, rtol=1e-9, atol=1e-10)
        # forward process over the piece: x_t = r x_t' + sqrt(1 - r^2) fresh noise
        quadrature = ((si_end * r) ** 2 + g**2 * (1 - r**2)) ** 0.5
        assert sigma[row].item() == pytest.approx(quadrature, rel=1e-5)
        assert sigma[row].item() <= g * si + (1 - g) * si_end * r + 1e-9


def test_signal_coefficient_does_not_depend_on_gamma():
    x0 = draw(4, 4, 2, 2)
    a, s, a_end, s_end = (value.double() for value in levels([5, 5, 5, 5], x0)[3:])
    gamma = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    point, _ = splam.sub_path_point(a * x0, a_end * x0, gamma, a, s, a_end, s_end)
    torch.testing.assert_close(point, a * x0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_clean_sample_is_recovered_from_the_networks_combination_at_every_gamma(kind):
    """x_g = a x0 + sigma e; epsilon is e, v is a e - s x0 with the coefficients at t."""
    x0, noise = draw(5, 4, 2, 2), draw(5, 4, 2, 2, seed=1)
    a, s, a_end, s_end = (value.double() for value in levels([0, 1, 20, 48, 49], x0)[3:])
    for g in (1e-3, 0.35, 1.0):
        _, sigma = splam.sub_path_point(x0, x0, torch.full((5,), g, dtype=torch.float64), a, s, a_end, s_end)
        point = a * x0 + sigma * noise
        output = noise if kind == "epsilon" else a * noise - s * x0
        torch.testing.assert_close(splam.sub_path_x0(output, point, a, s, sigma, kind), x0, atol=1e-10, rtol=1e-9)
        rho = (a**2 + sigma**2).sqrt()  # the SNR-matched network is a plain one at level (a, sigma) / rho
        matched = noise if kind == "epsilon" else (a * noise - sigma * x0) / rho
        torch.testing.assert_close(splam.student_x0(matched, point, a, s, sigma, rho, kind), x0, atol=1e-10, rtol=1e-9)


def lcm_step(kind, student_out, target_out, x, x_end, t, t_end, abar):
    """Prediction and target of latent consistency distillation, written with diffusers' LCMScheduler."""
    scheduler = LCMScheduler(**SD, timestep_scaling=10.0, prediction_type=kind)

    def consistency(out, sample, timesteps):
        rows = []
        for row, timestep in enumerate(timesteps.tolist()):
            c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
            al, be = abar[timestep].double() ** 0.5, (1 - abar[timestep].double()) ** 0.5
            if kind == "epsilon":
                x0 = (sample[row] - be * out[row]) / al
            else:
                x0 = out[row] if kind == "sample" else al * sample[row] - be * out[row]
            rows.append(c_out * x0 + c_skip * sample[row])
        return torch.stack(rows)

    return consistency(student_out, x, t), consistency(target_out, x_end, t_end)


@pytest.mark.parametrize("parametrisation", ["paper", "snr"])
@pytest.mark.parametrize("kind", TYPES)
def test_gamma_one_is_lcm(kind, parametrisation):
    abar, index = table(), [0, 1, 25, 49]
    latents, noise, student_out, target_out, x_end = (draw(4, 4, 2, 2, seed=seed).float() for seed in range(5))
    _, t, t_end, a, s, a_end, s_end = levels(index, latents)
    x = a * latents + s * noise
    point, sigma = splam.sub_path_point(x, x_end, torch.ones(4), a, s, a_end, s_end)
    snr = splam.log_snr_table(abar) if parametrisation == "snr" else None
    student_in, student_time, rho = splam.student_input(point, t, sigma, a, snr)
    torch.testing.assert_close(student_in, x, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(student_time.float(), t.float(), atol=0.02, rtol=0)
    x0 = splam.student_x0(student_out, point, a, s, sigma, rho, kind)
    prediction = splam.consistency_output(point, x0, t)
    target = splam.consistency_output(x_end, schedules.to_x0_eps(target_out, x_end, a_end, s_end, kind)[0], t_end)
    expected, expected_target = lcm_step(kind, student_out, target_out, x, x_end, t, t_end, abar)
    torch.testing.assert_close(prediction.double(), expected.double(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(target.double(), expected_target.double(), atol=2e-5, rtol=2e-5)


def test_boundary_scalings_match_the_lcm_scheduler_and_numpy():
    t = torch.tensor([0, 1, 19, 500, 999])
    for factor in (1.0, 10.0):
        c_skip, c_out = splam.boundary_scalings(t, factor)
        u = factor * t.numpy().astype(np.float64)
        np.testing.assert_allclose(c_skip, 0.25 / (u**2 + 0.25), rtol=1e-5)
        np.testing.assert_allclose(c_out, u / np.sqrt(u**2 + 0.25), rtol=1e-5)
        theirs = [
            LCMScheduler(timestep_scaling=factor).get_scalings_for_boundary_condition_discrete(i) for i in t.tolist()
        ]
        np.testing.assert_allclose(c_skip, [float(pair[0]) for pair in theirs], rtol=1e-5)
        np.testing.assert_allclose(c_out, [float(pair[1]) for pair in theirs], rtol=1e-5)
    assert [value.item() for value in splam.boundary_scalings(torch.tensor([0]))] == [1.0, 0.0]


def test_target_of_the_first_solver_step_is_the_teachers_sample_exactly():
    """t' = 0: the recursion's base case must not touch the teacher's last step, whatever the network says."""
    x_end, out = draw(2, 4, 2, 2).float(), 100 * draw(2, 4, 2, 2, seed=1).float()
    _, _, t_end, _, _, a_end, s_end = levels([0, 0], x_end)
    assert t_end.tolist() == [0, 0]
    x0, _ = schedules.to_x0_eps(out, x_end, a_end, s_end, "epsilon")
    assert torch.equal(splam.consistency_output(x_end, x0, t_end), x_end)


@pytest.mark.parametrize("dim", [4, 7, 256])
def test_gamma_embedding_matches_numpy(dim):
    gamma = torch.tensor([1.0, 0.999, 0.35, 0.01])
    half = dim // 2
    frequencies = np.exp(-np.arange(half) * np.log(10000) / (half - 1))
    for scale in (1.0, 1000.0):
        angles = scale * (10 - 10 * gamma.double().numpy())[:, None] * frequencies
        expected = np.concatenate([np.sin(angles), np.cos(angles), np.zeros((4, dim % 2))], axis=1)
        # float32 angles reach 1e4
        np.testing.assert_allclose(splam.gamma_embedding(gamma, dim, scale), expected, atol=2e-6 * max(10 * scale, 1))
    assert splam.gamma_embedding(gamma, None) is None


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_embedding_at_gamma_one_is_what_a_stock_pipeline_feeds_at_guidance_scale_one(family):
    pipe = tiny.make_pipeline(family)
    student = sd_models.create_student(pipe.unet, 32, "zero")
    pipe.register_modules(unet=student)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=50)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    forward = student.forward

    def capture(sample, *args, **kwargs):
        calls.append((len(sample), kwargs["timestep_cond"]))
        return forward(sample, *args, **kwargs)

    student.forward = capture
    for guidance, gamma in ((1.0, 1.0), (7.5, 0.35)):
        calls.clear()
        pipe("a", num_inference_steps=1, guidance_scale=guidance, height=32, width=32, output_type="latent")
        (batch, fed), = calls  # fmt: skip
        assert batch == 1, "no classifier-free guidance on top"
        ours = splam.gamma_embedding(torch.tensor([gamma]), 32)
        torch.testing.assert_close(fed, ours, atol=0 if gamma == 1 else 5e-3, rtol=0)


def test_fraction_lies_in_the_half_open_interval_and_the_forced_share_is_exact():
    uniform = torch.rand(2, 200_000, generator=torch.Generator().manual_seed(0))
    uniform[0, 0] = 0.0
    for low in (0.0, 0.6):
        gamma = splam.draw_fraction(uniform, low)
        assert gamma.min() > low and gamma.max() == 1 and gamma[0] == 1
        assert gamma.mean().item() == pytest.approx((1 + low) / 2, abs=3e-3)
    largest = torch.tensor([[1 - 2**-24], [0.5]])  # the largest float32 that torch.rand returns
    assert splam.draw_fraction(largest).item() > 0
    for probability in (0.0, 0.25, 1.0):
        forced = (splam.draw_fraction(uniform, 0.2, probability) == 1).float().mean().item()
        assert forced == pytest.approx(probability, abs=5e-3)


def test_losses_match_numpy():
    prediction, target = draw(2, 4, 3, 3), draw(2, 4, 3, 3, seed=1)
    d = (prediction - target).numpy()
    assert splam.distillation_loss(prediction, target).item() == pytest.approx((d**2).mean(), rel=1e-5)
    for c in (1e-3, 0.5):
        expected = (np.sqrt(d**2 + c**2) - c).mean()
        assert splam.distillation_loss(prediction, target, "huber", c).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="l1"):
        splam.distillation_loss(prediction, target, "l1")


def test_loss_of_half_precision_values_is_computed_in_float32():
    loss = splam.distillation_loss(torch.full((4,), 1.0, dtype=torch.bfloat16), torch.full((4,), 1.001))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1e-6, rel=1e-2)


def test_snr_matched_end_points():
    abar = table()
    snr, index = splam.log_snr_table(abar), [0, 1, 10, 30, 49]
    x, x_end = draw(5, 4, 2, 2).float(), draw(5, 4, 2, 2, seed=1).float()
    _, t, t_end, a, s, a_end, s_end = levels(index, x)
    point, sigma = splam.sub_path_point(x, x_end, torch.ones(5), a, s, a_end, s_end)
    scaled, tau, rho = splam.snr_matched_input(point, sigma, a, snr)
    torch.testing.assert_close(rho, torch.ones_like(rho), atol=1e-6, rtol=0)
    torch.testing.assert_close(tau, t.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(scaled, x, atol=1e-5, rtol=1e-5)
    point, sigma = splam.sub_path_point(x, x_end, torch.zeros(5), a, s, a_end, s_end)
    scaled, tau, rho = splam.snr_matched_input(point, sigma, a, snr)
    torch.testing.assert_close(tau, t_end.float(), atol=0.01, rtol=0)
    torch.testing.assert_close(scaled, x_end, atol=1e-4, rtol=1e-4)
    for i in range(5):  # in between: monotone, and the table at tau gives the wanted ratio
        gammas = torch.linspace(0.01, 1, 50)
        rows = [value[i : i + 1] for value in (a, s, a_end, s_end)]
        many = [row.expand(50, 1, 1, 1) for row in rows]
        point, sigma = splam.sub_path_point(x[i : i + 1].expand(50, 4, 2, 2), x_end[i : i + 1], gammas, *many)
        _, tau, _ = splam.snr_matched_input(point, sigma, many[0], snr)
        assert (tau.diff() >= 0).all() and tau.min() >= t_end[i] - 0.01 and tau.max() <= t[i] + 0.01
        ratio = np.interp(tau.double(), np.arange(1000), snr.double())
        np.testing.assert_allclose(ratio, (many[0] / sigma).log().flatten(), atol=2e-3)


@pytest.mark.parametrize("parametrisation", ["paper", "snr"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_is_finite_with_gradients_at_the_last_step(kind, parametrisation):
    abar = table(rescale_betas_zero_snr=True)
    assert abar[-1] == 0
    gamma = torch.tensor([1.0, 0.5, 1e-3, 2**-24])
    latents, noise, cond, uncond, out = (draw(4, 4, 2, 2, seed=seed).float() for seed in range(5))
    grid, t, t_end, a, s, a_end, s_end = levels([49] * 4, latents, rescale_betas_zero_snr=True)
    schedules.check_prediction_type(kind, grid.alpha_cumprod_start)
    x = a * latents + s * noise
    x_end, _, _ = splam.guided_ddim_step(cond, uncond, x, a, s, a_end, s_end, 8.0, kind)
    target = splam.consistency_output(x_end, schedules.to_x0_eps(uncond, x_end, a_end, s_end, kind)[0], t_end)
    point, sigma = splam.sub_path_point(x, x_end, gamma, a, s, a_end, s_end)
    snr = splam.log_snr_table(abar) if parametrisation == "snr" else None
    student_in, time, rho = splam.student_input(point, t, sigma, a, snr)
    assert time.tolist() == [999.0] * 4
    out.requires_grad_()
    x0 = splam.student_x0(out, point, a, s, sigma, rho, kind)
    loss = splam.distillation_loss(splam.consistency_output(point, x0, t), target)
    (gradient,) = torch.autograd.grad(loss, out)
    for value in (student_in, time, x0, loss, gradient):
        assert torch.isfinite(value).all()
    assert (gradient.flatten(1).abs().amax(1) > 0).all()
    if kind == "v_prediction":  # r = 0, D = gamma: X0 = -v wherever on the sub-path
        torch.testing.assert_close(x0, -out, atol=1e-5, rtol=1e-5)


def test_epsilon_at_zero_terminal_snr_and_unknown_types_are_refused():
    grid = schedules.solver_grid(table(rescale_betas_zero_snr=True), 50)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        schedules.check_prediction_type("epsilon", grid.alpha_cumprod_start)
    with pytest.raises(ValueError, match="flow"):
        schedules.check_prediction_type("flow", grid.alpha_cumprod_start)
    with pytest.raises(ValueError, match="flow"):
        schedules.check_prediction_type("flow")
    schedules.check_prediction_type("epsilon", schedules.solver_grid(table(), 50).alpha_cumprod_start)
    schedules.check_prediction_type("epsilon")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_student_starts_as_the_teacher_bit_for_bit_and_its_projection_gets_gradient(family):
    teacher = tiny.make_pipeline(family).unet.eval()
    before = dict(teacher.config)
    student = sd_models.create_student(teacher, 32, "zero").eval()
    inputs = macs.unet_inputs(teacher.config, 3, 8, tokens=16, generator=torch.Generator().manual_seed(0))
    gamma = splam.gamma_embedding(torch.tensor([1.0, 0.4, 0.1]), 32)
    assert torch.equal(student(**inputs, timestep_cond=gamma).sample, teacher(**inputs).sample)
    student(**inputs, timestep_cond=gamma).sample.square().mean().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0
    assert dict(teacher.config) == before and teacher.config.time_cond_proj_dim is None
    other = sd_models.create_student(teacher, 32, "default").eval()
    assert not torch.equal(other(**inputs, timestep_cond=gamma).sample, teacher(**inputs).sample)


def distillation_step(pipe, student, ema, lora):
    """Stages 10b to 10f of the script on random data; the loss."""
    parts = sd_models.Parts(
        is_xl=hasattr(pipe, "text_encoder_2"), zeros_for_empty=True, tokenizers=[pipe.tokenizer], vae=pipe.vae,
        text_encoders=[pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])],
        unet=pipe.unet, scheduler_config={}, extras={},
    )  # fmt: skip
    if parts.is_xl:
        parts.tokenizers.append(pipe.tokenizer_2)
    draw_from, cond_dim = torch.Generator().manual_seed(0), student.config.time_cond_proj_dim
    batch = tiny.SyntheticBatches(sd_inputs.Tokenize(parts.tokenizers), 2, 32).batch
    blank = sd_inputs.encode_blank(parts, "cpu")
    latents, embeddings, sizes = sd_inputs.encode_batch(parts, batch, blank, draw_from, 32, 8, torch.enable_grad())
    cond = sd_inputs.condition(parts, embeddings, sizes, 2)
    both = sd_inputs.stack_conditions(cond, sd_inputs.condition(parts, sd_inputs.unconditional(parts, blank), sizes, 2))
    _, t, t_end, a, s, a_end, s_end = levels([3, 30], latents)
    noisy, gamma = a * latents + s * torch.randn(latents.shape, generator=draw_from), torch.tensor([0.3, 1.0])
    with torch.no_grad(), sd_models.adapters_off(pipe.unet, lora):
        guided = sd_models.predict(pipe.unet, torch.float32, noisy.repeat(2, 1, 1, 1), t.repeat(2), both)
    x_end, _, _ = splam.guided_ddim_step(*guided.chunk(2), noisy, a, s, a_end, s_end, 8.0, "epsilon")
    with torch.no_grad():
        embedded = splam.gamma_embedding(torch.ones(2), cond_dim)
        out = sd_models.predict(ema.network if ema else student, torch.float32, x_end, t_end, cond, embedded)
    target = splam.consistency_output(x_end, schedules.to_x0_eps(out, x_end, a_end, s_end, "epsilon")[0], t_end)
    assert not target.requires_grad and not x_end.requires_grad and not latents.requires_grad
    point, sigma = splam.sub_path_point(noisy, x_end, gamma, a, s, a_end, s_end)
    out = sd_models.predict(student, torch.float32, point, t, cond, splam.gamma_embedding(gamma, cond_dim))
    prediction = splam.consistency_output(point, splam.student_x0(out, point, a, s, sigma, None, "epsilon"), t)
    return splam.distillation_loss(prediction, target, "huber")


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_only_the_students_trainable_parameters_get_gradient(family, lora):
    pipe = tiny.make_pipeline(family)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if family == "sdxl" else [])]
    for module in (pipe.unet, pipe.vae, *encoders):
        module.requires_grad_(False).eval()
    if lora:
        student, ema = pipe.unet, None
        sd_models.add_lora(student, 4, 4, 0.0, sd_models.LORA_TARGETS)
    else:
        student = sd_models.create_student(pipe.unet, 32, "zero")
        ema = optim.EMA(copy.deepcopy(student))
    distillation_step(pipe, student, ema, lora).backward()
    frozen = [pipe.vae, *encoders, *([ema.network] if ema else []), *([] if lora else [pipe.unet])]
    assert all(parameter.grad is None for module in frozen for parameter in module.parameters())
    with_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    wanted = {name for name, _ in student.named_parameters() if not lora or "lora_" in name}
    assert with_gradient == wanted
    # LoRA's second factor starts at zero, so the first one gets none at the first step
    moving = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {name for name in wanted if not lora or "lora_B" in name} - moving == set()
