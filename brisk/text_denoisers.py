"""Denoisers of text-to-image pipelines: Stable Diffusion 1, 2 and XL, PixArt, Stable Diffusion 3, FLUX.

Prompts are encoded by the pipelines' own `encode_prompt`. A condition is a dict of tensors with one row per sample, by the names
of the network's arguments. Letters: B batch, R rows of a network call.
"""

import torch

from brisk import sigmas
from brisk.denoisers import Denoiser, flow_range, image_side, latent_decoder, vp_model
from brisk.options import UserError

FLUX_GUIDANCE = 3.5  # the scale that FLUX is told where nobody says one


def _conditions(encode, dtype):
    """`Denoiser.condition` of prompts. Args: `encode`: prompts, None for one row without a prompt -> dict of embeddings."""

    def cast(row):
        return row.to(dtype) if row.is_floating_point() else row

    @torch.no_grad()
    def condition(prompts, batch):
        if prompts is not None and len(prompts) != batch:
            raise ValueError(f"{len(prompts)} prompts were given for {batch} samples.")
        found = encode(None if prompts is None else list(prompts))
        return {name: cast(row).repeat_interleave(batch if prompts is None else 1, 0) for name, row in found.items()}

    return condition


def _embeddings(pipe, prompts):
    """(tokens, pooled if any) of prompts; for None what the pipeline guides away from where no negative prompt is given."""
    device = pipe._execution_device
    three = {"prompt_2": None, "prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
    found = pipe.encode_prompt(prompt=prompts or [""], device=device, num_images_per_prompt=1,
                               do_classifier_free_guidance=prompts is None, **three)  # fmt: skip
    return found[prompts is None :: 2]  # of each embedding the given and the unconditional one


def _check(pipe, classes, channels):
    """UserError unless `pipe` is of one of diffusers' `classes` and its network takes latents of its VAE."""
    if not isinstance(pipe, classes):
        names = " or ".join(cls.__name__ for cls in classes)
        raise UserError(f"a {type(pipe).__name__} needs more than a prompt; of this network only a {names} can be sampled.")
    if channels != pipe.vae.config.latent_channels:
        raise UserError(f"the network takes {channels} channels and the VAE gives {pipe.vae.config.latent_channels}: "
                        "it needs more than a prompt.")  # fmt: skip


def stable_diffusion(pipe, resolution=None, round_timesteps=False):
    """The `Denoiser` of a Stable Diffusion 1, 2 or XL pipeline; BK-SDM's students are such too. UserError."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    unet, factor = pipe.unet, pipe.vae_scale_factor
    if unet.config.time_cond_proj_dim is not None:
        raise UserError("its U-Net is told the guidance scale (time_cond_proj_dim), as few-step students of SLAM and LCM are: "
                        "sample it by its own pipeline.")  # fmt: skip
    _check(pipe, (StableDiffusionPipeline, StableDiffusionXLPipeline), unet.config.in_channels)
    resolution = image_side(resolution, unet.config.sample_size * factor, factor)
    is_xl = isinstance(pipe, StableDiffusionXLPipeline)

    def encode(prompts):
        tokens, *pooled = _embeddings(pipe, prompts)
        if not is_xl:
            return {"encoder_hidden_states": tokens}
        size, width = (resolution, resolution), pipe.text_encoder_2.config.projection_dim
        times = pipe._get_add_time_ids(size, (0, 0), size, torch.float32, width).to(tokens.device)
        return {"encoder_hidden_states": tokens, "text_embeds": pooled[0], "time_ids": times.expand(len(tokens), -1)}

    def call(inputs, timestep, condition):
        added = {name: condition[name] for name in ("text_embeds", "time_ids")} if is_xl else None
        return unet(inputs, timestep, condition["encoder_hidden_states"], added_cond_kwargs=added, return_dict=False)[0]

    direction, table = vp_model(unet, pipe.scheduler, call, rounded=round_timesteps)
    return _denoiser(pipe, unet, "sd", direction, encode, resolution, table=table)


def pixart(pipe, resolution=None, round_timesteps=False):
    """The `Denoiser` of a PixArt alpha or sigma pipeline. UserError."""
    from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

    network, factor = pipe.transformer, pipe.vae_scale_factor
    config = network.config
    _check(pipe, (PixArtAlphaPipeline, PixArtSigmaPipeline), config.in_channels)
    resolution = image_side(resolution, config.sample_size * factor, factor * config.patch_size)

    def encode(prompts):
        tokens, mask, *_ = pipe.encode_prompt(prompts or [""], do_classifier_free_guidance=False)
        condition = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
        if network.use_additional_conditions:
            size = tokens.new_full((len(tokens), 2), resolution)
            condition |= {"resolution": size, "aspect_ratio": torch.ones_like(size[:, :1])}
        return condition

    def call(inputs, timestep, condition):
        added = {name: condition.get(name) for name in ("resolution", "aspect_ratio")}
        return network(inputs, condition["encoder_hidden_states"], timestep, added_cond_kwargs=added,
                       encoder_attention_mask=condition["encoder_attention_mask"], return_dict=False)[0]  # fmt: skip

    direction, table = vp_model(network, pipe.scheduler, call, rounded=round_timesteps)
    return _denoiser(pipe, network, "pixart", direction, encode, resolution, table=table)


def stable_diffusion_3(pipe, resolution=None):
    """The `Denoiser` of a Stable Diffusion 3 pipeline. UserError."""
    from diffusers import StableDiffusion3Pipeline

    network = pipe.transformer
    _check(pipe, (StableDiffusion3Pipeline,), network.config.in_channels)
    multiple = pipe.vae_scale_factor * network.config.patch_size
    resolution = image_side(resolution, network.config.sample_size * pipe.vae_scale_factor, multiple)

    def encode(prompts):
        tokens, pooled = _embeddings(pipe, prompts)
        return {"encoder_hidden_states": tokens, "pooled_projections": pooled}

    dtype = network.dtype

    def direction(x, sigma, condition):
        return network(x.to(dtype), timestep=1000 * sigma, return_dict=False, **condition)[0].to(x.dtype)

    return _denoiser(pipe, network, "sd3", direction, encode, resolution, tokens=(resolution // multiple) ** 2)


def flux(pipe, resolution=None):
    """The `Denoiser` of a FLUX.1 pipeline: the scale of guidance is the entry `guidance` of a condition. UserError."""
    from diffusers import FluxPipeline

    network, factor = pipe.transformer, pipe.vae_scale_factor
    _check(pipe, (FluxPipeline,), network.config.in_channels // 4)
    resolution = image_side(resolution, pipe.default_sample_size * factor, 2 * factor)

    def encode(prompts):
        tokens, pooled, _ = pipe.encode_prompt(prompts or [""])
        condition = {"encoder_hidden_states": tokens, "pooled_projections": pooled}
        if network.config.guidance_embeds:
            condition["guidance"] = tokens.new_full((len(tokens),), FLUX_GUIDANCE)
        return condition

    dtype = network.dtype

    def direction(x, sigma, condition):
        channels, height, width = x.shape[1:]
        packed = pipe._pack_latents(x.to(dtype).contiguous(), len(x), channels, height, width)
        image_places = pipe._prepare_latent_image_ids(1, height // 2, width // 2, x.device, torch.float32)
        text_places = image_places.new_zeros(condition["encoder_hidden_states"].shape[1], 3)
        output = network(packed, timestep=sigma, img_ids=image_places, txt_ids=text_places, return_dict=False, **condition)[0]
        return pipe._unpack_latents(output, height * factor, width * factor, factor).to(x.dtype)

    return _denoiser(pipe, network, "flux", direction, encode, resolution, tokens=(resolution // (2 * factor)) ** 2)


def _flow_levels(config, tokens):
    """(shift, mu) of a flow scheduler's config for an image of so many tokens, one of them None."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    if not config.use_dynamic_shifting:
        return config.shift, None
    return None, calculate_shift(tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)


def _denoiser(pipe, network, family, direction, encode, resolution, table=None, tokens=None):
    """The `Denoiser` of a model of latents. Args: `table` of discrete timesteps, or `tokens` of a flow model's image."""
    side = resolution // pipe.vae_scale_factor
    shift, mu = _flow_levels(pipe.scheduler.config, tokens) if tokens else (None, None)
    low, high = flow_range(shift or 1.0) if tokens else sigmas.sigma_range(table)
    return Denoiser(
        family, network, direction, _conditions(encode, network.dtype), latent_decoder(pipe.vae),
        (pipe.vae.config.latent_channels, side, side), resolution, low, high, flow=bool(tokens), shift=shift, mu=mu, table=table,
        takes="prompts", guides_itself=family == "flux", device=network.device,
    )  # fmt: skip
