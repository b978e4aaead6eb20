"""A predictor or a plain solver at work on a `denoisers.Denoiser`: which levels, from which noise, at what cost, for which model.

Letters: B batch, K points per interval, N levels sigma.
"""

import os
from typing import NamedTuple

import torch

from brisk import denoiser_sources, denoisers, epd, sample_seeds, solvers
from brisk.options import UserError

CUSTOMARY = {"dpmpp": ("logsnr", None), "unipc": ("logsnr", None), "deis": ("time_uniform", 2.0)}  # else polynomial, rho 7
PIXEL_FAMILIES = ("edm", "adm", "cm")  # whose samples lie in [-1, 1]
PRECISION = {"sd3": "fp16", "flux": "bf16"}  # of the network on a GPU, else fp32
PRECISION_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # in the backend_config of predictors
SIZED_FAMILIES = ("sd", "pixart", "sd3", "flux")  # that draw at more than one resolution


class Sampler(NamedTuple):
    """What takes a state from the first level to the last."""

    name: str  # epd or ipndm with `tables`, else a name in `solvers.SOLVERS`
    sigmas: torch.Tensor  # (N,) float64, decreasing
    options: solvers.SolverOptions  # of predictors afs, flow and max_order alone count
    tables: epd.Tables | None = None  # (N - 1, K)

    @property
    def points(self):
        """K, 0 of a plain solver."""
        return 0 if self.tables is None else self.tables.r.shape[-1]


def of_predictor(predictor, flow=False, sigmas=None):
    """The `Sampler` of a `predictor.Predictor` on additive or `flow` states; `sigmas` (N,) in place of its own levels."""
    order = epd.history_order(predictor.solver.student, predictor.solver.max_order)
    options = solvers.SolverOptions(afs=predictor.solver.afs, flow=flow, max_order=order)
    return Sampler(predictor.solver.student, predictor.sigmas if sigmas is None else sigmas, options, predictor.tables)


def of_solver(name, denoiser, num_steps, kind=None, rho=None, options=solvers.DEFAULTS):
    """The `Sampler` of a solver's name or alias on N = `num_steps` levels of `denoiser`.

    Args: `kind`, `rho`: as in `sigmas.schedule`; by default flowmatch for flow matching, discrete for models of discrete timesteps,
    else what the solver was published with. ValueError for what does not fit together.
    """
    name = solvers.ALIASES.get(name, name)
    solvers.check_order(name, options.max_order)
    if kind is None and denoiser.flow:
        kind = "flowmatch"
    elif kind is None and denoiser.table is not None:
        kind = "discrete"
    elif kind is None:
        kind, customary = CUSTOMARY.get(name, ("polynomial", None))
        rho = rho or customary
    return Sampler(name, denoisers.grid(denoiser, kind, num_steps, rho), options)


def cost(sampler, guided_pair=False):
    """The `epd.Cost` of one image; `guided_pair`: every network call has an unconditional half."""
    count = len(sampler.sigmas)
    if sampler.tables is not None:
        return epd.cost(count, sampler.points, sampler.options.afs, guided_pair)
    calls = solvers.network_calls(sampler.name, count, sampler.options)
    return epd.Cost(count - 1 + (sampler.name == "edm"), calls, calls, calls * (1 + guided_pair))


def describe(sampler, denoiser, calls, pairs, folder):
    """The plan as people read it."""
    levels = f"{len(sampler.sigmas)} noise levels from {sampler.sigmas[0].item():.6g} to {sampler.sigmas[-1].item():.6g}"
    points = f" with {sampler.points} points" if sampler.tables is not None else ""
    twice = f" ({calls.para_nfe_cfg} if a guided pair counts twice)" if pairs else ""
    return (f"model: {denoiser.family}, {denoiser.resolution} px\n"
            f"sampler: {sampler.name}, {levels}, {calls.intervals} intervals{points}\n"
            f"NFE: {calls.para_nfe} network calls one after the other{twice}, {calls.total_nfe} evaluations per image in all\n"
            f"output: {folder}")  # fmt: skip


def states(sampler, direction, x, split=None):
    """The state after every interval, (B, ...) like the start `x`; `split`: see `epd.step`, of predictors alone."""
    if sampler.tables is None:
        return solvers.find(sampler.name).run(direction, x, sampler.sigmas, sampler.options)
    options = sampler.options
    rows = epd.rows_of(sampler.tables.cast(x))  # once: a copy to the device waits for it
    return epd.solve(direction, x, sampler.sigmas, rows, options.max_order, options.afs, options.flow, split)


def start(sampler, denoiser, seeds, generator_device="cpu"):
    """(x (B, *shape) float32 at the first level, labels (B,) or None of a model without classes) of the images `seeds`.

    Each seed's generator draws its latent, then its label: neither depends on the other seeds.
    """
    sources = sample_seeds.generators(seeds, generator_device)
    x = sample_seeds.draw_latents(sources, denoiser.shape).to(denoiser.device)
    x = x if denoiser.flow else x * float(sampler.sigmas[0])
    return x, sample_seeds.draw_labels(sources, denoiser.classes) if denoiser.takes == "classes" else None


def guided_in_pairs(denoiser, guidance_type, scale):
    """Whether every network call has an unconditional half; see `denoisers.direction_for`."""
    return guidance_type == "cfg" and scale != 1 and not denoiser.guides_itself


def check_guidance(denoiser, kind, classifier, negative):
    """UserError for guidance of type `kind` that the model cannot have. `negative`: the prompt to guide away from, or None."""
    family = denoiser.family
    if kind == "cfg" and denoiser.takes is None:
        raise UserError(f"--guidance_type cfg needs a model with classes or prompts, this one ({family}) has none.")
    if kind == "cg" and (denoiser.table is None or denoiser.takes != "classes" or not classifier):
        raise UserError("--guidance_type cg needs a model of discrete timesteps and classes, and --classifier.")
    if kind in ("cfg", "uncond") and denoiser.takes == "classes":
        try:
            denoiser.condition(None, 1)
        except ValueError as error:
            raise UserError(f"--guidance_type {kind}: {error}") from None
    if not isinstance(negative, (str, type(None))):
        raise UserError(f"--backend_config: negative_prompt is {negative}, it must be one text.")
    if negative and denoiser.guides_itself:
        raise UserError(f"--negative_prompt '{negative}': {family} guides itself and knows no negative prompt.")


def precision_of(asked, stored, family, device):
    """(name of the network's precision, a warning or None): half precision on GPUs alone, but bf16 where it is asked for.

    Args: `asked`: a name or None; `stored`: the `torch_dtype` of a predictor's backend_config.
    """
    if device.type != "cpu":
        return asked or PRECISION_NAMES.get(stored, PRECISION.get(family, "fp32")), None
    if asked == "fp16":
        return "fp32", "fp16 needs a GPU: the network runs in float32 (--dtype bf16 works on CPUs)."
    return asked or "fp32", None


def family_of(predictor):
    """The family of models that a predictor is for, None where its file does not say."""
    return denoiser_sources.family_of(predictor.model.get("dataset"), predictor.model.get("backend"))


def resolution_of(predictor):
    """Side in pixels of the images that a predictor is for, or None.

    Published files of latent diffusion models state the side of the latents (LSUN) or a wrong number (Stable Diffusion).
    """
    return None if predictor.model.get("backend") == "ldm" else predictor.model.get("img_resolution")


def source_of(config):
    """The pipeline or network that a `backend_config` names, or None."""
    return config.get("model_name_or_path") or config.get("model_id")


def complete(wanted, predictor, force=False):
    """The `denoiser_sources.ModelOptions` `wanted`, what they leave open taken from the predictor; nothing if of another family.

    Args: `force`: a model that `wanted` names may be of any family; its own looks say which.
    """
    family, config = family_of(predictor), predictor.model.get("backend_config") or {}
    own = None if wanted.source and (force or family == "gmm") else family
    backend = wanted.backend or ("gmm" if wanted.gmm_file else own)
    if backend != family:
        return wanted._replace(backend=backend)
    local = os.environ.get("FLUX_MODEL_PATH") if family == "flux" else None
    return wanted._replace(
        dataset_name=wanted.dataset_name or predictor.model.get("dataset"), backend=backend,
        source=wanted.source or local or source_of(config),
        resolution=wanted.resolution or (resolution_of(predictor) if family in SIZED_FAMILIES else None),
        gmm_file=wanted.gmm_file or config.get("gmm_file"), revision=wanted.revision or config.get("revision"),
        variant=wanted.variant or config.get("variant"),
        round_timesteps=wanted.round_timesteps or bool(config.get("round_timesteps")),
        clip_denoised=config.get("clip_denoised") if wanted.clip_denoised is None else wanted.clip_denoised,
    )  # fmt: skip


def solver_conflicts(predictor, wanted):
    """Sentences about settings {num_steps, schedule_type, schedule_rho, afs, max_order} that a predictor has otherwise."""
    schedule, solver = predictor.document["schedule"], predictor.solver
    has = {"num_steps": solver.num_steps, "schedule_type": schedule["type"], "schedule_rho": schedule.get("rho"), "afs": solver.afs,
           "max_order": epd.history_order(solver.student, solver.max_order)}  # fmt: skip
    return [f"--{name} is {value}, the predictor {predictor.name} was made for {has[name]}"
            for name, value in wanted.items() if value is not None and value != has[name]]  # fmt: skip


def model_conflicts(predictor, wanted, guidance_type, guidance_rate):
    """Sentences about a model (`ModelOptions`) or guidance other than the predictor's, None for what was not given."""
    model = predictor.model
    pairs = [("--dataset_name", wanted.dataset_name, model.get("dataset")), ("--backend", wanted.backend, family_of(predictor)),
             ("--resolution", wanted.resolution, resolution_of(predictor)),
             ("--guidance_type", guidance_type, model.get("guidance_type") or "none"),
             ("--guidance_rate", guidance_rate, model.get("guidance_rate"))]  # fmt: skip
    return [f"{flag} is {now}, the predictor {predictor.name} is for {before}"
            for flag, now, before in pairs if None not in (now, before) and now != before]  # fmt: skip


def other_model(predictor, source):
    """[a sentence] where the model `source` is not the one that a predictor names, else []."""
    stored = source_of(predictor.model.get("backend_config") or {})
    if None in (stored, source) or os.path.abspath(source) == os.path.abspath(stored):
        return []
    return [f"the predictor {predictor.name} was made for {stored}: on another model its table is a guess."]


def denoiser_conflicts(predictor, denoiser):
    """Sentences about a loaded `Denoiser` that is not of the kind the predictor is for."""
    name, family, side = predictor.name, family_of(predictor), resolution_of(predictor)
    is_flow, said = predictor.document["schedule"]["type"] == "flowmatch", []
    if family not in (None, denoiser.family):
        said.append(f"the predictor {name} is for models of the family {family}, this one is of {denoiser.family}")
    if side not in (None, denoiser.resolution):
        said.append(f"the predictor {name} is for images of {side} pixels, this model draws {denoiser.resolution}")
    if is_flow != denoiser.flow:
        kinds = ("noise-level", "flow-matching")
        raise UserError(f"the predictor {name} is for a {kinds[is_flow]} model, this is a {kinds[denoiser.flow]} model.")
    return said
