"""What a checkpoint of a training run draws with: the weights' moving average where the run keeps one, sampled as its export is."""

import tempfile
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import load_file

from brisk import (
    checkpoint,
    denoisers,
    epd_options,
    epd_rl,
    epd_run,
    eval_sources,
    predictor_files,
    sd_export,
    sd_models,
)
from brisk.epd import Tables
from brisk.options import UserError


def is_checkpoint(source):
    """Whether `source` is the folder of a checkpoint, finished or not."""
    path = Path(source)
    return path.is_dir() and (checkpoint.step_of(path.resolve()) is not None or (path / checkpoint.MARKER).is_file())


def read(folder, device, dtype=torch.float32, vae=None, model=None):
    """(kind, what it draws with: see `eval_models.Model`) of the folder checkpoint-N of a run, its network in `dtype`. UserError.

    Args: `vae`: folder or hub id in place of the run's; `model`: the pipeline that the run started from, where it has moved, or
    another one to use an EPD predictor on.
    """
    folder = Path(folder)
    damage = checkpoint.damage(folder)
    if damage:
        raise UserError(f"{folder} cannot be used: {damage}.")
    state = checkpoint.read_state(folder)
    if "options" not in state:
        raise UserError(f"{folder} does not say by which options it was trained.")
    run = Namespace(**state["options"])
    if (folder / epd_rl.POLICY_FILE).is_file():
        return "epd", _tuned(folder, model, device, dtype)
    if (folder / epd_run.TABLES_FILE).is_file():
        return "epd", _distilled(folder, run, model, device, dtype)
    if (folder / "transformer").is_dir():
        if model:
            raise UserError(f"{folder} is of train_fpdm.py, which starts from no model: leave out model={model}.")
        return "fpdm", eval_sources.fpdm_pipeline(folder, vae or _vae_of(folder.parent, run.vae), device, dtype)
    if (folder / "unet_lora").is_dir() or (folder / "unet_target").is_dir():
        return "pipeline", _few_steps(folder, run, state["prediction_type"], vae, model).to(device, dtype)
    if (folder / "unet").is_dir():
        return "pipeline", _smaller(folder, run, state["prediction_type"], vae, model).to(device, dtype)
    raise UserError(f"{folder} holds no network that a training script here writes.")


def _parts(folder, source, run, vae, model, unet=None, revision=None):
    """`sd_models.Parts` of the pipeline that a run started from, `unet`: a folder with another U-Net."""
    own_vae = vae or run.pretrained_vae_model_name_or_path
    return sd_models.load_parts(
        model or source, None if model else revision or run.revision, None if model else run.variant, run.cache_dir,
        sd_models.VAES.get(own_vae, own_vae), unet and str(unet), f"the pipeline that {folder.parent.name} started from (model=):",
    )  # fmt: skip


def _few_steps(folder, run, prediction_type, vae, model):
    """The pipeline of a SLAM checkpoint, as a run exports it: `unet`, or the adapters (their average if any) in the teacher."""
    has_adapters = (folder / "unet_lora").is_dir()
    parts = _parts(folder, run.pretrained_teacher_model, run, vae, model, None if has_adapters else folder / "unet",
                   run.teacher_revision)  # fmt: skip
    if has_adapters:
        _add_adapters(parts.unet, folder / "unet_lora", run)
    scheduler = sd_export.lcm_scheduler(parts.scheduler_config, prediction_type, run.num_ddim_timesteps,
                                        run.timestep_scaling_factor)  # fmt: skip
    return sd_export.build_pipeline(parts, parts.unet.eval(), scheduler, with_extras=False)


def _add_adapters(unet, folder, run):
    """Add the LoRA adapters in `folder` to the teacher's U-Net. UserError where they do not fit."""
    targets = run.lora_target_modules.split(",") if run.lora_target_modules else sd_models.LORA_TARGETS
    sd_models.add_lora(unet, run.lora_rank, run.lora_alpha, run.lora_dropout, targets)
    try:
        sd_models.load_lora_state(unet, load_file(folder / "adapter_model.safetensors"))
        if (folder / "target.safetensors").is_file():
            average = load_file(folder / "target.safetensors")
            trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
            for number, parameter in enumerate(trained):
                parameter.data.copy_(average[str(number)])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the adapters in {folder} do not fit the pipeline {run.pretrained_teacher_model}: {error}.") from None


def _smaller(folder, run, prediction_type, vae, model):
    """The pipeline of a BK-SDM checkpoint: the student's U-Net, its average if there is one, in the teacher's pipeline."""
    unet = folder / ("unet_ema" if (folder / "unet_ema").is_dir() else "unet")
    parts = _parts(folder, run.pretrained_model_name_or_path, run, vae, model, unet)
    return sd_export.build_pipeline(parts, parts.unet, sd_export.own_scheduler(parts.scheduler_config, prediction_type),
                                    with_extras=False)  # fmt: skip


def _vae_of(run_folder, named):
    """Where the VAE of a run of train_fpdm.py is: in its folder, else what --vae `named`, else None."""
    return str(run_folder) if (run_folder / "vae").is_dir() else named


def _distilled(folder, run, model, device, dtype):
    """The pair of a checkpoint of train_epd.py: the average of the tables."""
    if model:
        run.pretrained_model_name_or_path, run.revision, run.variant = model, None, None
    wanted = epd_options.model_options(run)._replace(round_timesteps=run.round_timesteps, clip_denoised=run.clip_denoised)
    denoiser = eval_sources.load_denoiser(wanted, device, dtype)
    levels = denoisers.grid(denoiser, run.schedule_type, run.num_steps, run.schedule_rho).tolist()
    stored = load_file(folder / epd_run.TABLES_FILE)
    tables = Tables(*(stored[f"average.{name}"] for name in Tables._fields))
    return epd_run.make_predictor(f"{folder.parent.name}/{folder.name}", run, denoiser, levels, tables, None), denoiser


def _tuned(folder, model, device, dtype):
    """The pair of a checkpoint of train_epd_rl.py: the policy's mean, as --export writes it."""
    with tempfile.TemporaryDirectory() as place:
        path = epd_rl.export_run(folder.resolve().parent, str(folder), Path(place), manifest=False)
        content = predictor_files.read(path)
    return eval_sources.epd_pair(content, model, device, dtype)
