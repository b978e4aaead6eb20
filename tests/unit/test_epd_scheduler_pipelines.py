"""`EPDScheduler` in diffusers' own pipelines, on tiny random networks: what the batched sampler gives."""

import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)  # fmt: skip
from random_predictor import BETAS, make_predictor

from brisk import denoiser_maps, epd, sigmas, solvers, tiny
from brisk.epd_scheduler import EPDScheduler

PROMPTS = ["a red square", "two"]
SETTINGS = [(1, False, None), (2, True, None), (3, True, 3), (2, False, 2)]  # points, afs, max_order


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(network):
    """`network` with random numbers also where it starts with zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return network.eval()


def vp_direction(pipe, network):
    """The closure of a DDPM-type pipeline; `network(x, t, rows)` is its guided output."""
    table, kind = sigmas.noise_map(pipe.scheduler.alphas_cumprod), pipe.scheduler.config.prediction_type

    def direction(x, sigma, rows=None):
        rows = torch.arange(len(x)) if rows is None else rows
        output = network(denoiser_maps.vp_input(x, sigma), denoiser_maps.vp_timestep(table, sigma), rows)
        return denoiser_maps.vp_direction(output, x, sigma, kind)

    return direction


@torch.no_grad()
def batched(made, direction, start, flow=False):
    """What `epd.solve` makes of the noise `start`."""
    x = start * (1 if flow else made.sigmas[0].item())
    order = epd.history_order(made.solver.student, made.solver.max_order)
    return solvers.last(epd.solve(direction, x, made.sigmas, epd.rows_of(made.tables), order, made.solver.afs, flow))


def put_scheduler(pipe, made):
    pipe.scheduler = EPDScheduler.from_predictor(made, pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)


def close(found, expected, tolerance=2e-4):
    """Equal up to `tolerance` of the largest value."""
    assert found.shape == expected.shape and (found - expected).abs().max() < tolerance * expected.abs().max()


def table_of(pipe):
    return sigmas.noise_map(pipe.scheduler.alphas_cumprod)


def sd_direction(pipe, scale):
    """The closure of Stable Diffusion (1, 2 or XL) on `PROMPTS` with classifier-free guidance by `scale`."""
    found = pipe.encode_prompt(prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    if len(found) == 2:
        halves = [{"encoder_hidden_states": found[place]} for place in (1, 0)]
    else:
        ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(2, -1)
        halves = [{"encoder_hidden_states": found[place], "added_cond_kwargs": {"text_embeds": found[place + 2], "time_ids": ids}}
                  for place in (1, 0)]  # fmt: skip

    def network(x, t, rows):
        return denoiser_maps.guide(*(pipe.unet(x, t, **denoiser_maps.take_rows(half, rows)).sample for half in halves), scale)

    return vp_direction(pipe, network)


@pytest.mark.parametrize(("points", "afs", "max_order"), SETTINGS)
@pytest.mark.parametrize(("family", "scale"), [("sd1", 7.5), ("sd1", 1.0), ("sd2", 3.0), ("sdxl", 5.0), ("sdxl", 1.0)])
def test_stable_diffusion(family, scale, points, afs, max_order):
    pipe = tiny.make_pipeline(family, rescale_betas_zero_snr=False)
    made, start = make_predictor(points, afs, max_order, table=table_of(pipe)), noise(2, 4, 8, 8)
    with torch.no_grad():
        expected = batched(made, sd_direction(pipe, scale), start)
    put_scheduler(pipe, made)
    wanted = {"num_inference_steps": 4, "guidance_scale": scale, "output_type": "latent", "height": 32, "width": 32}
    for _ in range(2):
        close(pipe(PROMPTS, latents=start, **wanted).images, expected)


@pytest.mark.parametrize(("points", "afs", "max_order"), SETTINGS)
def test_zero_terminal_snr(points, afs, max_order):
    """It starts at sigma 4096, where float32 keeps 5e-4 of a state: the batched sampler in float64 is the measure."""
    pipe = tiny.make_pipeline("sd2")
    made, start = make_predictor(points, afs, max_order, table=table_of(pipe)), noise(2, 4, 8, 8)
    assert made.sigmas[0] > 4000
    pipe.to(torch.float64)
    with torch.no_grad():
        expected = batched(made, sd_direction(pipe, 3.0), start.double())
    pipe.to(torch.float32)
    put_scheduler(pipe, made)
    found = pipe(PROMPTS, latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="latent").images
    close(found.double(), expected, 1e-3)


def test_a_whole_pipeline_is_saved_and_loaded(tmp_path):
    pipe = tiny.make_pipeline("sd1")
    put_scheduler(pipe, make_predictor(2, True, 3))
    wanted = {"num_inference_steps": 4, "latents": noise(1, 4, 8, 8), "output_type": "pt"}
    expected = pipe("two", **wanted).images
    pipe.save_pretrained(tmp_path)
    assert EPDScheduler.from_pretrained(tmp_path, subfolder="scheduler").config.sigmas == pipe.scheduler.config.sigmas
    again = DiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is EPDScheduler and again("two", **wanted).images.equal(expected)


def test_half_precision_is_near_single_precision():
    pipe, start = tiny.make_pipeline("sd1"), noise(2, 4, 8, 8).bfloat16()
    put_scheduler(pipe, make_predictor(2, True, 3))
    wanted = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 2.0}
    expected = pipe(PROMPTS, latents=start.float(), **wanted).images
    pipe.to(torch.bfloat16)
    found = pipe(PROMPTS, latents=start, **wanted).images
    assert found.dtype == torch.bfloat16
    close(found.float(), expected, 0.02)


def test_bars_end_where_pipelines_expect(capsys):
    pipe = tiny.make_pipeline("sd1")
    pipe.scheduler = EPDScheduler.from_predictor(make_predictor(2, True), pipe.scheduler.config)
    pipe("two", num_inference_steps=4, output_type="latent")
    flux = flux_pipeline()
    flux.scheduler = EPDScheduler.from_predictor(make_predictor(2, flow=True), flux.scheduler.config)
    flux(**flux_inputs(), num_inference_steps=4)
    ends = [re.findall(r"\d+/\d+", line)[-1] for line in capsys.readouterr().err.split("\n") if "100%" in line]
    assert ends == ["4/4", "12/12"]
    with pytest.raises(ValueError, match="num_inference_steps is 50; .* pass num_inference_steps=4"):
        pipe("two")


def dit_pipeline(channels=8):
    network = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=channels, num_layers=2,
                                    norm_num_groups=4, sample_size=8, num_embeds_ada_norm=1000)  # fmt: skip
    return DiTPipeline(randomised(network), randomised(tiny.make_vae("tiny")), DDIMScheduler(**BETAS))


@pytest.mark.parametrize(("points", "afs", "max_order"), SETTINGS)
@pytest.mark.parametrize(("scale", "channels"), [(4.0, 8), (4.0, 4), (1.0, 8)])
def test_dit(points, afs, max_order, scale, channels):
    """It hands `step` the scaled latents of both halves, and drops the learned variance by itself."""
    pipe, labels = dit_pipeline(channels), torch.tensor([3, 998])

    def network(x, t, rows):
        halves = (pipe.transformer(x, t, which[rows]).sample[:, :4] for which in (torch.full((2,), 1000), labels))
        return denoiser_maps.guide(*halves, scale)

    made = make_predictor(points, afs, max_order)
    latents = batched(made, vp_direction(pipe, network), noise(2, 4, 8, 8))
    with torch.no_grad():
        expected = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    put_scheduler(pipe, made)
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        found = pipe(labels.tolist(), scale, generator=generator, num_inference_steps=4, output_type="pt").images
        close(found, expected)


def test_pixart():
    network = PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                                       sample_size=8, cross_attention_dim=16, caption_channels=12)  # fmt: skip
    pipe = PixArtAlphaPipeline(None, None, tiny.make_vae("tiny"), randomised(network), DDIMScheduler(**BETAS))
    texts, mask = noise(2, 2, 5, 12), torch.ones(2, 5)
    added = {"resolution": None, "aspect_ratio": None}

    def guided(x, t, rows):
        halves = (network(x, encoder_hidden_states=text[rows], encoder_attention_mask=mask[rows], timestep=t,
                          added_cond_kwargs=added).sample[:, :4] for text in texts)  # fmt: skip
        return denoiser_maps.guide(*halves, 4.5)

    made, start = make_predictor(2, True, 3), noise(2, 4, 8, 8)
    expected = batched(made, vp_direction(pipe, guided), start)
    put_scheduler(pipe, made)
    given = {"prompt_embeds": texts[1], "prompt_attention_mask": mask, "negative_prompt_embeds": texts[0],
             "negative_prompt_attention_mask": mask, "negative_prompt": None}  # fmt: skip
    found = pipe(**given, num_inference_steps=4, guidance_scale=4.5, height=32, width=32, latents=start, output_type="latent",
                 use_resolution_binning=False).images  # fmt: skip
    close(found, expected)


@pytest.mark.parametrize("scale", [4.5, 1.0])
@pytest.mark.parametrize(("points", "afs", "max_order"), SETTINGS)
def test_stable_diffusion_3(points, afs, max_order, scale):
    network = SD3Transformer2DModel(sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                                    joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
                                    pos_embed_max_size=8)  # fmt: skip
    pipe = StableDiffusion3Pipeline(randomised(network), FlowMatchEulerDiscreteScheduler(shift=3.0), *[None] * 7)
    texts, pooled, start = noise(2, 2, 5, 12), noise(2, 2, 10, seed=1), noise(2, 4, 8, 8)

    def direction(x, sigma, rows=None):
        rows = torch.arange(len(x)) if rows is None else rows
        halves = (network(x, text[rows], vector[rows], 1000 * sigma).sample for text, vector in zip(texts, pooled, strict=True))
        return denoiser_maps.guide(*halves, scale)

    made = make_predictor(points, afs, max_order, flow=True)
    expected = batched(made, direction, start, flow=True)
    put_scheduler(pipe, made)
    given = {"prompt_embeds": texts[1], "pooled_prompt_embeds": pooled[1], "negative_prompt_embeds": texts[0],
             "negative_pooled_prompt_embeds": pooled[0]}  # fmt: skip
    wanted = {"num_inference_steps": 4, "guidance_scale": scale, "height": 64, "width": 64, "output_type": "latent"}
    for _ in range(2):
        close(pipe(**given, **wanted, latents=start).images, expected)


def flux_pipeline():
    network = FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                     num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True,
                                     axes_dims_rope=(4, 6, 6))  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return FluxPipeline(scheduler, *[None] * 5, transformer=randomised(network))


def flux_inputs():
    return {"prompt_embeds": noise(2, 5, 12), "pooled_prompt_embeds": noise(2, 10, seed=1), "latents": noise(2, 16, 16, seed=2),
            "height": 64, "width": 64, "output_type": "latent"}  # fmt: skip


@pytest.mark.parametrize(("points", "afs", "max_order"), SETTINGS)
def test_flux(points, afs, max_order):
    pipe, given = flux_pipeline(), flux_inputs()
    places = pipe._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)

    def direction(x, sigma, rows=None):
        rows = torch.arange(len(x)) if rows is None else rows
        text, pooled = given["prompt_embeds"][rows], given["pooled_prompt_embeds"][rows]
        return pipe.transformer(x, text, pooled, sigma, places, torch.zeros(5, 3), torch.full_like(sigma, 3.5)).sample

    made = make_predictor(points, afs, max_order, flow=True)
    expected = batched(made, direction, given["latents"], flow=True)
    put_scheduler(pipe, made)
    for _ in range(2):
        close(pipe(**given, num_inference_steps=4, guidance_scale=3.5).images, expected)
