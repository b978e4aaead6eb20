"""From the flags that name a model to its `denoisers.Denoiser`."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from brisk import denoisers, hub, sd_models
from brisk.options import UserError
from brisk.pipeline_denoisers import NETWORKS, from_pipeline

FLAG = "--pretrained_model_name_or_path"
FAMILIES = {"cifar10": "edm", "ffhq": "edm", "afhqv2": "edm", "imagenet64": "edm", "lsun_bedroom": "cm", "lsun_cat": "cm",
            "imagenet256": "adm", "lsun_bedroom_ldm": "ldm", "ms_coco": "sd"}  # fmt: skip
HUB = {"sd": "stable-diffusion-v1-5/stable-diffusion-v1-5", "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
       "flux": "black-forest-labs/FLUX.1-dev"}  # fmt: skip
CONSISTENCY = "openai/consistency_models, converted by diffusers' scripts/convert_consistency_to_diffusers.py"
DOWNLOADS = {
    "cifar10": "edm-cifar10-32x32-uncond-vp.pkl of NVlabs/edm", "ffhq": "edm-ffhq-64x64-uncond-vp.pkl of NVlabs/edm",
    "afhqv2": "edm-afhqv2-64x64-uncond-vp.pkl of NVlabs/edm", "imagenet64": "edm-imagenet-64x64-cond-adm.pkl of NVlabs/edm",
    "lsun_bedroom": f"edm_bedroom256_ema.pt of {CONSISTENCY}", "lsun_cat": f"edm_cat256_ema.pt of {CONSISTENCY}",
    "imagenet256": "256x256_diffusion.pt of openai/guided-diffusion, converted to a UNet2DModel of diffusers",
    "lsun_bedroom_ldm": "lsun_beds256 of CompVis/latent-diffusion, converted by diffusers' scripts/conversion_ldm_uncond.py",
}  # fmt: skip


class ModelOptions(NamedTuple):
    """The values of the flags of `epd_options.add_model_options` that say which model it is."""

    dataset_name: str | None = None
    backend: str | None = None
    source: str | None = None  # --pretrained_model_name_or_path
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    resolution: int | None = None
    gmm_file: str | None = None
    round_timesteps: bool = False
    clip_denoised: bool | None = None


def family_of(dataset_name=None, backend=None):
    """The family of a backend, else of a published data set; None where neither says.

    Published predictors of Stable Diffusion call it ldm.
    """
    if dataset_name == "ms_coco" and backend == "ldm":
        return "sd"
    return backend or FAMILIES.get(dataset_name)


def load(wanted, device="cpu", dtype=torch.float32):
    """The frozen `denoisers.Denoiser` of `ModelOptions`, its network in `dtype`. UserError."""
    family = "gmm" if wanted.gmm_file and not wanted.backend else family_of(wanted.dataset_name, wanted.backend)
    if bool(wanted.gmm_file) != (family == "gmm"):
        raise UserError("--gmm_file and --backend gmm belong together: one was given without the other.")
    if wanted.gmm_file and wanted.source:
        raise UserError(f"--gmm_file and {FLAG} are two models: give one.")
    if family == "gmm":
        return _check_side(denoisers.load_mixture(wanted.gmm_file, device), wanted)
    source = wanted.source or _default_source(family, wanted.dataset_name)
    if family == "edm" and wanted.dataset_name in DOWNLOADS and not Path(source).exists():
        raise UserError(f"{FLAG} {source} does not exist: it has to be downloaded, {DOWNLOADS[wanted.dataset_name]}.")
    if family == "edm" and (Path(source) / "model_index.json").is_file():
        raise UserError(f"{FLAG} {source} is a pipeline of diffusers, a network of family edm is asked for.")
    if family == "edm" or (family is None and _is_edm(source)):
        return _check_side(denoisers.load_edm(source, device, dtype), wanted)
    pipe = _load_pipeline(source, wanted, family, dtype).to(device)
    denoiser = from_pipeline(pipe, None, wanted.resolution, wanted.round_timesteps, wanted.clip_denoised)
    _check_family(source, wanted, family, (denoiser.family,))
    return denoiser


def _check_family(source, wanted, family, found):
    """UserError where `family` is asked for and the source is of none or one of the families `found`."""
    if family is not None and family not in found:
        raise UserError(f"{FLAG} {source} is a model of family {' or '.join(found)}; --backend, --dataset_name or the predictor "
                        f"ask for one of family {family}.")  # fmt: skip


def _check_side(denoiser, wanted):
    if wanted.resolution not in (None, denoiser.resolution):
        raise UserError(f"--resolution {wanted.resolution} cannot be had, the model draws {denoiser.resolution} pixels only.")
    return denoiser


def _default_source(family, dataset_name):
    """The hub id of a family that has one. UserError that says what to download."""
    if family in HUB:
        return (os.environ.get("FLUX_MODEL_PATH") if family == "flux" else None) or HUB[family]
    if FAMILIES.get(dataset_name) == family and family:
        raise UserError(f"the model of --dataset_name {dataset_name} has to be downloaded: {DOWNLOADS[dataset_name]}; "
                        f"give its place as {FLAG}.")  # fmt: skip
    raise UserError(f"give the model as {FLAG} (or --gmm_file), or a --dataset_name of {', '.join(FAMILIES)}.")


def _is_edm(source):
    """Whether a place holds an EDM network by its looks."""
    try:
        return Path(source).suffix == ".pkl" or "model_type" in json.loads((Path(source) / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _load_pipeline(source, wanted, family, dtype):
    """A stock pipeline, every weight of its networks present, the VAE in float32. UserError."""
    import diffusers

    from brisk import fpdm

    folder, options = Path(source), {"revision": wanted.revision, "cache_dir": wanted.cache_dir}
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        return _bare_pipeline(folder, family, dtype)
    index = sd_models.pipeline_index(source, options, FLAG)
    parts = {name: None for name in sd_models.EXTRAS if name in index}
    for name, precision in (("unet", dtype), ("transformer", dtype), ("vae", torch.float32), ("vqvae", torch.float32)):
        library, class_name = index.get(name) or (None, None)
        if library:
            cls = getattr(fpdm if library == "brisk.fpdm" else diffusers, class_name, None)
            is_network = name in ("unet", "transformer")
            if cls is None or (is_network and class_name not in NETWORKS):
                raise UserError(f"{FLAG} {source} is a {index['_class_name']} with a {class_name}, which is not supported; "
                                f"supported are {', '.join(NETWORKS)}.")  # fmt: skip
            if is_network:
                _check_family(source, wanted, family, NETWORKS[class_name])
            parts[name] = sd_models.load_network(cls, source, name, wanted.cache_dir, wanted.revision, wanted.variant,
                                                 precision)  # fmt: skip
    if "safety_checker" in index:
        parts["requires_safety_checker"] = False
    try:
        return diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=wanted.variant, **options, **parts)
    except Exception as error:  # the libraries raise their own, safetensors' and OSError
        raise UserError(f"{FLAG} {source} cannot be loaded: {hub.why(error, source)}") from None


def _bare_pipeline(folder, family, dtype):
    """The stock pipeline of a folder with a network alone, perhaps of a run of train_fpdm.py, or with its VAE. UserError."""
    import diffusers

    from brisk import fpdm

    try:
        place = fpdm.find_transformer(folder)
        class_name = json.loads((place / "config.json").read_text()).get("_class_name")
    except (UserError, ValueError):
        said = f"{FLAG} {folder} holds neither a model_index.json nor a network's config.json"
        raise UserError(f"{said}{sd_models.remedy(folder)}.") from None
    if class_name == "UNet2DModel" and family in ("adm", "cm"):
        network = sd_models.load_network(diffusers.UNet2DModel, str(place), None, dtype=dtype)
        if family == "cm":
            return diffusers.ConsistencyModelPipeline(network, diffusers.CMStochasticIterativeScheduler())
        return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    if class_name == "UNet2DModel":
        raise UserError(f"{FLAG} {folder} is a U-Net without a pipeline: say by --backend adm or cm how it was trained.")
    vae = sd_models.load_network(diffusers.AutoencoderKL, str(folder), "vae") if (folder / "vae").is_dir() else None
    if class_name == "DiTTransformer2DModel":
        network = sd_models.load_network(diffusers.DiTTransformer2DModel, str(place), None, dtype=dtype)
        return diffusers.DiTPipeline(network, vae, diffusers.DDPMScheduler())
    network = fpdm.load_transformer(folder).to(dtype)
    is_flow = network.config.prediction_type == "flow"
    return diffusers.DiTPipeline(network, vae, None if is_flow else fpdm.export_scheduler(network.config))


def load_classifier(name, device="cpu"):
    """What the function of "module:function", called without arguments, returns: (network input, time) -> logits. UserError.

    A network is put on `device`. Modules are looked for in the current folder too.
    """
    sys.path.append(os.getcwd())
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"--classifier {name} is no module:function that can be imported and called: {error}.") from None
    if not callable(found):
        raise UserError(f"--classifier {name} returned a {type(found).__name__}, not a callable classifier.")
    return found.to(device).requires_grad_(False).eval() if isinstance(found, torch.nn.Module) else found
