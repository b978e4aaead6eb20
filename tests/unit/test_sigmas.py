"""Noise levels, network maps, the mixture and the seeds of images beyond the golden numbers."""

import math

import pytest
import torch

from brisk import denoiser_maps, mixture, sample_seeds, sigmas

pytestmark = pytest.mark.quick
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SIGNAL = (1 - BETAS).cumprod(0)
TABLE = sigmas.noise_map(SIGNAL)


@pytest.mark.parametrize("num_steps", [2, 3, 11, 400])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [("polynomial", {"rho": 7.0}), ("logsnr", {}), ("time_uniform", {"rho": 1.0}), ("time_uniform", {"rho": 2.0}),
     ("discrete", {"table": TABLE}), ("discrete", {"table": TABLE, "rho": 3.0})],
)  # fmt: skip
def test_grids_fall_from_one_end_to_the_other(kind, settings, num_steps):
    grid = sigmas.schedule(kind, num_steps, 0.03, 14.0, **settings)
    assert grid.dtype == torch.float64 and len(grid) == num_steps and (grid.diff() < 0).all()
    torch.testing.assert_close(grid[[0, -1]], torch.tensor([14.0, 0.03], dtype=torch.float64), rtol=1e-9, atol=0)


def test_without_a_rho_the_customary_one_is_taken():
    assert sigmas.schedule("polynomial", 5, 0.1, 10.0).equal(sigmas.polynomial(5, 0.1, 10.0, 7.0))
    assert sigmas.schedule("time_uniform", 5, 0.1, 10.0).equal(sigmas.time_uniform(5, 0.1, 10.0, 1.0))
    assert sigmas.schedule("discrete", 5, table=TABLE).equal(sigmas.discrete(5, TABLE, 1.0, *sigmas.sigma_range(TABLE)))


def test_flow_grids_are_those_of_the_diffusers_scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(11)
    torch.testing.assert_close(sigmas.flowmatch(11).float(), static.sigmas[:-1], atol=1e-6, rtol=0)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=torch.linspace(1, 1 / 1000, 9).tolist(), mu=sigmas.flow_mu(128))
    torch.testing.assert_close(sigmas.flowmatch(9, mu=sigmas.flow_mu(128)).float(), dynamic.sigmas[:-1], atol=1e-6, rtol=0)
    assert sigmas.flow_mu(128) == pytest.approx(1.15) and sigmas.flow_mu(32) == pytest.approx(0.5)


def test_the_map_goes_through_every_training_step_and_back():
    steps = torch.arange(1, 1001, dtype=torch.float64)
    levels = ((1 - SIGNAL) / SIGNAL).sqrt()
    torch.testing.assert_close(sigmas.sigma_of_time(TABLE, steps / 1000), levels)
    torch.testing.assert_close(denoiser_maps.vp_timestep(TABLE, levels), steps - 1)
    between = torch.logspace(-2, 1.2, 50, dtype=torch.float64)  # past both ends too
    torch.testing.assert_close(sigmas.sigma_of_time(TABLE, sigmas.time_of_sigma(TABLE, between)), between)
    rounded = denoiser_maps.vp_timestep(TABLE, torch.tensor([1e-4, 1.0, 1e4]), rounded=True)
    assert rounded.tolist() == [0, 354, 999] and rounded.dtype == torch.float32


def test_a_schedule_without_signal_at_its_end_stays_finite():
    signal = SIGNAL.clone()
    signal[-1] = 0
    assert sigmas.sigma_range(sigmas.noise_map(signal))[1] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "num_steps", "settings", "message"),
    [
        ("polynomial", 1, {"sigma_min": 0.1, "sigma_max": 1.0}, "num_steps is 1"),
        ("polynomial", 5, {"sigma_min": 0.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max"),
        ("logsnr", 5, {"sigma_min": 2.0, "sigma_max": 1.0}, "0 < sigma_min < sigma_max"),
        ("time_uniform", 5, {"sigma_min": 0.1, "sigma_max": math.inf}, "0 < sigma_min < sigma_max"),
        ("polynomial", 5, {"sigma_min": 0.1, "sigma_max": 1.0, "rho": -1.0}, "schedule_rho is -1"),
        ("polynomial", 5, {}, "needs sigma_min and sigma_max"),
        ("discrete", 5, {}, "needs a model with a table"),
        ("flowmatch", 5, {"shift": None}, "must be positive unless mu is given"),
        ("cosine", 5, {}, "must be one of polynomial"),
    ],
)
def test_impossible_grids_are_refused(kind, num_steps, settings, message):
    with pytest.raises(ValueError, match=message):
        sigmas.schedule(kind, num_steps, **settings)


@pytest.mark.parametrize("signal", [[0.5, 0.6], [0.9], [1.0, 0.5], [0.9, 0.9, 0.1]])
def test_a_table_that_does_not_fall_is_refused(signal):
    with pytest.raises(ValueError, match="must decrease strictly"):
        sigmas.noise_map(signal)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_network_of_any_type_that_is_right_gives_the_right_direction(kind):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.05, 1.0, 12.0], dtype=torch.float64)
    wide = sigma.reshape(3, 1, 1, 1)
    x, root = x0 + wide * noise, (1 + wide**2).sqrt()
    output = {"epsilon": noise, "v_prediction": (noise - wide * x0) / root, "sample": x0}[kind]
    torch.testing.assert_close(denoiser_maps.vp_direction(output, x, sigma, kind), noise)
    doubled = torch.cat([output, torch.full_like(output, 7.0)], 1)  # learned variance is not looked at
    torch.testing.assert_close(denoiser_maps.vp_direction(doubled, x, sigma, kind), noise)
    clipped = denoiser_maps.denoised(x, denoiser_maps.vp_direction(output, x, sigma, kind, clip=True), sigma)
    torch.testing.assert_close(clipped, x0.clamp(-1, 1))
    with pytest.raises(ValueError, match="must be epsilon"):
        denoiser_maps.vp_direction(output, x, sigma, "flow")


def test_the_edm_form_is_the_published_preconditioning():
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 3, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.05, 1.0, 12.0], dtype=torch.float64)
    wide = sigma.reshape(3, 1, 1, 1)
    skip, out = 0.25 / (wide**2 + 0.25), wide * 0.5 / (wide**2 + 0.25).sqrt()
    found = denoiser_maps.denoised(x, denoiser_maps.edm_direction(output, x, sigma), sigma)
    torch.testing.assert_close(found, skip * x + out * output)
    torch.testing.assert_close(denoiser_maps.edm_input(x, sigma), x / (wide**2 + 0.25).sqrt())


def test_half_precision_outputs_keep_their_digits_at_small_noise():
    """The direction is formed without the clean sample, from which little of it would be left at these levels."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 64, 3, 4, 4, generator=generator)
    sigma = torch.full((64,), 0.003)
    x = x0 + 0.003 * noise
    v = ((noise - 0.003 * x0) / math.sqrt(1 + 0.003**2)).bfloat16()
    found = denoiser_maps.vp_direction(v, x, sigma, "v_prediction")
    assert found.dtype == torch.float32
    assert (found - noise).norm() / noise.norm() < 0.003


def test_classifier_guidance_follows_the_gradient_of_the_class():
    """With the exact posterior of a mixture, a scale of 1 turns the direction of all classes into that of one."""
    world = mixture.from_lists([[1.0, 0.2], [-0.6, 0.4]], [0.3, 0.3], [0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]])
    x = torch.tensor([[0.4, 0.1], [0.2, 0.9]], dtype=torch.float64)
    sigma, labels = torch.tensor([0.5, 2.0], dtype=torch.float64), torch.tensor([0, 1])
    scaled = denoiser_maps.vp_input(x, sigma).requires_grad_()
    flat = scaled * (1 + sigma[:, None] ** 2).sqrt()
    variance = world.stds**2 + sigma[:, None] ** 2
    logits = -((flat[:, None] - world.means) ** 2).sum(-1) / (2 * variance) - variance.log()
    log_class = (logits + world.class_weights[labels].log()).logsumexp(-1) - (logits + world.weights.log()).logsumexp(-1)
    gradient = torch.autograd.grad(log_class.sum(), scaled)[0]
    guided = denoiser_maps.classifier_guide(mixture.direction(world, x, sigma), gradient, sigma, 1.0)
    torch.testing.assert_close(guided, mixture.direction(world, x, sigma, labels))


def test_broken_mixtures_are_refused():
    with pytest.raises(ValueError, match="a mixture needs means"):
        mixture.from_lists([[0.0, 1.0]], [0.1, 0.2], [1.0])
    with pytest.raises(ValueError, match="a row of J weights"):
        mixture.from_lists([[0.0, 1.0]], [0.1], [1.0], [0.5])


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-4", "1-", "1.5"])
def test_seed_lists_that_mean_nothing_are_refused(text):
    with pytest.raises(ValueError, match="neither a number nor a rising range"):
        sample_seeds.parse_seeds(text)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 64, 65])
def test_every_seed_is_sampled_once_whatever_the_processes(count, world):
    ranks = [sample_seeds.batches(list(range(count)), 8, rank, world) for rank in range(world)]
    assert sorted(seed for rank in ranks for batch in rank for seed in batch) == list(range(count))
    assert len({len(rank) for rank in ranks}) == 1 and max(len(batch) for rank in ranks for batch in rank) <= 8


def test_images_depend_on_their_seed_alone():
    together = sample_seeds.generators([3, 4, 5])
    latents, labels = sample_seeds.draw_latents(together, (4, 2, 2)), sample_seeds.draw_labels(together, 1000)
    alone = sample_seeds.generators([4])
    assert sample_seeds.draw_latents(alone, (4, 2, 2))[0].equal(latents[1])
    assert sample_seeds.draw_labels(alone, 1000)[0] == labels[1]
