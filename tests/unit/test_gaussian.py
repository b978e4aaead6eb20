"""Gaussian diffusion where golden numbers do not reach: identities, extremes of zero terminal SNR, flow, refusals."""

import math

import numpy as np
import pytest
import torch

from brisk import fpdm_options, gaussian

pytestmark = pytest.mark.quick
STEPS = torch.tensor([0, 1, 100, 500, 900, 998, 999])
KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]


def tables_of(zero_snr=False, timesteps=None):
    betas = gaussian.linear_betas()
    return gaussian.make_tables(gaussian.zero_terminal_snr(betas) if zero_snr else betas, timesteps)


def draws(count=7, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(count, 4, 4, 4, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3)]


def test_linear_betas_keep_the_total_noise_at_other_numbers_of_steps():
    assert gaussian.linear_betas()[[0, -1]].tolist() == [1e-4, 0.02]
    assert gaussian.linear_betas(250)[[0, -1]].tolist() == pytest.approx([4e-4, 0.08], rel=1e-12)
    ends = [(1 - gaussian.linear_betas(steps)).log().sum().item() for steps in (250, 1000)]
    assert ends[0] == pytest.approx(ends[1], rel=0.03)


def test_zero_terminal_snr_keeps_the_first_value_and_ends_without_signal():
    betas = gaussian.zero_terminal_snr(gaussian.linear_betas())
    tables = gaussian.make_tables(betas)
    assert betas[0].item() == pytest.approx(1e-4, rel=1e-9) and betas[-1] == 1 and tables.alphas_cumprod[-1] == 0
    assert (tables.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_a_perfect_prediction_recovers_image_and_noise(kind, zero_snr):
    tables, (x0, noise, _) = tables_of(zero_snr), draws(dtype=torch.float64)
    x_t = gaussian.noised(tables, x0, noise, STEPS)
    target = gaussian.target(tables, x0, noise, STEPS, kind)
    found = gaussian.recover(tables, target, x_t, STEPS, kind)
    for one, two in zip(found, (x0, noise), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weighting", fpdm_options.LOSS_WEIGHTINGS)
def test_everything_is_finite_at_every_step_of_zero_snr_and_v(weighting):
    tables, (x0, noise, logits) = tables_of(True), draws(1000)
    index = torch.arange(1000)
    x_t = gaussian.noised(tables, x0, noise, index)
    target = gaussian.target(tables, x0, noise, index, "v_prediction")
    assert torch.equal(x_t[-1], noise[-1]) and torch.equal(target[-1], -x0[-1]), "nothing but noise at the last step"
    output = torch.cat([target + 0.1 * x0, logits], 1).requires_grad_()
    bound = gaussian.variational_bound(tables, x0, x_t, index, output, "v_prediction")
    weights = gaussian.loss_weights(tables, index, weighting, "v_prediction")
    assert bound.isfinite().all() and weights.isfinite().all() and (weights >= 0).all()
    (bound.sum() + (weights * gaussian.flat_mean((output[:, :4] - target) ** 2)).sum()).backward()
    assert output.grad.isfinite().all()
    step = gaussian.ddpm_step(tables, output.detach(), x_t, index, "v_prediction", noise)
    assert step.isfinite().all()
    for eta in (0.0, 1.0):
        assert gaussian.ddim_step(tables, target, x_t, index, "v_prediction", noise, eta).isfinite().all()


@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_p2_on_the_prediction_is_snr_times_deviation_on_the_error_of_the_image(kind, zero_snr):
    """As the published code writes it: SNR sqrt(1 - abar) (x0 - x0')^2."""
    tables, (x0, noise, wrong) = tables_of(zero_snr), draws(6, torch.float64)
    index = STEPS[:6]
    x_t = gaussian.noised(tables, x0, noise, index)
    target = gaussian.target(tables, x0, noise, index, kind)
    prediction = target + 0.3 * wrong
    recovered, _ = gaussian.recover(tables, prediction, x_t, index, kind)
    signal = tables.alphas_cumprod[index]
    expected = signal / (1 - signal) * (1 - signal).sqrt() * gaussian.flat_mean((x0 - recovered) ** 2)
    found = gaussian.loss_weights(tables, index, "p2", kind) * gaussian.flat_mean((target - prediction) ** 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_image_by_at_most_five(kind):
    tables, (x0, noise, wrong) = tables_of(), draws(dtype=torch.float64)
    x_t = gaussian.noised(tables, x0, noise, STEPS)
    target = gaussian.target(tables, x0, noise, STEPS, kind)
    recovered, _ = gaussian.recover(tables, target + wrong, x_t, STEPS, kind)
    signal = tables.alphas_cumprod[STEPS]
    expected = (signal / (1 - signal)).clamp(max=5) * gaussian.flat_mean((x0 - recovered) ** 2)
    found = gaussian.loss_weights(tables, STEPS, "min_snr", kind) * gaussian.flat_mean(wrong**2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_uniform_weights_are_one():
    for kind in ("epsilon", "v_prediction", "flow"):
        assert gaussian.loss_weights(tables_of(True), STEPS, "uniform", kind).tolist() == [1.0] * 7


def test_the_bound_moves_the_variance_and_never_the_prediction():
    tables, (x0, noise, logits) = tables_of(), draws()
    x_t = gaussian.noised(tables, x0, noise, STEPS)
    output = torch.cat([noise + 0.2 * x0, logits], 1).requires_grad_()
    gaussian.variational_bound(tables, x0, x_t, STEPS, output, "epsilon").sum().backward()
    assert not output.grad[:, :4].any() and all(row.any() for row in output.grad[:, 4:])


def test_the_bound_is_zero_where_mean_and_variance_are_the_posteriors():
    tables, (x0, noise, _) = tables_of(), draws(dtype=torch.float64)
    index = STEPS.clamp(min=2)
    x_t = gaussian.noised(tables, x0, noise, index)
    exact = torch.cat([noise, torch.full_like(noise, -1.0)], 1)  # logit -1: the posterior's own variance
    assert gaussian.variational_bound(tables, x0, x_t, index, exact, "epsilon").abs().max() < 1e-8
    for logit in (-0.5, 1.0):
        wider = torch.cat([noise, torch.full_like(noise, logit)], 1)
        assert (gaussian.variational_bound(tables, x0, x_t, index, wider, "epsilon") > 0).all()


def test_the_bound_is_the_divergence_of_two_normals_in_bits():
    tables, (x0, noise, logits) = tables_of(), draws(dtype=torch.float64)
    index = STEPS.clamp(min=1)
    x_t = gaussian.noised(tables, x0, noise, index)
    output = torch.cat([noise + 0.3 * x0, logits], 1)
    signal, betas = tables.alphas_cumprod, gaussian.linear_betas()
    for row, t in enumerate(index.tolist()):
        a, previous, beta = signal[t].item(), signal[t - 1].item(), betas[t].item()
        of_x0, of_x = beta * previous**0.5 / (1 - a), (1 - previous) * (1 - beta) ** 0.5 / (1 - a)
        narrow = beta * (1 - previous) / (1 - a)
        guess = (x_t[row] - (1 - a) ** 0.5 * output[row, :4]) / a**0.5
        share = (output[row, 4:] + 1) / 2
        wide = (share * math.log(beta) + (1 - share) * math.log(narrow)).exp()
        true = torch.distributions.Normal(of_x0 * x0[row] + of_x * x_t[row], narrow**0.5)
        ours = torch.distributions.Normal(of_x0 * guess + of_x * x_t[row], wide.sqrt())
        expected = torch.distributions.kl_divergence(true, ours).mean() / math.log(2)
        found = gaussian.variational_bound(tables, x0, x_t, index, output, "epsilon")[row]
        assert found.item() == pytest.approx(expected.item(), rel=1e-6), t


def test_flow_goes_straight_from_image_to_noise():
    x0, noise, _ = draws(3, torch.float64)
    x_t, target = gaussian.flow_path(x0, noise, torch.tensor([0, 250, 999]))
    assert torch.equal(x_t[0], x0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(target, x0 - noise)
    tau = torch.tensor([0.0, 0.25, 0.999], dtype=torch.float64)[:, None, None, None]
    torch.testing.assert_close(x_t + tau * target, x0)  # one Euler step of length tau along the target


@pytest.mark.parametrize("count", [2, 3, 10, 25, 100, 1000])
def test_respaced_steps_ascend_from_0_to_999(count):
    steps = gaussian.respaced_timesteps(count)
    assert len(steps) == count and steps[0] == 0 and steps[-1] == 999
    assert all(low < high for low, high in zip(steps, steps[1:], strict=False))
    if count % 2 == 0:
        assert steps == np.linspace(0, 999, count).round().astype(int).tolist()


def test_a_single_step_starts_where_there_is_only_noise():
    assert gaussian.respaced_timesteps(1) == [999]
    tables, (_, noise, logits) = tables_of(timesteps=[999]), draws(1)
    output = torch.cat([noise, logits], 1)
    assert gaussian.ddpm_step(tables, output, noise, torch.zeros(1, dtype=torch.long), "epsilon", noise).isfinite().all()


def test_lists_of_counts_and_fixed_strides():
    assert gaussian.respaced_timesteps("2,1") == [0, 499, 500]
    assert gaussian.respaced_timesteps("10,15,25")[10] == 334 and len(gaussian.respaced_timesteps("10,15,25")) == 50
    assert gaussian.respaced_timesteps("ddim50") == list(range(0, 1000, 20))
    assert gaussian.respaced_timesteps("ddim250")[-1] == 996, "never the last one"


@pytest.mark.parametrize("wanted", ["ddim300", "ddim999", 1001, "600,1", "0", "ddim0", "5,0"])
def test_numbers_of_steps_that_do_not_fit_are_refused(wanted):
    with pytest.raises(ValueError, match="steps"):
        gaussian.respaced_timesteps(wanted)


def test_respaced_tables_are_the_full_ones_at_the_steps_that_are_left():
    steps = gaussian.respaced_timesteps(20)
    full, few = tables_of(True), tables_of(True, steps)
    assert few.timesteps.tolist() == steps
    assert torch.equal(few.alphas_cumprod, full.alphas_cumprod[steps])
    torch.testing.assert_close((1 - few.betas).cumprod(0), few.alphas_cumprod, rtol=1e-9, atol=1e-15)
    assert few.betas[-1] == 1 and few.betas.dtype == torch.float64


@pytest.mark.parametrize(("kind", "zero_snr"), KINDS)
def test_sampling_with_the_exact_prediction_of_one_image_ends_at_it(kind, zero_snr):
    x0, noise, spread = draws(2, torch.float64)
    steps = gaussian.respaced_timesteps(10)
    tables = tables_of(zero_snr, steps)
    for sampler in ("ddpm", "ddim", "ddim, eta 1"):
        x, draw = noise, torch.Generator().manual_seed(3)
        for i in reversed(range(10)):
            index = torch.full((2,), i)
            signal = tables.alphas_cumprod[i]
            eps = (x - signal.sqrt() * x0) / (1 - signal).sqrt()
            prediction = gaussian.target(tables, x0, eps, index, kind)
            fresh = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            if sampler == "ddpm":
                x = gaussian.ddpm_step(tables, torch.cat([prediction, 0.1 * spread], 1), x, index, kind, fresh)
            else:
                x = gaussian.ddim_step(tables, prediction, x, index, kind, fresh, 1.0 * sampler.endswith("1"))
        torch.testing.assert_close(x, x0, rtol=1e-6, atol=1e-6)
