"""Stable Diffusion models (SD1, SD2, SDXL): loading, prompts and latents, calling the U-Net, students, LoRA.

Letters: B batch, L tokens, D text width, H W pixels, h w latent height and width.
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import torch

from brisk import hub
from brisk.options import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VAES = {"mse": "stabilityai/sd-vae-ft-mse", "ema": "stabilityai/sd-vae-ft-ema"}  # short names that --vae knows
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


def remedy(folder):
    """The end of a message about a folder that is no pipeline: what to do where it is a student's."""
    return "; train the student with --save_pipeline" if (Path(folder) / "bksdm_report.json").is_file() else ""


def pipeline_index(source, options, flag):
    """The content of model_index.json of a pipeline folder or hub id; `flag`: what errors call `source`. UserError."""
    from diffusers import DiffusionPipeline

    folder = Path(source)
    # only NAME or OWNER/NAME can be a hub id, and OWNER is no folder here
    if not folder.is_dir() and (
        source.count("/") > 1 or source[:1] in "./~" or ("/" in source and folder.parent.is_dir())
    ):
        raise UserError(f"{flag} {source} is no such folder.")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{flag} {source} is a folder without model_index.json{remedy(folder)}.")
    try:
        return DiffusionPipeline.load_config(source, **options)
    except (OSError, ValueError) as error:
        reason = hub.why(error, source, 200)
        raise UserError(
            f"{flag} {source} is neither a pipeline folder nor a hub model that can be reached: {reason}"
        ) from None


def _stable_diffusion_index(source, options, flag):
    index = pipeline_index(source, options, flag)
    name = index.get("_class_name", "")
    if not name.startswith(("StableDiffusion", "LatentConsistencyModel")) or "unet" not in index:
        raise UserError(
            f"{flag} {source} is a {name or 'nameless pipeline'}, not a Stable Diffusion one."
        )
    return index


def _load_network(cls, source, subfolder, options, dtype=torch.float32):
    """A diffusers network in `dtype` with every weight present; UserError if the folder holds something else."""
    where = f"{source}/{subfolder}" if subfolder else source
    try:
        config = cls.load_config(source, subfolder=subfolder, **_without_variant(options))
        if config.get("_class_name") != cls.__name__:
            raise UserError(f"{where} holds a {config.get('_class_name')}, not a {cls.__name__}.")
        network, report = cls.from_pretrained(
            source, subfolder=subfolder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{where} cannot be loaded: {hub.why(error, source)}") from None
    wrong = sorted([*report["missing_keys"], *(f"{key} {tuple(wanted)} (there: {tuple(found)})"
                                               for key, found, wanted in report.get("mismatched_keys", []))])  # fmt: skip
    if wrong:
        raise UserError(f"{where} lacks {len(wrong)} weights of its config: {', '.join(wrong)}.")
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
        raise UserError(f"{source}/{name} cannot be loaded: {hub.why(error, source)}") from None


def load_parts(source, revision=None, variant=None, cache_dir=None, vae_source=None, unet_source=None,
               flag="--pretrained_teacher_model"):  # fmt: skip
    """Load every component of the pipeline `source` (folder or hub id); VAE and U-Net from elsewhere if given.

    Args: `flag`: what error messages call `source`.
    Raises UserError where something is missing, unreachable, or not Stable Diffusion.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    options = {"revision": revision, "cache_dir": cache_dir}
    index = _stable_diffusion_index(source, options, flag)
    options["variant"] = variant
    networks = {}
    for name, cls, other in (("unet", UNet2DConditionModel, unet_source), ("vae", AutoencoderKL, vae_source)):
        loaded = load_network(cls, other, name, cache_dir) if other else _load_network(cls, source, name, options)
        networks[name] = loaded
    present = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0]]
    scheduler_config = _load_scheduler_config(source, options)
    loaded = {name: _load_transformers(index, name, source, options) for name in present
              if name.startswith(("tokenizer", "text_encoder", *EXTRAS))}  # fmt: skip
    extras = {name: loaded[name] for name in EXTRAS if name in loaded}
    takes, gives = networks["unet"].config.in_channels, networks["vae"].config.latent_channels
    if takes != gives:
        raise UserError(f"{source}: the U-Net takes {takes} channels and the VAE gives {gives}.")
    return Parts(
        is_xl=index["_class_name"].startswith("StableDiffusionXL"),
        zeros_for_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
        tokenizers=[loaded[name] for name in ("tokenizer", "tokenizer_2") if name in loaded],
        text_encoders=[loaded[name] for name in ("text_encoder", "text_encoder_2") if name in loaded],
        **networks, scheduler_config=scheduler_config, extras=extras,
    )  # fmt: skip


def load_network(cls, source, subfolder, cache_dir=None, revision=None, variant=None, dtype=torch.float32):
    """A network of class `cls` at the root of a folder or hub repository, or in its `subfolder`, frozen, in `dtype`.

    Raises UserError.
    """
    options = {"cache_dir": cache_dir, "revision": revision}
    try:
        config = cls.load_config(source, **options)
    except (OSError, ValueError):
        config = {}
    subfolder = None if config.get("_class_name") == cls.__name__ else subfolder
    return _load_network(cls, source, subfolder, {**options, "variant": variant}, dtype)


def _load_scheduler_config(source, options):
    from diffusers import DDPMScheduler

    try:
        return dict(DDPMScheduler.load_config(source, subfolder="scheduler", **_without_variant(options)))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}/scheduler cannot be loaded: {hub.why(error, source)}") from None


def place(parts, device, vae_dtype, text_dtype):
    """Move the VAE and the text encoders."""
    parts.vae.to(device, vae_dtype)
    for encoder in parts.text_encoders:
        encoder.to(device, text_dtype)


def set_aside(modules):
    """Move modules that training does not need to the CPU; validation brings them back."""
    for module in modules:
        module.to("cpu", torch.float32)


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
        # recomputed blocks do not repeat what hooks noted in the first pass
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        unet.compile()


def to_device(batch, device):
    """The tensors of a batch on `device`."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def predict(unet, dtype, x, timesteps, arguments, timestep_cond=None):
    """The U-Net's raw output in float32, called on `x` in `dtype` (float32 for a network that autocast casts)."""
    arguments = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].to(dtype)}
    return unet(x.to(dtype), timesteps, timestep_cond=timestep_cond, return_dict=False, **arguments)[0].float()


def vae_dtype(wanted, half, has_own_vae, is_xl):
    """The precision of the VAE for `--vae_dtype`: `auto` is that of the run, but avoids fp16 where SDXL's would overflow."""
    if wanted == "auto":
        return torch.float32 if half == torch.float16 and is_xl and not has_own_vae else half
    return DTYPES[wanted]


def vae_factor(vae):
    """How many pixels wide a latent pixel is."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_resolution(parts, resolution):
    """The training resolution in pixels (512, SDXL 1024 if None); UserError if the VAE cannot take it."""
    resolution = resolution or (1024 if parts.is_xl else 512)
    factor = vae_factor(parts.vae)
    if resolution % factor:
        raise UserError(f"--resolution {resolution} must be a multiple of {factor}, the VAE's down-sampling.")
    return resolution


def create_student(teacher, cond_dim, cond_proj_init):
    """A trainable float32 copy of `teacher` that takes `timestep_cond` of width `cond_dim`.

    With `cond_proj_init` "zero" it gives the teacher's outputs bit for bit, and the projection still gets gradient;
    "default" keeps the library's initialisation. Raises UserError if weights do not fit.
    """
    from diffusers import UNet2DConditionModel

    student = UNet2DConditionModel.from_config({**plain_config(teacher), "time_cond_proj_dim": cond_dim})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    if set(missing) - {COND_PROJ} or unexpected:
        raise UserError(f"the teacher's U-Net does not fit its own config: missing {missing}, unexpected {unexpected}.")
    if cond_proj_init == "zero" and COND_PROJ in missing:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def plain_config(network):
    """The constructor arguments of a diffusers network, as a dict that `from_config` takes in full."""
    # it would take the entries that `_use_default_values` lists for absent
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


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
