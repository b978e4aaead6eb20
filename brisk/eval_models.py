"""What draws the images of an evaluation: any source as a `Model`, and with a budget of network calls as a `Plan`.

An image depends on its seed and condition alone: each has a CPU generator of its own. Letters: B batch, H W pixels.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from brisk import (
    denoisers,
    epd_sampling,
    eval_checkpoints,
    eval_sources,
    fpdm_sampling,
    image_folder,
    predictor_files,
    sample_seeds,
    sd_models,
)
from brisk.options import UserError

TRAILING = {"timestep_spacing": "trailing"}
SCHEDULERS = {  # name: (class of diffusers, its settings)
    "ddim": ("DDIMScheduler", {}), "ddim_trailing": ("DDIMScheduler", TRAILING),
    "dpmpp": ("DPMSolverMultistepScheduler", TRAILING), "euler": ("EulerDiscreteScheduler", TRAILING),
    "unipc": ("UniPCMultistepScheduler", TRAILING), "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
}  # fmt: skip
NOT_FINITE = (float("inf"), float("-inf"))  # which JSON does not know
CHOICES = ("ddim", "ddim_trailing", "dpmpp", "euler", "unipc")  # of a model that is not distilled to few steps
BF16_LESS = ("DDPMPipeline", "DDIMPipeline", "LDMPipeline", "ConsistencyModelPipeline")  # whose images go to numpy as they are
SILENT = ("DiTPipeline", "LDMPipeline")  # pipelines that do not pass their generators on to the scheduler's steps


class Model(NamedTuple):
    """A loaded source."""

    kind: str  # pipeline, fpdm or epd
    source: str
    network: torch.nn.Module  # whose forward calls count
    takes: str | None  # prompts, classes or None
    classes: int | None
    few_steps: bool  # guidance is in its weights
    fixed_nfe: int | None  # of EPD: its predictor's
    digest: str  # of all weights that images depend on, and of the tables
    device: torch.device
    own: Any  # a stock pipeline; an `FPDMPipeline`; of epd (`predictor.Predictor`, `denoisers.Denoiser`)


class Plan(NamedTuple):
    """How a model draws within a budget."""

    draw: Callable  # (B captions or class numbers or None, B seeds) -> uint8 array (B, H, W, 3)
    nfe: int  # network calls one after the other
    steps: int | None  # num_inference_steps; None of EPD
    facts: dict  # what the images depend on besides the weights, as JSON holds it
    macs: int | None = None  # multiply-accumulates of one image, where they differ from call to call


def load(source, device="cpu", dtype=torch.float32, vae=None, model=None):
    """The `Model` of a pipeline (folder or hub id), an FPDM run, an EPD predictor or run, or a checkpoint-N of any run. UserError.

    Args: `dtype` of the networks; `vae`: autoencoder (folder or hub id) in place of its own; `model`: pipeline in place of the one
    that a predictor names, or that a checkpoint's run started from.
    """
    source, device = str(source), torch.device(device)
    path = Path(source)
    if eval_checkpoints.is_checkpoint(path):
        kind, own = eval_checkpoints.read(path, device, dtype, vae, model)
    elif eval_sources.is_predictor(path):
        kind, own = "epd", eval_sources.epd_pair(predictor_files.load(path), model, device, dtype)
    elif model:
        raise UserError(f"model={model} was given, but {source} is no predictor and no checkpoint.")
    elif path.suffix == ".pt" or eval_sources.network_class(path) == "FPDMTransformer2DModel":
        own_vae = source if (path / "vae").is_dir() else None
        kind, own = "fpdm", eval_sources.fpdm_pipeline(path, vae or own_vae, device, dtype)
    else:
        kind, own = "pipeline", eval_sources.stock_pipeline(source, vae, dtype).to(device)
    if kind == "epd" and vae:
        raise UserError(f"vae={vae} was given, but a predictor's model brings its own.")
    return DESCRIBE[kind](source, own, device)


def _digest(modules, text=""):
    parts = [sd_models.fingerprint(module) for module in modules]
    return hashlib.sha256("".join([*parts, text]).encode()).hexdigest()[:16]


def _modules(pipeline):
    """The networks of a pipeline by the names of its components, in their order."""
    found = sorted(pipeline.components.items())
    return {name: part for name, part in found if isinstance(part, torch.nn.Module)}


def _describe_pipeline(source, pipeline, device):
    modules, accepted = _modules(pipeline), _accepted(pipeline)
    network = modules["unet"] if "unet" in modules else modules["transformer"]
    takes, classes = None, None
    if "prompt" in accepted:
        takes = "prompts"
    elif "class_labels" in accepted:
        classes = network.config.get("num_embeds_ada_norm") or network.config.get("num_class_embeds")
        takes = "classes" if classes else None
    elif network.config.get("num_class_embeds"):
        raise UserError(f"{source}: a {type(pipeline).__name__} cannot tell its network the class that it needs.")
    # a LatentConsistencyModelPipeline tells its network the guidance instead
    few_steps = type(pipeline.scheduler).__name__ == "LCMScheduler" and "original_inference_steps" not in accepted
    return Model("pipeline", source, network, takes, classes, few_steps, None, _digest(modules.values()), device, pipeline)


def _describe_fpdm(source, pipeline, device):
    network = pipeline.transformer
    classes = network.config.num_classes if network.config.label_type == "class" else None
    return Model("fpdm", source, network, "classes" if classes else None, classes, False, None, _digest([network, pipeline.vae]),
                 device, pipeline)  # fmt: skip


def _describe_epd(source, pair, device):
    content, denoiser = pair
    network = denoiser.network.model if denoiser.family == "edm" else denoiser.network  # the part that is called
    calls = epd_sampling.cost(epd_sampling.of_predictor(content, denoiser.flow)).para_nfe
    tables = json.dumps([table.tolist() for table in (content.sigmas, *content.tables)])
    return Model("epd", source, network, denoiser.takes, denoiser.classes if denoiser.takes == "classes" else None, False, calls,
                 _digest([denoiser.network], tables), device, pair)  # fmt: skip


DESCRIBE = {"pipeline": _describe_pipeline, "fpdm": _describe_fpdm, "epd": _describe_epd}


def _accepted(pipeline):
    """{argument of the pipeline's call: its default}."""
    return {name: one.default for name, one in inspect.signature(type(pipeline).__call__).parameters.items()}


def plan(model, nfe=None, guidance_scale=None, scheduler=None, resolution=None, iterations=None, reuse=None, negative_prompt=None):
    """The `Plan` of `nfe` network calls one after the other, None for the model's usual number. UserError where it cannot be.

    Args: `guidance_scale`: None for 1 of a few-step model, a predictor's own, else the pipeline's default; `scheduler`: a name in
    `SCHEDULERS`, None for the model's own; `resolution` in px, None for the model's own; `iterations`, `reuse`: of FPDM, see
    `fpdm_sampling.make_plan`; `negative_prompt`: of models that take prompts and are guided in pairs.
    """
    if model.kind != "fpdm" and (iterations is not None or reuse is not None):
        raise UserError(f"iterations and reuse are of FPDM alone, {model.source} has no fixed-point layer.")
    if negative_prompt and model.takes != "prompts":
        raise UserError(f"a negative prompt was given, {model.source} takes {model.takes or 'nothing'}.")
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise UserError(f"scheduler {scheduler} is none of {', '.join(SCHEDULERS)}.")
    if model.kind == "epd":
        return _plan_epd(model, nfe, guidance_scale, scheduler, resolution, negative_prompt)
    if model.kind == "fpdm":
        return _plan_fpdm(model, nfe, guidance_scale, scheduler, resolution, iterations, reuse)
    return _plan_pipeline(model, nfe, guidance_scale, scheduler, resolution, negative_prompt)


def _check_side(model, resolution, own):
    if resolution not in (None, own):
        raise UserError(f"{model.source} draws {own} px only, not {resolution}.")


def _choose_scheduler(pipeline, name):
    """A copy of the pipeline's scheduler, or the one called `name` with its betas. UserError."""
    import diffusers

    own = pipeline.scheduler
    if name is None:
        return copy.deepcopy(own)
    if "beta_schedule" not in own.config:
        raise UserError(f"scheduler {name} needs a model of discrete noise levels, this one has a {type(own).__name__}.")
    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(own.config, **settings)


def _calls(scheduler, steps):
    """How often a pipeline of `scheduler` calls its network. ValueError where it cannot take `steps`."""
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **shift)
    return len(scheduler.timesteps)


def _steps_for(scheduler, nfe):
    """The number of steps that makes `nfe` network calls. UserError where there is none."""
    reason = "it has no number of steps with so many"
    for steps in range(nfe, 0, -1):  # one step is one call or more
        try:
            if _calls(scheduler, steps) == nfe:
                return steps
        except (ValueError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
    raise UserError(f"{type(scheduler).__name__} cannot make exactly {nfe} network calls: {reason}.")


def _pipeline_guidance(model, accepted, scale):
    """The guidance scale, None for a pipeline that knows none. UserError."""
    if "guidance_scale" not in accepted:
        if scale not in (None, 1):
            raise UserError(f"{model.source} is a {type(model.own).__name__}, which knows no guidance.")
        return None
    if scale is None:
        scale = 1.0 if model.few_steps else accepted["guidance_scale"]
    is_dit = type(model.own).__name__ == "DiTPipeline"
    if is_dit and scale > 1 and model.classes != 1000:
        raise UserError(f"{model.source}: DiTPipeline guides networks of 1000 classes only, this one has {model.classes}: give "
                        "guidance_scale=1.")  # fmt: skip
    return float(scale)


def _own_side(model):
    """Side in pixels that a pipeline without height and width draws."""
    autoencoder = next((part for name, part in _modules(model.own).items() if name in ("vae", "vqvae")), None)
    factor = 1 if autoencoder is None else 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return model.network.config.sample_size * factor


def _check_pipeline(model, scheduler, negative_prompt):
    """UserError for a precision, a negative prompt or a predicted variance that cannot be used."""
    network, name = model.network, type(model.own).__name__
    if network.dtype != torch.float32 and (name == "LDMPipeline" or (name in BF16_LESS and network.dtype == torch.bfloat16)):
        raise UserError(f"{model.source} is a {name}, which cannot draw in {str(network.dtype).removeprefix('torch.')}: give fp32.")
    if negative_prompt and "negative_prompt" not in _accepted(model.own):
        raise UserError(f"a negative prompt was given, a {name} knows none.")
    takes_variance = scheduler.config.get("variance_type") in ("learned", "learned_range")
    if type(network).__name__ == "UNet2DModel" and network.config.out_channels != network.config.in_channels and not takes_variance:
        raise UserError(f"{model.source} predicts a variance too, which its {type(scheduler).__name__} does not take.")


def _plan_pipeline(model, nfe, guidance_scale, name, resolution, negative_prompt):
    accepted, scheduler = _accepted(model.own), _choose_scheduler(model.own, name)
    _check_pipeline(model, scheduler, negative_prompt)
    steps = accepted["num_inference_steps"] if nfe is None else _steps_for(scheduler, nfe)
    calls, scale = _calls(scheduler, steps), _pipeline_guidance(model, accepted, guidance_scale)
    how = {"num_inference_steps": steps} | ({} if scale is None else {"guidance_scale": scale})
    if "height" not in accepted:
        _check_side(model, resolution, _own_side(model))
    elif resolution:
        side = denoisers.image_side(resolution, None, 8)
        how |= {"height": side, "width": side}
    if "use_resolution_binning" in accepted:
        how["use_resolution_binning"] = False  # the size is the one asked for
    draw = functools.partial(_draw_by_pipeline, model, scheduler, how, negative_prompt)
    settings = {key: value if value not in NOT_FINITE else str(value) for key, value in scheduler.config.items()
                if not key.startswith("_")}  # fmt: skip
    facts = {"scheduler": name or type(scheduler).__name__.removesuffix("Scheduler"), "guidance_scale": scale, "steps": steps,
             "resolution": resolution, "negative_prompt": negative_prompt, "scheduler_settings": settings}  # fmt: skip
    return Plan(draw, calls, steps, json.loads(json.dumps(facts, default=str)))


@contextlib.contextmanager
def _scheduled(pipeline, scheduler):
    """Within it the pipeline samples by `scheduler`."""
    own, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own


def _draw_by_pipeline(model, scheduler, how, negative_prompt, conditions, seeds):
    """`Plan.draw`. Args: `how`: what else the pipeline is called with."""
    pipeline, generators, scheduler = model.own, sample_seeds.generators(seeds), copy.deepcopy(scheduler)
    if type(pipeline).__name__ in SILENT and "generator" in inspect.signature(scheduler.step).parameters:
        rows = 2 if how.get("guidance_scale", 1) > 1 else 1
        scheduler.step = functools.partial(scheduler.step, generator=generators * rows)
    asked = {"prompts": {"prompt": conditions}, "classes": {"class_labels": conditions}, None: {}}[model.takes]
    if "batch_size" in _accepted(pipeline):
        asked["batch_size"] = len(seeds)
    if negative_prompt:
        asked["negative_prompt"] = [negative_prompt] * len(seeds)
    with _scheduled(pipeline, scheduler):
        images = torch.from_numpy(pipeline(**asked, **how, generator=generators, output_type="np").images)
    pictures = image_folder.quantise(images.permute(0, 3, 1, 2) * 2 - 1)
    return pictures.repeat(3, -1) if pictures.shape[-1] == 1 else pictures


def _plan_fpdm(model, nfe, guidance_scale, name, resolution, iterations, reuse):
    import diffusers

    pipeline, config = model.own, model.network.config
    _check_side(model, resolution, config.image_size)
    if name not in (None, "ddim"):
        raise UserError(f"scheduler {name} was given, {model.source} is sampled by its own or by ddim.")
    if not config.fixed_point and (iterations is not None or reuse is not None):
        raise UserError(f"iterations and reuse are of FPDM alone, {model.source} is a plain DiT.")
    scheduler = diffusers.DDIMScheduler() if name else pipeline.scheduler
    kind = "ddim" if type(scheduler).__name__ == "DDIMScheduler" else "ddpm"
    steps = nfe or _accepted(pipeline)["num_inference_steps"]
    scale = (4.0 if model.takes else 1.0) if guidance_scale is None else float(guidance_scale)
    reuse = config.reuse_solution if reuse is None else reuse
    try:
        made = fpdm_sampling.make_plan(model.network, steps, kind, guidance_scale=scale, iterations=iterations, reuse=reuse)
    except ValueError as error:
        raise UserError(f"{model.source}: {error}") from None

    def draw(conditions, seeds):
        labels, sources = conditions if model.takes else [0] * len(seeds), sample_seeds.generators(seeds)
        with _scheduled(pipeline, scheduler):
            images = pipeline(labels, scale, sources, steps, "pt", num_iters=iterations, reuse_solution=reuse)
        return image_folder.quantise(images.images * 2 - 1)

    facts = {"scheduler": {"ddpm": "DDPM", "ddim": "DDIM", "flow": "Euler"}[made.sampler], "guidance_scale": scale, "steps": steps,
             "iterations": made.iterations, "reuse": made.reuse}  # fmt: skip
    return Plan(draw, len(made.timesteps), steps, facts, fpdm_sampling.cost(model.network, made).macs)


def _plan_epd(model, nfe, guidance_scale, name, resolution, negative_prompt):
    content, denoiser = model.own
    _check_side(model, resolution, denoiser.resolution)
    if nfe not in (None, model.fixed_nfe):
        raise UserError(f"the predictor {model.source} makes {model.fixed_nfe} network calls, not {nfe}.")
    if name is not None:
        raise UserError(f"scheduler {name} was given, {model.source} is a predictor, a solver of its own.")
    kind, rate = content.model.get("guidance_type"), content.model.get("guidance_rate")
    if guidance_scale is not None:
        kind, rate = "cfg", guidance_scale
    if kind == "cg":
        raise UserError(f"{model.source} is guided by a classifier: draw with sample_epd.py, give the images.")
    if denoiser.takes == "prompts" and not negative_prompt:
        negative_prompt = (content.model.get("backend_config") or {}).get("negative_prompt")
    epd_sampling.check_guidance(denoiser, kind, None, negative_prompt)
    sampler = epd_sampling.of_predictor(content, denoiser.flow)

    @torch.no_grad()
    def draw(conditions, seeds):
        x, _ = epd_sampling.start(sampler, denoiser, seeds)
        given = torch.tensor(conditions) if denoiser.takes == "classes" else conditions
        negatives = [negative_prompt] * len(seeds) if negative_prompt else None
        direction = denoisers.direction_for(denoiser, given, len(seeds), kind, rate, negatives)
        state = deque(epd_sampling.states(sampler, direction, x), maxlen=1).pop()
        return image_folder.quantise(denoiser.decode(state))

    facts = {"scheduler": "EPD" if sampler.name == "epd" else f"EPD of {sampler.name}", "points": sampler.points,
             "guidance_type": kind, "guidance_scale": rate if kind == "cfg" else None,
             "negative_prompt": negative_prompt}  # fmt: skip
    pairs = epd_sampling.guided_in_pairs(denoiser, kind, rate)
    return Plan(draw, model.fixed_nfe, None, facts, _fixed_point_macs(denoiser.network, sampler, pairs))


def _fixed_point_macs(network, sampler, pairs):
    """`Plan.macs` of a predictor on a network of train_fpdm.py, which knows its own; None for others."""
    if type(network).__name__ != "FPDMTransformer2DModel":
        return None
    two_calls = fpdm_sampling.cost(network, fpdm_sampling.make_plan(network, 2))
    return two_calls.macs // 2 * epd_sampling.cost(sampler).total_nfe * (1 + pairs)
