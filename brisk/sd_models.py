"""Stable Diffusion models (SD1, SD2, SDXL): loading, prompts and latents, calling the U-Net, students, LoRA.

Letters: B batch, L tokens, D text width, H W pixels, h w latent height and width.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from brisk.options import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EXTRAS = ("feature_extractor", "image_encoder", "safety_checker")
COND_PROJ = "time_embedding.cond_proj.weight"
LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


class Parts(NamedTuple):
    """The components of a Stable Diffusion pipeline, in float32, frozen, on the CPU."""

    is_xl: bool
    zeros_for_empty: bool  # SDXL: the empty prompt is a zero embedding
    tokenizers: list
    text_encoders: list
    vae: Any
    unet: Any
    scheduler_config: dict
    extras: dict  # feature_extractor, safety_checker, image_encoder where the pipeline has them


def _pipeline_index(source, options):
    from diffusers import DiffusionPipeline

    folder = Path(source)
    # only NAME or OWNER/NAME can be a hub id, and OWNER is no folder here
    if not folder.is_dir() and (
        source.count("/") > 1 or source[:1] in "./~" or ("/" in source and folder.parent.is_dir())
    ):
        raise UserError(f"--pretrained_teacher_model {source} is no such folder.")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"--pretrained_teacher_model {source} is a folder without model_index.json.")
    try:
        index = DiffusionPipeline.load_config(source, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--pretrained_teacher_model {source} is neither a pipeline folder nor a hub model that can be reached: {reason}"
        ) from None
    name = index.get("_class_name", "")
    if not name.startswith(("StableDiffusion", "LatentConsistencyModel")) or "unet" not in index:
        raise UserError(
            f"--pretrained_teacher_model {source} is a {name or 'nameless pipeline'}, not a Stable Diffusion one."
        )
    return index


def _load_network(cls, source, subfolder, options):
    """A diffusers network in float32 with every weight present; UserError if the folder holds something else."""
    where = f"{source}/{subfolder}" if subfolder else source
    try:
        config = cls.load_config(source, subfolder=subfolder, **_without_variant(options))
        if config.get("_class_name") != cls.__name__:
            raise UserError(f"{where} holds a {config.get('_class_name')}, not a {cls.__name__}.")
        network, report = cls.from_pretrained(
            source, subfolder=subfolder, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    missing = [*report["missing_keys"], *(str(key) for key in report.get("mismatched_keys", []))]
    if missing:
        raise UserError(f"{where} lacks {len(missing)} weights of its config: {', '.join(sorted(missing)[:8])} ...")
    return network.requires_grad_(False).eval()


def _without_variant(options):
    return {name: value for name, value in options.items() if name != "variant"}


def _load_transformers(index, name, source, options):
    import transformers

    library, class_name = index[name]
    cls = getattr(transformers, class_name, None) if library == "transformers" else None
    if name == "safety_checker":
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as cls
    if cls is None:
        raise UserError(f"{source}: the {name} is a {library}.{class_name}, which is not supported.")
    if Path(source).is_dir() and not (Path(source) / name).is_dir():
        raise UserError(f"{source} has no {name} folder.")
    try:
        if not hasattr(cls, "save_checkpoint") and "Model" not in class_name:  # tokenizers and image processors
            return cls.from_pretrained(source, subfolder=name, **_without_variant(options))
        return cls.from_pretrained(source, subfolder=name, dtype=torch.float32, **options).requires_grad_(False).eval()
    except Exception as error:  # the library raises its own, safetensors' and OSError
        raise UserError(f"{source}/{name} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def load_parts(source, revision=None, variant=None, cache_dir=None, vae_source=None):
    """Load every component of the pipeline `source` (folder or hub id); the VAE from `vae_source` if given.

    Raises UserError where something is missing, unreachable, or not Stable Diffusion.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    options = {"revision": revision, "cache_dir": cache_dir}
    index = _pipeline_index(source, options)
    options["variant"] = variant
    unet = _load_network(UNet2DConditionModel, source, "unet", options)
    vae = _load_vae(vae_source, cache_dir) if vae_source else _load_network(AutoencoderKL, source, "vae", options)
    present = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0]]
    scheduler_config = _load_scheduler_config(source, options)
    loaded = {name: _load_transformers(index, name, source, options) for name in present
              if name.startswith(("tokenizer", "text_encoder", *EXTRAS))}  # fmt: skip
    extras = {name: loaded[name] for name in EXTRAS if name in loaded}
    if unet.config.in_channels != vae.config.latent_channels:
        raise UserError(
            f"{source}: the U-Net takes {unet.config.in_channels} channels and the VAE gives {vae.config.latent_channels}."
        )
    return Parts(
        is_xl=index["_class_name"].startswith("StableDiffusionXL"),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
        tokenizers=[loaded[name] for name in ("tokenizer", "tokenizer_2") if name in loaded],
        text_encoders=[loaded[name] for name in ("text_encoder", "text_encoder_2") if name in loaded],
        vae=vae, unet=unet, scheduler_config=scheduler_config, extras=extras,
    )  # fmt: skip


def _load_vae(source, cache_dir):
    """The VAE at the root of a folder or hub repository, or in its `vae` subfolder."""
    from diffusers import AutoencoderKL

    try:
        config = AutoencoderKL.load_config(source, cache_dir=cache_dir)
    except (OSError, ValueError):
        config = {}
    subfolder = None if config.get("_class_name") == "AutoencoderKL" else "vae"
    return _load_network(AutoencoderKL, source, subfolder, {"cache_dir": cache_dir})


def _load_scheduler_config(source, options):
    from diffusers import DDPMScheduler

    try:
        return dict(DDPMScheduler.load_config(source, subfolder="scheduler", **_without_variant(options)))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/scheduler cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def place(parts, device, vae_dtype, text_dtype):
    """Move the VAE and the text encoders."""
    parts.vae.to(device, vae_dtype)
    for encoder in parts.text_encoders:
        encoder.to(device, text_dtype)


def cast_frozen(unet, dtype):
    """Cast the parameters that are not trained; LoRA adapters stay float32."""
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def speed_up(unet, channels_last, xformers, compile, warn):
    """Apply the speed switches to a U-Net; `warn` takes a sentence where one cannot be had on this machine."""
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    if xformers:
        if torch.cuda.is_available():
            try:
                unet.enable_xformers_memory_efficient_attention()
            except (ImportError, ModuleNotFoundError):
                raise UserError(
                    "--enable_xformers_memory_efficient_attention needs xformers: pip install xformers"
                ) from None
        else:
            warn("xformers attention needs CUDA: torch's scaled_dot_product_attention is used, the maths are the same.")
    if compile:
        unet.compile()


def to_device(batch, device):
    """The tensors of a batch on `device`."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


class Tokenize:
    """Callable: text -> one row of token ids (L,) per tokenizer; picklable, so that loader workers can hold it."""

    def __init__(self, tokenizers):
        self.tokenizers = tokenizers

    def __call__(self, text):
        return [
            tokenizer(text, max_length=tokenizer.model_max_length, padding="max_length", truncation=True,
                      return_tensors="pt").input_ids[0]
            for tokenizer in self.tokenizers
        ]  # fmt: skip


@torch.no_grad()
def encode_prompts(parts, input_ids):
    """Prompt embeddings (B, L, D), and the pooled ones (B, P) for SDXL, else None.

    Args: `input_ids` one (B, L) tensor per text encoder. SD1/SD2 use the last hidden state, SDXL the penultimate
    ones of both encoders side by side and the projection of the second.
    """
    if not parts.is_xl:
        return parts.text_encoders[0](input_ids[0])[0], None
    outputs = [
        encoder(ids, output_hidden_states=True) for encoder, ids in zip(parts.text_encoders, input_ids, strict=True)
    ]
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1][0]


def encode_blank(parts, device):
    """The embeddings (1, L, D) and pooled (1, P) or None of the empty caption."""
    return encode_prompts(parts, [row[None].to(device) for row in Tokenize(parts.tokenizers)("")])


def unconditional(parts, blank):
    """The embeddings that guidance starts from: those of the empty caption, or zeros where the pipeline says so."""
    if parts.is_xl and parts.zeros_for_empty:
        return torch.zeros_like(blank[0]), torch.zeros_like(blank[1])
    return blank


def condition(parts, embeddings, sizes, batch_size):
    """The keyword arguments of a U-Net call; embeddings of one prompt are repeated to `batch_size`."""
    prompt_embeds, pooled = embeddings
    arguments = {"encoder_hidden_states": prompt_embeds.expand(batch_size, -1, -1)}
    if parts.is_xl:
        arguments["added_cond_kwargs"] = {
            "text_embeds": pooled.expand(batch_size, -1),
            "time_ids": sizes.expand(batch_size, -1),
        }
    return arguments


def stack_conditions(first, second):
    """Two `condition`s as one of twice the batch."""
    joined = {"encoder_hidden_states": torch.cat([first["encoder_hidden_states"], second["encoder_hidden_states"]])}
    if "added_cond_kwargs" in first:
        pairs = {name: torch.cat([value, second["added_cond_kwargs"][name]])
                 for name, value in first["added_cond_kwargs"].items()}  # fmt: skip
        joined["added_cond_kwargs"] = pairs
    return joined


def predict(unet, dtype, x, timesteps, arguments, timestep_cond=None):
    """The U-Net's raw output in float32, called on `x` in `dtype` (float32 for a network that autocast casts)."""
    arguments = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].to(dtype)}
    return unet(x.to(dtype), timesteps, timestep_cond=timestep_cond, return_dict=False, **arguments)[0].float()


@torch.no_grad()
def latent_moments(vae, pixels, batch_size):
    """Mean and standard deviation (B, 4, h, w) of the VAE's latent, unscaled, in chunks of `batch_size` images.

    Args: `pixels` uint8 (B, 3, H, W). The VAE runs in its own precision: SDXL's overflows in fp16.
    """
    parts = [vae.encode((chunk.float() / 127.5 - 1).to(vae.dtype)).latent_dist for chunk in pixels.split(batch_size)]
    return torch.cat([part.mean for part in parts]).float(), torch.cat([part.std for part in parts]).float()


@torch.no_grad()
def encode_batch(parts, batch, blank, noise_generator, resolution, vae_batch_size, autocast):
    """Clean scaled latents (B, 4, h, w) float32, prompt embeddings, and SDXL's sizes (B, 6) or None.

    Args: `batch` of `samples.ImageCaptions` or `samples.CachedLatents`; `blank` from `encode_blank`.
    """
    if "moments" in batch:
        mean, std = batch["moments"].float().unbind(1)
        hidden = batch["empty"].view(-1, 1, 1)
        embeddings = torch.where(hidden, blank[0], batch["prompt_embeds"].to(blank[0].dtype))
        pooled = torch.where(hidden[:, 0], blank[1], batch["pooled"].to(blank[1].dtype)) if parts.is_xl else None
        sizes = batch.get("time_ids")
    else:
        mean, std = latent_moments(parts.vae, batch["pixels"], vae_batch_size or (8 if parts.is_xl else 32))
        with autocast:
            ids = [batch[f"input_ids_{number}"] for number in range(len(parts.tokenizers))]
            embeddings, pooled = encode_prompts(parts, ids)
        sizes = time_ids(batch["original_size"], batch["crop_top_left"], resolution) if parts.is_xl else None
    noise = torch.randn(mean.shape, generator=noise_generator, device=mean.device)
    return (mean + std * noise) * parts.vae.config.scaling_factor, (embeddings, pooled), sizes


def vae_dtype(wanted, mixed_precision, has_own_vae, is_xl):
    """The precision of the VAE for `--vae_dtype`: `auto` avoids fp16 where SDXL's VAE would overflow."""
    if wanted == "auto":
        half_is_safe = has_own_vae or not is_xl
        wanted = {"bf16": "bf16", "fp16": "fp16" if half_is_safe else "fp32"}.get(mixed_precision, "fp32")
    return DTYPES[wanted]


def check_resolution(parts, resolution):
    """The training resolution in pixels (512, SDXL 1024 if None); UserError if the VAE cannot take it."""
    resolution = resolution or (1024 if parts.is_xl else 512)
    factor = 2 ** (len(parts.vae.config.block_out_channels) - 1)
    if resolution % factor:
        raise UserError(f"--resolution {resolution} must be a multiple of {factor}, the VAE's down-sampling.")
    return resolution


def time_ids(original_size, crop_top_left, resolution):
    """SDXL's size conditions (B, 6): original (height, width), crop (top, left), target (height, width)."""
    target = torch.full_like(original_size, resolution)
    return torch.cat([original_size, crop_top_left, target], dim=1)


def create_student(teacher, cond_dim, cond_proj_init):
    """A trainable float32 copy of `teacher` that takes `timestep_cond` of width `cond_dim`.

    With `cond_proj_init` "zero" it gives the teacher's outputs bit for bit, and the projection still gets gradient;
    "default" keeps the library's initialisation. Raises UserError if weights do not fit.
    """
    from diffusers import UNet2DConditionModel

    # from_config would take the entries that are listed there for absent, and older configs lack time_cond_proj_dim
    config = {name: value for name, value in teacher.config.items() if name != "_use_default_values"}
    student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": cond_dim})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if set(missing) - {COND_PROJ} or unexpected:
        raise UserError(f"the teacher's U-Net does not fit its own config: missing {missing}, unexpected {unexpected}.")
    if cond_proj_init == "zero" and COND_PROJ in missing:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def save_network(network, folder, state):
    """Write a diffusers network's config and the weights `state` (not its own ones) as one file for `from_pretrained`."""
    from safetensors.torch import save_file

    network.save_config(folder)
    weights = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(weights, Path(folder) / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def add_lora(unet, rank, alpha, dropout, target_modules):
    """Freeze `unet`, add float32 LoRA adapters to it and return their LoraConfig. UserError if nothing matches."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules))
    unet.requires_grad_(False)
    try:
        unet.add_adapter(config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules: {' '.join(str(error).split())[:300]}") from None
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return config


@contextlib.contextmanager
def adapters_off(unet, has_adapters):
    """Within it a U-Net with LoRA adapters is the base model again, bit for bit."""
    if has_adapters:
        unet.disable_adapters()
    try:
        yield
    finally:
        if has_adapters:
            unet.enable_adapters()


def lora_state(unet):
    """The adapters' weights under PEFT's own names, in plain memory layout, as safetensors wants them."""
    from peft.utils import get_peft_model_state_dict

    return {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(unet).items()}


def load_lora_state(unet, state):
    """Load what `lora_state` returned; RuntimeError where the adapters are others."""
    from peft.utils import set_peft_model_state_dict

    if set(state) != set(lora_state(unet)):
        raise RuntimeError("the adapters sit on other modules")
    set_peft_model_state_dict(unet, state)


def fingerprint(network):
    """A hash of a network's weights, from names, shapes and up to 1,024 evenly spaced values of each tensor."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        flat = tensor.detach().flatten()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // 1024)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def cache_manifest(parts, resolution):
    """What precomputed latents and embeddings depend on; a cache made with other values is stale. Call before casting."""
    return {
        "resolution": resolution,
        "vae": fingerprint(parts.vae),
        "text_encoders": [fingerprint(encoder) for encoder in parts.text_encoders],
        "tokens": [tokenizer.model_max_length for tokenizer in parts.tokenizers],
    }
