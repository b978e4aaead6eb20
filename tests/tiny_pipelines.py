"""Tiny random pipelines of every family that samplers know, as stock diffusers classes; those of Stable Diffusion are in `tiny`."""

import tiny_dit
import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
    VQModel,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from brisk import fpdm, tiny

PROMPTS = ["a red fox", "two cats", "b"]
TEXT_FAMILIES = ("sd1", "sd2", "sdxl", "pixart", "sd3", "flux")
CLASS_FAMILIES = ("adm_classes", "cm_classes", "dit", "fpdm", "fpdm_flow")
PLAIN_FAMILIES = ("adm", "cm", "ldm")
LDM_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False}  # of the LSUN models


def _unet(channels=3, **changes):
    return UNet2DModel(
        sample_size=8, in_channels=channels, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        **{"out_channels": channels, **changes},
    )  # fmt: skip


def _t5():
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((chr(code), -2.0) for code in range(33, 127))]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    return tokenizer, T5EncoderModel(config).eval()


def _vae(channels, shift=0.1, scaling=0.5):
    """A tiny autoencoder of the newer kind, with a shift; an image pixel is half as wide as a latent one."""
    return AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=1, latent_channels=channels, scaling_factor=scaling,
        shift_factor=shift, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def _clip(projection):
    tokenizer = tiny.make_tokenizer(16)
    return tokenizer, tiny.make_text_encoder("tiny", 16, len(tokenizer), projection=projection).eval()


def _sd3(shift=3.0):
    (tokenizer, first), (second_tokenizer, second), (third_tokenizer, third) = _clip(True), _clip(True), _t5()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=16, pooled_projection_dim=64, pos_embed_max_size=16,
    )  # fmt: skip
    t5 = T5EncoderModel(T5Config(**{**third.config.to_dict(), "d_model": 64})).eval()
    return StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=shift), _vae(16), first, tokenizer, second,
                                    second_tokenizer, t5, third_tokenizer)  # fmt: skip


def flux(guidance=True, dynamic=True):
    (tokenizer, clip), (t5_tokenizer, t5) = _clip(False), _t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0 if dynamic else 1.0, use_dynamic_shifting=dynamic)
    return FluxPipeline(scheduler, _vae(4), clip, tokenizer, t5, t5_tokenizer, transformer)


def _pixart():
    tokenizer, t5 = _t5()
    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        cross_attention_dim=16, caption_channels=32,
    )  # fmt: skip
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    return PixArtAlphaPipeline(tokenizer, t5, _vae(4, None), transformer, scheduler)


def _dit():
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    return DiTPipeline(transformer, _vae(4, None), DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False))


def fpdm_pipeline(vae=True, **changes):
    network = tiny_dit.make_network(**{"out_channels": 8, "default_num_iters": 3, **changes})
    is_flow = network.config.prediction_type == "flow"
    return DiTPipeline(network, tiny.make_vae("tiny") if vae else None, None if is_flow else fpdm.export_scheduler(network.config))


def _ldm():
    vqvae = VQModel(
        block_out_channels=(4, 8), norm_num_groups=4, latent_channels=3, num_vq_embeddings=32, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return LDMPipeline(vqvae, _unet(), DDIMScheduler(**LDM_BETAS))


def make(family, seed=0):
    """The pipeline of a name of one of the tuples above; it draws its weights from `seed`."""
    torch.manual_seed(seed)
    if family in ("sd1", "sd2", "sdxl"):
        pipe = tiny.make_pipeline(family, seed)
    else:
        pipe = MAKERS[family]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


MAKERS = {
    "adm": lambda: DDPMPipeline(_unet(out_channels=6), DDPMScheduler(clip_sample=False)),
    "adm_classes": lambda: DDPMPipeline(_unet(out_channels=6, num_class_embeds=10), DDPMScheduler(clip_sample=False)),
    "cm": lambda: ConsistencyModelPipeline(_unet(), CMStochasticIterativeScheduler()),
    "cm_classes": lambda: ConsistencyModelPipeline(_unet(num_class_embeds=10), CMStochasticIterativeScheduler()),
    "ldm": _ldm, "dit": _dit, "fpdm": fpdm_pipeline, "fpdm_flow": lambda: fpdm_pipeline(prediction_type="flow", out_channels=4),
    "pixart": _pixart, "sd3": _sd3, "flux": flux,
}  # fmt: skip
