"""What the sources of an evaluation draw with: stock pipelines, networks of train_fpdm.py, predictors of EPD on a model."""

from pathlib import Path

import torch

from brisk import denoiser_sources, denoisers, epd_sampling, fpdm, hub, image_folder, predictor_files, sd_models
from brisk.fpdm_pipeline import FPDMPipeline
from brisk.options import UserError


def is_predictor(path):
    """Whether a path is a predictor's file, or the folder of a run that wrote some."""
    if not path.is_dir():
        return path.suffix in predictor_files.SUFFIXES
    return any(next(folder.glob("predictor*"), None) for folder in (path, path / "export"))


def network_class(path):
    """The class of the network in a folder or in its `transformer`, None for others."""
    places = (path / name / "config.json" for name in ("", "transformer", "transformer_ema"))
    return next((image_folder.read_json(file).get("_class_name") for file in places if file.is_file()), None)


def stock_pipeline(source, vae, dtype):
    """A silent stock pipeline without safety checker, every weight of its network there. UserError."""
    import diffusers

    checkpoints = sorted(path.name for path in Path(source).glob("checkpoint-*"))
    try:
        index = sd_models.pipeline_index(source, {}, "the model")
    except UserError as error:
        hint = f" It has checkpoints that can be given: {', '.join(checkpoints)}." if checkpoints else ""
        raise UserError(f"{error}{hint}") from None
    name = next((name for name in ("unet", "transformer") if (index.get(name) or [None])[0]), None)
    cls = getattr(diffusers, index[name][1], None) if name else None
    if cls is None:
        raise UserError(f"{source} is a {index.get('_class_name')} without a U-Net or transformer of diffusers: it cannot be "
                        "measured, but its images can.")  # fmt: skip
    parts = {name: sd_models.load_network(cls, source, name, dtype=dtype)}
    if vae:
        parts["vae"] = sd_models.load_network(diffusers.AutoencoderKL, sd_models.VAES.get(vae, vae), "vae", dtype=dtype)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, **parts)
    except Exception as error:  # the libraries raise their own, safetensors' and OSError
        raise UserError(f"{source} cannot be loaded: {hub.why(error, source)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def fpdm_pipeline(source, vae, device, dtype=torch.float32):
    """The `FPDMPipeline` of a network (see `fpdm.load_transformer`) and the VAE of a folder, hub id or short name. UserError.

    The VAE is float32 whatever `dtype` the network has.
    """
    import diffusers

    network = fpdm.load_transformer(source)
    if network.config.label_type == "vector":
        raise UserError(f"{source} takes label vectors, of which no protocol has any; draw with sample_fpdm.py, give the images.")
    if not vae:
        raise UserError(f"{source} has no VAE to make images of its latents: give one as vae=FOLDER.")
    try:
        autoencoder = fpdm.load_vae(sd_models.VAES.get(vae, vae), network.config)
    except UserError as error:
        raise UserError(str(error).replace("--vae ", "vae=")) from None
    scheduler = diffusers.DDPMScheduler()  # its class alone counts
    if (Path(source) / "scheduler/scheduler_config.json").is_file():
        config = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler")
        if config["_class_name"] == "DDIMScheduler":
            scheduler = diffusers.DDIMScheduler.from_config(config)
    pipeline = FPDMPipeline(denoisers.frozen(network, dtype), autoencoder, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_denoiser(wanted, device, dtype):
    """The `Denoiser` of `ModelOptions`. UserError in the words of evaluate.py."""
    try:
        denoiser = denoiser_sources.load(wanted, device, dtype)
        if denoiser.network is None:
            raise UserError("the predictor is for a mixture of Gaussians, which draws no images.")
        if denoiser.family == "dit":
            denoiser.decode(torch.zeros(1, *denoiser.shape, device=denoiser.device))  # some have no VAE
    except UserError as error:
        raise UserError(str(error).replace(denoiser_sources.FLAG, "model=")) from None
    return denoiser


def epd_pair(content, model, device, dtype=torch.float32):
    """(`predictor.Predictor`, its `Denoiser`). Args: `model`: pipeline in place of the one that it names, or None. UserError."""
    wanted = epd_sampling.complete(denoiser_sources.ModelOptions(source=model), content)
    denoiser = load_denoiser(wanted, device, dtype)
    conflicts = epd_sampling.denoiser_conflicts(content, denoiser)
    if conflicts:
        raise UserError(f"{conflicts[0]}.")
    return content, denoiser
