"""`EPDScheduler` against the batched sampler, in loops like those of diffusers' pipelines around a small function."""

import math
from itertools import product

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from random_predictor import BETAS, TABLE, make_predictor

from brisk import denoiser_maps, epd, predictor_files, sigmas, solvers
from brisk.epd_scheduler import EPDScheduler
from brisk.options import UserError

pytestmark = pytest.mark.quick
NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
SCALE = 3.0  # of guidance


def network(x, timestep, label):
    """A smooth function of input (R, ...), network time (R,) or (), and label (R,)."""
    time = denoiser_maps.expand(timestep.expand(len(x)) / 1000, x).to(x.dtype)
    return torch.tanh(x.roll(1, -1) * (1 + 0.5 * time)) + 0.3 * torch.sin(x + 2 * time) * denoiser_maps.expand(label, x)


def batched(made, noise=NOISE, prediction_type="epsilon", guided=True):
    """What `epd.solve` makes of `noise` in float64 with the directions of `network`."""

    def direction(x, sigma, rows=None):
        def once(label):
            labels = x.new_full((len(x),), label)
            if prediction_type == "flow_prediction":
                return network(x, 1000 * sigma, labels)
            output = network(denoiser_maps.vp_input(x, sigma), denoiser_maps.vp_timestep(TABLE, sigma), labels)
            return denoiser_maps.vp_direction(output, x, sigma, prediction_type)

        return denoiser_maps.guide(once(0.0), once(1.0), SCALE) if guided else once(1.0)

    flow = prediction_type == "flow_prediction"
    start = noise.double() * (1 if flow else made.sigmas[0].item())
    order = epd.history_order(made.solver.student, made.solver.max_order)
    states = epd.solve(direction, start, made.sigmas, epd.rows_of(made.tables), order, made.solver.afs, flow)
    return solvers.last(states)


def guided_output(inputs, t, guided):
    """The network on both halves of `inputs`, combined; all of it without guidance."""
    if not guided:
        return network(inputs, t, inputs.new_ones(len(inputs)))
    half = len(inputs) // 2
    labels = torch.cat([inputs.new_zeros(half), inputs.new_ones(half)])
    return denoiser_maps.guide(*network(inputs, t, labels).chunk(2), SCALE)


def run_like_sd(scheduler, noise=NOISE, guided=True, after=None):
    """StableDiffusionPipeline's loop: `step` gets unscaled latents, of one half."""
    latents = noise * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        latents = scheduler.step(guided_output(inputs, t, guided), t, latents, return_dict=False)[0]
        latents = after(index, latents) if after else latents
    return latents


def run_like_dit(scheduler, noise=NOISE):
    """DiTPipeline's loop: `step` gets the scaled latents of both halves."""
    both = torch.cat([noise] * 2)
    for t in scheduler.timesteps:
        half = both[: len(both) // 2]
        both = scheduler.scale_model_input(torch.cat([half, half]), t)
        output = guided_output(both, t, True)
        both = scheduler.step(torch.cat([output, output]), t, both).prev_sample
    return both.chunk(2)[0]


def run_like_sd3(scheduler, noise=NOISE):
    """StableDiffusion3Pipeline's loop: nothing is scaled."""
    latents = noise
    for t in scheduler.timesteps:
        output = guided_output(torch.cat([latents] * 2), t, True)
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
    return latents


def ddim(**changes):
    return DDIMScheduler(**BETAS, **changes).config


def close(found, expected, tolerance=2e-5):
    """Equal up to `tolerance` of the largest value."""
    assert (found.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("points", "afs", "max_order"), product([1, 2, 3], [False, True], [None, 3]))
def test_steps_are_the_batched_sampler(prediction_type, points, afs, max_order):
    made = make_predictor(points, afs, max_order)
    scheduler = EPDScheduler.from_predictor(made, ddim(prediction_type=prediction_type))
    assert len(scheduler.timesteps) == made.nfe.total_nfe
    expected = batched(made, prediction_type=prediction_type)
    close(run_like_sd(scheduler), expected)
    close(run_like_dit(scheduler), expected)
    close(run_like_sd(scheduler, guided=False), batched(made, prediction_type=prediction_type, guided=False))


@pytest.mark.parametrize(("points", "afs", "max_order"), product([1, 2, 3], [False, True], [None, 3]))
def test_flow_matching_steps_are_the_batched_sampler(points, afs, max_order):
    made = make_predictor(points, afs, max_order, flow=True)
    scheduler = EPDScheduler.from_predictor(made, FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    close(run_like_sd3(scheduler), batched(made, prediction_type="flow_prediction"))
    # without scale_model_input the analytic first step saves no call
    assert len(scheduler.timesteps) == made.nfe.total_nfe + afs
    # pipelines that scale get the same
    close(run_like_sd(scheduler), batched(made, prediction_type="flow_prediction"))


def test_every_run_begins_anew():
    made = make_predictor(2, True, 3)
    scheduler = EPDScheduler.from_predictor(made, ddim())
    other = NOISE.flip(0)[:2]
    for noise in (NOISE, other):
        close(run_like_sd(scheduler, noise), batched(made, noise))
    # one left unfinished
    scheduler.step(scheduler.scale_model_input(NOISE, 0), 0, NOISE)
    scheduler.set_timesteps(4)
    scheduler.set_timesteps(4, "cpu")
    close(run_like_sd(scheduler, other), batched(made, other))


def test_timesteps_are_not_rounded_and_in_order():
    made = make_predictor(2)
    found = EPDScheduler.from_predictor(made, ddim()).timesteps
    assert found.dtype == torch.float32 and found.shape == (12,)
    starts = denoiser_maps.vp_timestep(TABLE, made.sigmas[:-1])
    torch.testing.assert_close(found[::3].double(), starts, atol=1e-3, rtol=0)
    assert math.isclose(found[0], 999, abs_tol=1e-3) and (found != found.round()).sum() > 8
    flow = EPDScheduler.from_predictor(make_predictor(2, flow=True), FlowMatchEulerDiscreteScheduler().config)
    torch.testing.assert_close(flow.timesteps[::3].double(), 1000 * make_predictor(2, flow=True).sigmas[:-1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_latents_keep_a_state_in_single_precision(dtype):
    made = make_predictor(2, True, 3)
    scheduler = EPDScheduler.from_predictor(made, ddim())
    noise = NOISE.to(dtype)
    found = run_like_sd(scheduler, noise)
    assert found.dtype == dtype
    close(found, batched(made, noise.float()), 8 * torch.finfo(dtype).eps)
    # of a network without rounding of its own, rounding of the result is all that is left
    latents, tables = noise, made.tables
    for t in scheduler.timesteps:
        scheduler.scale_model_input(latents, t)
        latents = scheduler.step(noise, t, latents).prev_sample
    slopes = (tables.weight * tables.scale_dir * tables.scale_time).sum(1)
    expected = noise.double() * (made.sigmas[0] + (made.sigmas.diff() * slopes).sum())
    torch.testing.assert_close(latents.double(), expected, atol=1e-6, rtol=torch.finfo(dtype).eps / 2 + 1e-4)


def test_calls_are_counted_as_pipelines_count_them():
    scheduler = EPDScheduler.from_predictor(make_predictor(2, True), ddim())
    assert scheduler.order == 3 and scheduler.num_inference_steps == 4 and scheduler.init_noise_sigma == 1
    for wrong in (10, 11, 5):
        with pytest.raises(ValueError, match=rf"is {wrong}; this predictor has 4 intervals \(11 network calls\): pass"):
            scheduler.set_timesteps(wrong)
    flux = EPDScheduler.from_predictor(make_predictor(2, flow=True), FlowMatchEulerDiscreteScheduler().config)
    flux.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert flux.order == 1 and len(flux.timesteps) == 12
    flux.set_timesteps(4)
    assert flux.order == 3
    with pytest.raises(ValueError, match="sigmas cannot be chosen"):
        flux.set_timesteps(sigmas=[1.0, 0.7, 0.5, 0.25])
    with pytest.raises(ValueError, match="num_inference_steps is 2; "):
        flux.set_timesteps(sigmas=[1.0, 0.5])


def test_files_of_a_scheduler_hold_the_predictor(tmp_path):
    made = make_predictor(2, True, 3)
    predictor_files.write(made, tmp_path / "predictor.json")
    first = EPDScheduler.from_predictor(tmp_path / "predictor.json", ddim(prediction_type="v_prediction", clip_sample=False))
    first.save_pretrained(tmp_path / "scheduler")
    expected = batched(made, prediction_type="v_prediction")
    for again in (
        EPDScheduler.from_pretrained(tmp_path / "scheduler"),
        EPDScheduler.from_config(first.config),
        EPDScheduler.from_predictor(made, first.config),
    ):
        assert again.config.sigmas == made.sigmas.tolist() and again.config.weight == made.tables.weight.tolist()
        close(run_like_sd(again), expected)
    # what the pipeline had, steps_offset and the like, is not lost
    assert DDIMScheduler.from_config(first.config).config.clip_sample is False


def test_trained_betas_and_zero_snr_are_read():
    made = make_predictor()
    listed = DDIMScheduler(trained_betas=DDIMScheduler(**BETAS).betas.tolist()).config
    close(run_like_sd(EPDScheduler.from_predictor(made, listed)), batched(made))
    close(run_like_sd(EPDScheduler.from_predictor(made, PNDMScheduler(**BETAS).config)), batched(made))
    zero = EPDScheduler.from_predictor(made, ddim(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    table = sigmas.noise_map(DDIMScheduler(**BETAS, rescale_betas_zero_snr=True).alphas_cumprod)
    assert math.isclose(zero.timesteps[0], denoiser_maps.vp_timestep(table, made.sigmas[:1]), abs_tol=1e-3)


def test_predictors_of_other_models_are_refused(tmp_path):
    flow = FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(ValueError, match="own is for flow-matching models, the scheduler's config is of a DDPM-type one"):
        EPDScheduler.from_predictor(make_predictor(flow=True), ddim())
    with pytest.raises(ValueError, match="own is for DDPM-type models, the scheduler's config is of a flow-matching one"):
        EPDScheduler.from_predictor(make_predictor(), flow)
    with pytest.raises(ValueError, match="own is for edm models"):
        EPDScheduler.from_predictor(make_predictor(backend="edm"), ddim())
    with pytest.raises(ValueError, match="config of a scheduler of DDPM-type or flow-matching"):
        EPDScheduler.from_predictor(make_predictor(), EDMEulerScheduler().config)
    with pytest.raises(ValueError, match="starts at sigma 14.6146, the model was trained up to 5.83987"):
        EPDScheduler.from_predictor(make_predictor(), DDIMScheduler(beta_start=0.0001, beta_end=0.007).config)
    with pytest.raises(ValueError, match="make it with EPDScheduler.from_predictor"):
        EPDScheduler.from_config(ddim())
    with pytest.raises(ValueError, match="prediction_type is 'score'; it must be one of epsilon, v_"):
        EPDScheduler.from_predictor(make_predictor(), {**ddim(), "prediction_type": "score"})
    with pytest.raises(UserError, match="neither a file"):
        EPDScheduler.from_predictor(tmp_path / "none.json", ddim())


def test_uses_it_cannot_serve_are_refused():
    made = make_predictor()
    scheduler = EPDScheduler.from_predictor(made, ddim())
    with pytest.raises(ValueError, match="cannot begin in the middle"):
        scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="call scale_model_input before the network"):
        scheduler.step(NOISE, scheduler.timesteps[0], NOISE)
    with pytest.raises(ValueError, match="the latents were changed between two steps"):
        run_like_sd(scheduler, after=lambda index, latents: latents + 0.1 * (index == 2))
    scheduler.set_timesteps(4)
    close(run_like_sd(scheduler, after=lambda index, latents: latents.clone()), batched(made))  # a copy is none
