"""Denoisers of stock diffusers pipelines: `from_pipeline`, and those that draw classes or nothing in particular.

Pixel and latent U-Nets (DDPM, ADM, LDM), consistency models' EDM U-Nets, DiT and FPDM. Letters: B batch, R rows of a call.
"""

import torch

from brisk import denoiser_maps, sigmas, text_denoisers
from brisk.denoisers import Denoiser, flow_range, frozen, image_side, latent_decoder, vp_model
from brisk.options import UserError


def from_pipeline(pipe, dtype=None, resolution=None, round_timesteps=False, clip_denoised=None):
    """The frozen `Denoiser` of a diffusers pipeline, on the pipeline's device; the parts of `pipe` itself are used and changed.

    Args: `dtype` of its network, None to leave it (its VAE is always float32, its text encoders stay as they are);
    `resolution` in pixels, None for the network's own; `round_timesteps`: tell a network of discrete timesteps trained ones
    only; `clip_denoised`: keep D of a pixel U-Net in [-1, 1], None for what its scheduler's `clip_sample` says.
    Raises UserError for a pipeline that no family fits.
    """
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    kind = type(network).__name__
    if kind not in NETWORKS:
        raise UserError(f"a {type(pipe).__name__} with a {kind} is not supported; supported are {', '.join(NETWORKS)}.")
    frozen(network, dtype)
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if getattr(pipe, name, None) is not None:
            frozen(getattr(pipe, name))
    if kind in FLOWS:
        return FLOWS[kind](pipe, resolution)
    if kind in TIMED:
        return TIMED[kind](pipe, resolution, round_timesteps)
    if type(pipe.scheduler).__name__ == "CMStochasticIterativeScheduler":
        return consistency_unet(pipe, resolution)
    return unet(pipe, resolution, round_timesteps, clip_denoised)


def _labels(classes, device, null=None):
    """`Denoiser.condition` of class labels; `null`: the label that stands for none, if the network knows one."""

    def condition(labels, batch):
        if not classes:
            return None
        if labels is None and null is None:
            raise ValueError("the network needs class labels, it was not trained without.")
        return torch.full((batch,), null, device=device) if labels is None else labels.to(device)

    return condition


def _unet_classes(network):
    """How many classes a UNet2DModel knows, 0 for none. UserError."""
    if network.class_embedding is None:
        return 0
    if not isinstance(network.class_embedding, torch.nn.Embedding):
        raise UserError(f"the U-Net's class_embed_type is '{network.config.class_embed_type}': only class labels can be asked for.")
    return network.class_embedding.num_embeddings


def _unet_side(network, resolution, factor=1):
    """Side of the images of a UNet2DModel, each of its pixels `factor` wide."""
    multiple = factor * 2 ** (len(network.config.block_out_channels) - 1)
    return image_side(resolution, network.config.sample_size * factor, multiple)


def unet(pipe, resolution=None, round_timesteps=False, clip_denoised=None):
    """The `Denoiser` of a UNet2DModel of discrete timesteps: of pixels (DDPMPipeline, adm), of latents (LDMPipeline, ldm).

    A learned variance is left out. UserError.
    """
    network, autoencoder = pipe.unet, getattr(pipe, "vqvae", None)
    classes, factor = _unet_classes(network), 1
    if autoencoder is not None:
        factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    resolution = _unet_side(network, resolution, factor)
    rounded = round_timesteps or network.config.time_embedding_type == "learned"
    if autoencoder is not None:
        clip_denoised = False
    elif clip_denoised is None:
        clip_denoised = pipe.scheduler.config.get("clip_sample", False)

    def call(inputs, timestep, labels):
        return network(inputs, timestep, labels, return_dict=False)[0]

    direction, table = vp_model(network, pipe.scheduler, call, clip_denoised, rounded)
    side = resolution // factor
    return Denoiser(
        "adm" if autoencoder is None else "ldm", network, direction, _labels(classes, network.device),
        (lambda x0: x0) if autoencoder is None else latent_decoder(autoencoder), (network.config.in_channels, side, side),
        resolution, *sigmas.sigma_range(table), table=table, takes="classes" if classes else None, classes=classes,
        device=network.device,
    )  # fmt: skip


def consistency_unet(pipe, resolution=None):
    """The `Denoiser` of a UNet2DModel under EDM's preconditioning that is told 250 ln sigma, as consistency models' are (cm).

    It is the diffusion model that counts, such as edm_bedroom256_ema, not one distilled to few steps. UserError.
    """
    network, config = pipe.unet, pipe.scheduler.config
    classes, resolution, dtype = _unet_classes(network), _unet_side(network, resolution), network.dtype

    def direction(x, sigma, labels):
        inputs = denoiser_maps.edm_input(x, sigma, config.sigma_data).to(dtype)
        output = network(inputs, 250 * sigma.log(), labels, return_dict=False)[0]
        return denoiser_maps.edm_direction(output, x, sigma, config.sigma_data)

    return Denoiser(
        "cm", network, direction, _labels(classes, network.device), lambda x0: x0,
        (network.config.in_channels, resolution, resolution), resolution, config.sigma_min, config.sigma_max,
        takes="classes" if classes else None, classes=classes, device=network.device,
    )  # fmt: skip


def _latent_factor(pipe):
    """How many pixels wide a latent pixel is, 8 where there is no VAE to say so."""
    return 8 if pipe.vae is None else 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _decoder(pipe):
    """`Denoiser.decode` of a pipeline that may lack its VAE."""

    def refuse(latents):
        raise UserError("the model has no VAE to make images of its latents: give a pipeline folder that has one.")

    return refuse if pipe.vae is None else latent_decoder(pipe.vae)


def dit(pipe, resolution=None, round_timesteps=False):
    """The `Denoiser` of a DiT, whose null label is the number of its classes. UserError."""
    network, factor = pipe.transformer, _latent_factor(pipe)
    config = network.config
    classes = config.num_embeds_ada_norm
    resolution = image_side(resolution, config.sample_size * factor, factor * config.patch_size)

    def call(inputs, timestep, labels):
        return network(inputs, timestep=timestep, class_labels=labels, return_dict=False)[0]

    direction, table = vp_model(network, pipe.scheduler, call, rounded=round_timesteps)
    side = resolution // factor
    return Denoiser(
        "dit", network, direction, _labels(classes, network.device, classes), _decoder(pipe), (config.in_channels, side, side),
        resolution, *sigmas.sigma_range(table), table=table, takes="classes", classes=classes, device=network.device,
    )  # fmt: skip


def fpdm(pipe, resolution=None, round_timesteps=False):
    """The `Denoiser` of a network of train_fpdm.py, DiT or FPDM, of classes or none. UserError.

    Where a gradient is asked for, it passes through every iteration of the fixed-point layer, each of which is kept for it.
    A flow network predicts x0 - noise at time 1000 sigma: the negative direction.
    """
    network = pipe.transformer
    config = network.config
    if config.label_type == "vector":
        raise UserError("the network takes label vectors: only classes can be asked for.")
    if resolution not in (None, config.image_size):
        raise UserError(f"--resolution {resolution} cannot be had, the network draws {config.image_size} pixels only.")
    classes = config.num_classes if config.label_type == "class" else 0
    network.enable_solution_reuse(False)

    def call(inputs, timestep, labels):
        count = network.default_iterations
        keeps = config.fixed_point and torch.is_grad_enabled() and inputs.requires_grad
        return network(inputs, timestep, labels, num_iters=(0, count) if keeps else count, return_dict=False)[0]

    if config.prediction_type == "flow":
        table, dtype, (low, high) = None, network.dtype, flow_range(1.0)

        def direction(x, sigma, labels):
            return -call(x.to(dtype), 1000 * sigma, labels)[:, : x.shape[1]].to(x.dtype)

    else:
        direction, table = vp_model(network, pipe.scheduler, call, rounded=round_timesteps)
        low, high = sigmas.sigma_range(table)
    return Denoiser(
        "dit", network, direction, _labels(classes, network.device, classes), _decoder(pipe),
        (config.in_channels, config.sample_size, config.sample_size), config.image_size, low, high, table=table,
        flow=table is None, shift=1.0, takes="classes" if classes else None, classes=classes, device=network.device,
    )  # fmt: skip


TIMED = {"UNet2DConditionModel": text_denoisers.stable_diffusion, "DiTTransformer2DModel": dit, "FPDMTransformer2DModel": fpdm,
         "PixArtTransformer2DModel": text_denoisers.pixart}  # fmt: skip
FLOWS = {"SD3Transformer2DModel": text_denoisers.stable_diffusion_3, "FluxTransformer2DModel": text_denoisers.flux}
NETWORKS = {  # all that are supported: the families they may be of
    "UNet2DModel": ("adm", "cm", "ldm"), "UNet2DConditionModel": ("sd",), "DiTTransformer2DModel": ("dit",),
    "FPDMTransformer2DModel": ("dit",), "PixArtTransformer2DModel": ("pixart",), "SD3Transformer2DModel": ("sd3",),
    "FluxTransformer2DModel": ("flux",),
}  # fmt: skip
