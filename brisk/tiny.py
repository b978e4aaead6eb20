"""Random-weight Stable Diffusion pipelines, tiny or of real size, and synthetic data: for tests, dry runs, benchmarks."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch

from brisk import macs

UNETS = {
    "sd15": {
        "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    },
    "sd21": {
        "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "tiny": {
        "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 4,
        "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    # every block of the real ones, for block removal
    "toy": {
        "sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 4, "norm_num_groups": 4,
        "block_out_channels": (8, 8, 16, 16),
    },
    "toy_xl": {
        "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": (2, 2, 4), "norm_num_groups": 4,
        "block_out_channels": (8, 8, 16), "use_linear_projection": True, "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "tiny_xl": {
        "sample_size": 8, "cross_attention_dim": 64, "attention_head_dim": (2, 4), "norm_num_groups": 4,
        "block_out_channels": (8, 16), "layers_per_block": 1, "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
TEXT_ENCODERS = {
    "clip_l": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "open_clip_h": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
                    "hidden_act": "gelu"},
    "open_clip_g": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
                    "hidden_act": "gelu", "projection_dim": 1280},
    "tiny": {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
             "projection_dim": 32},
}  # fmt: skip
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
            "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip
CAPTION = "a red square on a grey ground"


def make_unet(size, **changes):
    """A U-Net with random weights: one of `UNETS`, its config changed by `changes`."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{**UNETS[size], **changes})


def make_vae(size):
    """A KL autoencoder with random weights: Stable Diffusion's own, or a tiny one with down-sampling 4."""
    from diffusers import AutoencoderKL

    if not size.startswith("tiny"):
        return AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    return AutoencoderKL(
        block_out_channels=(4, 8, 8), norm_num_groups=4, layers_per_block=1, sample_size=32, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def make_text_encoder(name, length=77, vocabulary=49408, projection=False):
    """A CLIP text model (with projection for SDXL's second one) with random weights, one of `TEXT_ENCODERS`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(vocab_size=vocabulary, max_position_embeddings=length, pad_token_id=vocabulary - 1,
                            bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, **TEXT_ENCODERS[name])  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def make_tokenizer(length=77):
    """A CLIP tokenizer that knows single characters only."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    characters = sorted(ByteLevel.alphabet())
    tokens = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def make_pipeline(family="sd1", seed=0, **scheduler):
    """A tiny random pipeline of `family` sd1, sd2 (v-prediction, zero terminal SNR) or sdxl; 32 px images, 8x8 latents.

    With the prefix toy_ its U-Net has every block of the real one (toy_sd2: linear projections, no zero terminal SNR).
    Args: `scheduler` settings that replace the family's.
    """
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(16)
    schedule = dict(SCHEDULE)
    changes = {}
    if family == "toy_sd2":
        schedule |= {"prediction_type": "v_prediction"}
        changes = {"use_linear_projection": True, "attention_head_dim": (2, 2, 4, 4)}
    if family == "sd2":
        schedule |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    is_xl = family.endswith("sdxl")
    size = ("toy" if family.startswith("toy_") else "tiny") + "_xl" * is_xl
    parts = {
        "vae": make_vae("tiny"), "unet": make_unet(size, **changes), "tokenizer": tokenizer,
        "text_encoder": make_text_encoder("tiny", 16, len(tokenizer)), "scheduler": DDIMScheduler(**schedule | scheduler),
    }  # fmt: skip
    if is_xl:
        second = make_text_encoder("tiny", 16, len(tokenizer), projection=True)
        return StableDiffusionXLPipeline(**parts, tokenizer_2=tokenizer, text_encoder_2=second, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def count_flops(name, size=None):
    """(parameters, FLOPs of one forward at batch 1) on the meta device; FLOP = 2 x multiply-accumulate.

    Args: `name` sd15_unet, sd15_unet_time_cond_256, sd21_unet, sdxl_unet, kl_vae_encoder, kl_vae_decoder or
    clip_l_text_encoder; `size` latent pixels of a U-Net, image pixels of the VAE.
    """
    with torch.device("meta"):
        if "_unet" in name:
            network = make_unet(name.split("_")[0], time_cond_proj_dim=256 if "time_cond" in name else None)
            found = macs.count(network, **macs.unet_inputs(network.config, 1, size, device="meta"))
            return found.parameters, 2 * found.total
        if name.startswith("kl_vae"):
            is_encoder, vae = name.endswith("encoder"), make_vae("sd15")
            network = vae.encoder if is_encoder else vae.decoder
            call = {"sample": torch.empty(1, 3, size, size) if is_encoder else torch.empty(1, 4, size // 8, size // 8)}
        else:
            network = make_text_encoder("clip_l")
            call = {"input_ids": torch.zeros(1, 77, dtype=torch.long)}
    found = macs.count(network, **call)
    return found.parameters, 2 * found.total


def random_image(rng, height, width):
    """A PIL image of smooth random colours."""
    from PIL import Image

    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_shards(folder, shards=2, samples=16, height=40, width=48, seed=0):
    """Synthetic WebDataset shards `synthetic-00000.tar` ... of random pictures with captions; returns the paths."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        paths.append(folder / f"synthetic-{shard:05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(samples):
                picture = io.BytesIO()
                random_image(rng, height, width).save(picture, format="PNG")
                facts = json.dumps({"width": width, "height": height, "pwatermark": 0.0}).encode()
                for suffix, content in (("png", picture.getvalue()), ("txt", CAPTION.encode()), ("json", facts)):
                    entry = tarfile.TarInfo(f"{shard:03d}{number:05d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return paths


class SyntheticBatches:
    """Endless equal batches of grey images with one caption, in place of data (`--dry_run`, benchmarks)."""

    def __init__(self, tokenize, batch_size, resolution):
        self.position, self.skipped = {"samples": 0}, {}
        sizes = {
            "original_size": torch.full((batch_size, 2), resolution),
            "crop_top_left": torch.zeros(batch_size, 2).long(),
        }
        caption = {name: row.expand(batch_size, *row.shape) for name, row in tokenize(CAPTION).items()}
        pixels = torch.full((batch_size, 3, resolution, resolution), 128, dtype=torch.uint8)
        self.batch = {"pixels": pixels, **caption, **sizes, "empty": torch.zeros(batch_size, dtype=torch.bool)}

    def __next__(self):
        return dict(self.batch)
