"""Denoisers of stock pipelines: they sample what the pipelines sample, row by row, in half precision and with gradients."""

import math

import pytest
import tiny_pipelines
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
)
from tiny_pipelines import CLASS_FAMILIES, PLAIN_FAMILIES, PROMPTS, TEXT_FAMILIES

from brisk import denoiser_maps, denoisers, sd_models, sigmas, solvers, tiny
from brisk.options import UserError
from brisk.pipeline_denoisers import from_pipeline

pytestmark = pytest.mark.quick
FAMILIES = (*PLAIN_FAMILIES, *CLASS_FAMILIES, *TEXT_FAMILIES)
LABELS = torch.tensor([3, 0, 7])
GUIDED = (*TEXT_FAMILIES[:-1], "dit", "fpdm", "fpdm_flow")  # FLUX guides itself


@pytest.fixture(scope="module")
def made():
    """{family: (pipeline, its denoiser)}, made when first asked for, float32."""

    class Made(dict):
        def __missing__(self, family):
            pipe = tiny_pipelines.make(family)
            self[family] = pipe, from_pipeline(pipe, resolution=16 if family == "flux" else None)
            return self[family]

    return Made()


def given(denoiser):
    return {"prompts": PROMPTS, "classes": LABELS, None: None}[denoiser.takes]


def noise(denoiser, seed=0):
    return torch.randn(3, *denoiser.shape, generator=torch.Generator().manual_seed(seed))


def levels_of(denoiser):
    """A level of each sample, in the denoiser's range."""
    return torch.tensor([0.9, 0.4, 0.05]) if denoiser.flow else torch.tensor([9.0, 1.3, 0.2])


def states(denoiser):
    """Three states and levels (B, ...), (B,)."""
    level = levels_of(denoiser)
    scale = torch.ones(3) if denoiser.flow else (1 + level**2).sqrt()
    return noise(denoiser) * scale[:, None, None, None], level


def assert_near(found, expected, tolerance):
    assert ((found - expected).abs().max() / expected.abs().max()).item() < tolerance


def euler_to_zero(direction, x, levels):
    """Euler steps along the levels, the last of which is 0."""
    with torch.no_grad():
        for start, end in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
            x = x + (end - start) * direction(x, solvers.at(x, start))
    return x


def test_families_shapes_and_what_they_take(made):
    expected = {"adm": "adm", "adm_classes": "adm", "cm": "cm", "cm_classes": "cm", "ldm": "ldm", "dit": "dit", "fpdm": "dit",
                "fpdm_flow": "dit", "sd1": "sd", "sd2": "sd", "sdxl": "sd", "pixart": "pixart", "sd3": "sd3",
                "flux": "flux"}  # fmt: skip
    assert {family: made[family][1].family for family in FAMILIES} == expected
    for family in FAMILIES:
        denoiser = made[family][1]
        assert denoiser.takes == ("prompts" if family in TEXT_FAMILIES else "classes" if family in CLASS_FAMILIES else None)
        assert denoiser.classes == (10 if family in CLASS_FAMILIES else 0)
        assert denoiser.flow == (family in ("fpdm_flow", "sd3", "flux")) == (denoiser.table is None and denoiser.family != "cm")
        with torch.no_grad():
            assert denoiser.decode(noise(denoiser)).shape == (3, 3, denoiser.resolution, denoiser.resolution)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sdxl with an encoded empty prompt", "pixart"])
def test_euler_steps_give_the_image_of_the_stock_pipeline(family):
    pipe = tiny_pipelines.make(family.split()[0])
    if "empty" in family:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    denoiser = from_pipeline(pipe)
    pipe.scheduler.set_timesteps(4)
    levels, z = pipe.scheduler.sigmas, noise(denoiser)
    arguments = {"guidance_scale": 5.0, "num_inference_steps": 4, "latents": z}
    if family == "pixart":
        arguments["use_resolution_binning"] = False
    expected = pipe(PROMPTS, output_type="latent", **arguments).images
    images = pipe(PROMPTS, output_type="pt", **arguments).images
    direction = denoisers.direction_for(denoiser, PROMPTS, 3, "cfg", 5.0)
    x = euler_to_zero(direction, z * pipe.scheduler.init_noise_sigma, levels)
    assert_near(x, expected, 5e-4 if family == "sd2" else 2e-5)  # levels from 4096 on cost float32 three digits
    with torch.no_grad():
        assert_near((denoiser.decode(x) / 2 + 0.5).clamp(0, 1), images, 5e-4 if family == "sd2" else 1e-5)


@pytest.mark.parametrize("family, guidance", [("sd3", 4.5), ("flux", 2.0), ("flux", None)])
def test_flow_steps_give_the_image_of_the_stock_pipeline(made, family, guidance):
    pipe, denoiser = made[family]
    z = noise(denoiser)
    latents = z if family == "sd3" else pipe._pack_latents(z, 3, 4, 8, 8)
    arguments = {} if guidance is None else {"guidance_scale": guidance}  # the pipeline's own default is the denoiser's
    images = pipe(PROMPTS, height=16, width=16, num_inference_steps=4, latents=latents, output_type="pt", **arguments).images
    direction = denoisers.direction_for(denoiser, PROMPTS, 3, "cfg" if guidance else None, guidance or 1.0)
    x = euler_to_zero(direction, z, pipe.scheduler.sigmas)
    with torch.no_grad():
        assert_near((denoiser.decode(x) / 2 + 0.5).clamp(0, 1), images, 1e-5)


@pytest.mark.parametrize("family", ["ldm", "dit"])
def test_euler_is_ddim_of_the_stock_pipeline(made, family):
    pipe, denoiser = made[family]
    pipe.scheduler.set_timesteps(5)
    signal = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    levels = torch.cat([((1 - signal) / signal).sqrt(), torch.zeros(1)])
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, *denoiser.shape, generator=generator.manual_seed(1))
    if family == "ldm":
        arrays = pipe(3, generator.manual_seed(1), num_inference_steps=5, output_type="np").images
        images = torch.from_numpy(arrays).permute(0, 3, 1, 2)
        direction = denoisers.direction_for(denoiser, None, 3)
    else:  # DiTPipeline's null label is 1000, of whatever number of classes
        images = pipe(LABELS.tolist(), 1.0, generator.manual_seed(1), 5, output_type="pt").images
        direction = denoisers.direction_for(denoiser, LABELS, 3)
    x = euler_to_zero(direction, z * (1 + levels[0] ** 2).sqrt(), levels)
    with torch.no_grad():
        assert_near((denoiser.decode(x) / 2 + 0.5).clamp(0, 1), images, 1e-5)


def test_pixel_steps_are_ddims_without_the_learned_variance(made):
    pipe, _ = made["adm_classes"]
    for clip in (True, False):
        denoiser = from_pipeline(pipe, clip_denoised=clip)
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
        scheduler.set_timesteps(10)
        timestep, following = scheduler.timesteps[2:4].tolist()
        signal = scheduler.alphas_cumprod[[timestep, following]].double()
        start, end = ((1 - signal) / signal).sqrt().tolist()
        scaled = noise(denoiser)
        with torch.no_grad():
            output = pipe.unet(scaled, timestep, LABELS).sample
            expected = scheduler.step(output[:, :3], timestep, scaled, use_clipped_model_output=True).prev_sample
            x = scaled * math.sqrt(1 + start**2)
            direction = denoisers.direction_for(denoiser, LABELS, 3)(x, solvers.at(x, start))
        assert output.shape[1] == 6
        assert_near((x + (end - start) * direction) / math.sqrt(1 + end**2), expected, 1e-5)
        clean = denoiser_maps.denoised(x, direction, solvers.at(x, start)).abs().max()
        assert clean <= 1 + 1e-5 if clip else clean > 1.5
    pipe = DDPMPipeline(pipe.unet, DDIMScheduler(clip_sample=True))
    asked = denoisers.direction_for(from_pipeline(pipe), LABELS, 3)(x, solvers.at(x, 30.0))
    assert denoiser_maps.denoised(x, asked, solvers.at(x, 30.0)).abs().max() <= 1 + 1e-5  # the scheduler says so


def test_the_null_label_is_the_number_of_classes(made):
    pipe, denoiser = made["dit"]
    x, level = states(denoiser)
    timestep = denoiser_maps.vp_timestep(denoiser.table, level)
    with torch.no_grad():
        expected = pipe.transformer(denoiser_maps.vp_input(x, level), timestep, torch.full((3,), 10)).sample[:, :4]
        assert_near(denoisers.direction_for(denoiser, LABELS, 3, "uncond")(x, level), expected, 1e-6)


def test_consistency_unets_have_edms_preconditioning(made):
    pipe, denoiser = made["cm_classes"]
    x, level = states(denoiser)
    scheduler = pipe.scheduler
    with torch.no_grad():
        found = denoiser_maps.denoised(x, denoisers.direction_for(denoiser, LABELS, 3)(x, level), level)
        for row, sigma in enumerate(level):
            skip, out = scheduler.get_scalings(sigma)
            timestep = torch.from_numpy(scheduler.sigma_to_t([sigma.item()]))
            inputs = x[row : row + 1] / (sigma**2 + 0.25) ** 0.5
            expected = skip * x[row] + out * pipe.unet(inputs, timestep, LABELS[row : row + 1]).sample[0]
            assert_near(found[row], expected, 1e-5)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0.002, 80.0)


def test_flow_networks_of_ours_predict_the_negative_velocity(made):
    pipe, denoiser = made["fpdm_flow"]
    x, level = states(denoiser)
    with torch.no_grad():
        found = denoisers.direction_for(denoiser, LABELS, 3)(x, level)
        assert_near(found, -pipe.transformer(x, 1000 * level, LABELS).sample, 1e-6)
        empty = denoisers.direction_for(denoiser, LABELS, 3, "uncond")(x, level)
        assert_near(empty, -pipe.transformer(x, 1000 * level, torch.full((3,), 10)).sample, 1e-6)
    torch.testing.assert_close(denoisers.grid(denoiser, "flowmatch", 5)[[0, -1]], torch.tensor([1.0, 0.001]).double())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_name_their_samples_and_do_not_depend_on_each_other(made, family):
    denoiser = made[family][1]
    x, level = states(denoiser)
    guidance = ("cfg", 3.0) if family in (*GUIDED, "flux") else (None,)
    with torch.no_grad():
        direction = denoisers.direction_for(denoiser, given(denoiser), 3, *guidance)
        rows = torch.tensor([0, 0, 2, 1, 1])
        together = direction(x[rows], level[rows], rows)
        for place, row in enumerate(rows.tolist()):
            asked = given(denoiser)[row : row + 1] if denoiser.takes else None
            own = denoisers.direction_for(denoiser, asked, 1, *guidance)
            assert_near(together[place], own(x[row : row + 1], level[row : row + 1])[0], 2e-5)
        if denoiser.takes:
            assert (together[2] - direction(x[2:], level[2:], torch.tensor([0]))[0]).abs().max() > 1e-4  # conditions matter


@pytest.mark.parametrize("family", GUIDED)
def test_a_guided_pair_is_one_call_and_equals_two(made, family):
    denoiser = made[family][1]
    x, level = states(denoiser)
    sizes = []
    hook = denoiser.network.register_forward_pre_hook(
        lambda module, args, named: sizes.append(len(args[0])), with_kwargs=True)  # fmt: skip
    negative = ["blurry", "", "grey"] if denoiser.takes == "prompts" else None
    with torch.no_grad():
        found = denoisers.direction_for(denoiser, given(denoiser), 3, "cfg", 2.5, negative)(x, level)
        assert sizes == [6]
        parts = [denoiser.direction(x, level, denoiser.condition(part, 3)) for part in (negative, given(denoiser))]
        assert_near(found, parts[0] + 2.5 * (parts[1] - parts[0]), 1e-5)
        sizes.clear()
        assert_near(denoisers.direction_for(denoiser, given(denoiser), 3, "cfg", 1.0)(x, level), parts[1], 1e-5)
        assert sizes == [3]
    hook.remove()


def test_flux_is_told_the_scale(made):
    pipe, denoiser = made["flux"]
    x, level = states(denoiser)
    with torch.no_grad():
        three, four = (denoisers.direction_for(denoiser, PROMPTS, 3, "cfg", scale)(x, level) for scale in (3.5, 4.0))
        assert torch.equal(three, denoisers.direction_for(denoiser, PROMPTS, 3)(x, level))
    assert (three - four).abs().max() > 1e-4
    schnell = tiny_pipelines.flux(guidance=False, dynamic=False)
    denoiser = from_pipeline(schnell, resolution=16)
    assert (denoiser.shift, denoiser.mu) == (1.0, None)
    with torch.no_grad():
        assert denoisers.direction_for(denoiser, PROMPTS, 3, "cfg", 7.0)(x, level).shape == x.shape


def test_unconditional_rows_are_the_pipelines_own(made):
    pipe, denoiser = made["sdxl"]
    empty = denoiser.condition(None, 3)
    assert not empty["encoder_hidden_states"].any() and not empty["text_embeds"].any()
    assert empty["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 3
    assert denoiser.condition([""] * 3, 3)["encoder_hidden_states"].any()  # asked for, the empty prompt is encoded
    for family in ("sd1", "sd3", "flux"):
        denoiser = made[family][1]
        for name, rows in denoiser.condition(None, 3).items():
            assert_near(rows, denoiser.condition([""] * 3, 3)[name], 1e-5)


def test_pixarts_largest_models_are_told_the_size():
    pipe = tiny_pipelines.make("pixart")
    changes = {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 24}
    pipe.transformer = PixArtTransformer2DModel.from_config(sd_models.plain_config(pipe.transformer) | changes).eval()
    denoiser = from_pipeline(pipe, resolution=24)
    x, level = states(denoiser)
    told = {"resolution": torch.full((3, 2), 24.0), "aspect_ratio": torch.ones(3, 1)}
    tokens, mask, _, _ = pipe.encode_prompt(PROMPTS)
    with torch.no_grad():
        expected = pipe.transformer(
            denoiser_maps.vp_input(x, level), tokens, denoiser_maps.vp_timestep(denoiser.table, level), told,
            encoder_attention_mask=mask,
        ).sample[:, :4]  # fmt: skip
        assert_near(denoisers.direction_for(denoiser, PROMPTS, 3)(x, level), expected, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_stays_near_and_keeps_the_precision_of_the_state(made, family):
    denoiser = made[family][1]
    x, level = states(denoiser)
    with torch.no_grad():
        exact = denoisers.direction_for(denoiser, given(denoiser), 3)(x, level)
        wide = denoisers.direction_for(denoiser, given(denoiser), 3)(x.double(), level.double())
        assert wide.dtype == torch.float64
        assert_near(wide, exact, 1e-5)
        for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float16, 0.01)):
            half = from_pipeline(tiny_pipelines.make(family), dtype, 16 if family == "flux" else None)
            found = denoisers.direction_for(half, given(half), 3)(x, level)
            assert found.dtype == torch.float32
            assert 0 < ((found - exact).norm() / exact.norm()).item() < tolerance
            assert half.decode(x).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_state_alone(made, family):
    denoiser = made[family][1]
    x, level = states(denoiser)
    x.requires_grad_()
    denoisers.direction_for(denoiser, given(denoiser), 3)(x, level).square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(not weight.requires_grad and weight.grad is None for weight in denoiser.network.parameters())
    if family not in ("fpdm", "fpdm_flow"):  # whose graph leaves out the first iteration's start
        step = noise(denoiser, 1)
        direction = denoisers.direction_for(denoiser, given(denoiser), 3)
        with torch.no_grad():
            ahead, behind = (direction((x + shift * step).double(), level.double()).square().sum() for shift in (1e-2, -1e-2))
        slope = (ahead - behind) / 2e-2
        assert slope.item() == pytest.approx((x.grad * step).sum().item(), rel=0.02, abs=0.02)


def test_classifier_guidance_is_the_gradient_by_hand(made):
    pipe, denoiser = made["adm_classes"]
    x, level = states(denoiser)
    torch.manual_seed(0)
    weights = torch.randn(3 * 64, 10)
    seen = []

    def classifier(inputs, timestep):
        seen.append(timestep)
        return (inputs.flatten(1) @ weights) ** 2 / 100

    found = denoisers.direction_for(denoiser, LABELS, 3, "cg", 2.0, classifier=classifier)(x, level)
    signal = (1 + level**2).rsqrt()[:, None, None, None]
    inputs = (signal * x).requires_grad_()
    (((inputs.flatten(1) @ weights) ** 2 / 100).log_softmax(1)[torch.arange(3), LABELS]).sum().backward()
    plain = denoisers.direction_for(denoiser, LABELS, 3)(x, level)
    assert_near(found, plain - (1 - signal**2).sqrt() * 2.0 * inputs.grad, 1e-5)
    torch.testing.assert_close(seen[0], denoiser_maps.vp_timestep(denoiser.table, level))
    for wrong in (None, classifier):
        with pytest.raises(ValueError, match="guidance cg needs"):
            denoisers.direction_for(made["cm"][1] if wrong else denoiser, LABELS, 3, "cg", 2.0, classifier=wrong)


def test_training_goes_through_the_gradient_of_the_classifier(made):
    """The slope of the guided direction's square, guidance far above the rest, by a difference."""
    denoiser = made["adm_classes"][1]
    x, level = states(denoiser)
    step = noise(denoiser, 1)
    weights = torch.randn(3 * 64, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    guided = denoisers.direction_for(denoiser, LABELS, 3, "cg", 20.0,
                                     classifier=lambda inputs, _: (inputs.flatten(1).double() @ weights).sin() * 3)  # fmt: skip
    x.requires_grad_()
    guided(x, level).square().sum().backward()
    with torch.no_grad():
        ahead, behind = (guided(x + shift * step, level).double().square().sum() for shift in (1e-2, -1e-2))
    assert ((ahead - behind) / 2e-2).item() == pytest.approx((x.grad * step).sum().item(), rel=0.02)


def test_rounded_timesteps_are_trained_ones():
    pipe = tiny_pipelines.make("sd1")
    for rounded in (False, True):
        times = []
        denoiser = from_pipeline(pipe, round_timesteps=rounded)
        hook = denoiser.network.register_forward_pre_hook(lambda module, args, times=times: times.append(args[1]))
        x, level = states(denoiser)
        with torch.no_grad():
            denoisers.direction_for(denoiser, PROMPTS, 3)(x, level)
        hook.remove()
        exact = denoiser_maps.vp_timestep(denoiser.table, level)
        assert torch.equal(times[0], exact.round().long() if rounded else exact)


def test_resolution_changes_the_latents(made):
    denoiser = from_pipeline(tiny_pipelines.make("sdxl"), resolution=48)
    assert (denoiser.shape, denoiser.resolution) == ((4, 12, 12), 48)
    assert denoiser.condition(["a"], 1)["time_ids"].tolist() == [[48, 48, 0, 0, 48, 48]]
    for family, side in (("sd3", 24), ("flux", 1024), ("dit", 24), ("pixart", 24), ("ldm", 24), ("adm", 12)):
        denoiser = from_pipeline(tiny_pipelines.make(family), resolution=side)
        assert denoiser.resolution == side and denoiser.shape[1:] == (side * denoiser.shape[1] // side,) * 2
        if family == "flux":
            assert denoiser.mu == pytest.approx(sigmas.flow_mu(512)) and denoiser.shape == (4, 512, 512)
        else:
            with torch.no_grad():
                x, level = states(denoiser)
                direction = denoisers.direction_for(denoiser, given(denoiser), 3)(x, level)
                assert direction.shape == x.shape and denoiser.decode(x).shape == (3, 3, side, side)
    for family, side, multiple in (("sd1", 30, 4), ("sd3", 18, 4), ("flux", 18, 4), ("adm", 9, 2), ("ldm", 18, 4), ("dit", 18, 4)):
        with pytest.raises(UserError, match=f"--resolution {side} must be a multiple of {multiple}"):
            from_pipeline(tiny_pipelines.make(family), resolution=side)
    with pytest.raises(UserError, match="the network draws 16 pixels only"):
        from_pipeline(tiny_pipelines.make("fpdm"), resolution=32)


def test_grids_are_those_of_the_model(made):
    denoiser = made["sd1"][1]
    assert (denoiser.sigma_min, denoiser.sigma_max) == pytest.approx((0.0291671582, 14.6146412), rel=1e-6)
    torch.testing.assert_close(denoisers.grid(denoiser, "discrete", 4)[[0, -1]], torch.tensor([14.614642, 0.029167158]).double(),
                               atol=0, rtol=1e-6)  # fmt: skip
    for kind in ("polynomial", "logsnr", "time_uniform"):
        assert denoisers.grid(denoiser, kind, 4)[[0, -1]].tolist() == pytest.approx([denoiser.sigma_max, denoiser.sigma_min])
        assert denoisers.grid(denoiser, kind, 4, None, 0.1, 10)[[0, -1]].tolist() == pytest.approx([10, 0.1])
    assert (made["ldm"][1].sigma_min, made["ldm"][1].sigma_max) == pytest.approx((0.038759049, 83.8224792), rel=1e-5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    torch.testing.assert_close(denoisers.grid(made["sd3"][1], "flowmatch", 6).float(), scheduler.sigmas[:-1], atol=1e-6, rtol=0)
    pipe, denoiser = made["flux"]
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 1000, 6).tolist(), mu=denoiser.mu)
    torch.testing.assert_close(denoisers.grid(denoiser, "flowmatch", 6).float(), pipe.scheduler.sigmas[:-1], atol=1e-6, rtol=0)
    assert denoiser.mu == pytest.approx(sigmas.flow_mu(8))
    for family, kind, words in (
        ("sd1", "flowmatch", "a diffusion model takes polynomial"), ("cm", "discrete", "needs a model with a table"),
        ("sd3", "discrete", "takes flowmatch"), ("flux", "logsnr", "takes flowmatch"), ("sd3", "cosine", "'cosine'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            denoisers.grid(made[family][1], kind, 4)


def refused(pipe, words, **given):
    with pytest.raises(UserError, match=words) as caught:
        from_pipeline(pipe, **given)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_sampled_is_refused_in_one_sentence(made):
    refused(DDPMPipeline(tiny.make_vae("tiny"), DDIMScheduler()), "with a AutoencoderKL is not supported; supported are UNet2D")
    refused(DDPMPipeline(made["adm"][0].unet, FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler has no betas")
    told = tiny.make_pipeline("sd1")
    told.unet = tiny.make_unet("tiny", time_cond_proj_dim=8)
    refused(told, "is told the guidance scale")
    inpainting = tiny.make_pipeline("sd1")
    inpainting.unet = tiny.make_unet("tiny", in_channels=9)
    refused(inpainting, "takes 9 channels and the VAE gives 4")
    other = StableDiffusionImg2ImgPipeline(**tiny.make_pipeline("sd1").components)
    refused(other, "a StableDiffusionImg2ImgPipeline needs more than a prompt")
    refused(tiny_pipelines.fpdm_pipeline(label_type="vector", label_dim=5), "takes label vectors")


def test_missing_conditions_and_parts_are_said(made):
    denoiser = made["adm_classes"][1]
    with pytest.raises(ValueError, match="needs class labels"):
        denoisers.direction_for(denoiser, None, 3)
    with pytest.raises(ValueError, match="needs class labels"):
        denoisers.direction_for(denoiser, LABELS, 3, "cfg", 2.0)
    with pytest.raises(ValueError, match="needs a model with classes or prompts"):
        denoisers.direction_for(made["adm"][1], None, 3, "cfg", 2.0)
    with pytest.raises(ValueError, match="2 prompts were given for 3 samples"):
        denoisers.direction_for(made["sd1"][1], ["a", "b"], 3)
    bare = from_pipeline(tiny_pipelines.fpdm_pipeline(vae=False))
    with pytest.raises(UserError, match="has no VAE"):
        bare.decode(noise(bare))
