"""Networks as samplers see them: a `Denoiser` per model, its conditions and guidance. Stock pipelines: `pipeline_denoisers`.

Letters: B batch, R rows of one network call (B, or B K with K points per sample), sigma (B,) or (R,).
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from brisk import denoiser_maps, edm_nets, mixture, safe_pickle, sigmas
from brisk.options import UserError
from brisk.sigmas import NoiseMap

EDM_RANGE = (0.002, 80.0)  # of sigma, what the published EDM networks are sampled in


@dataclass
class Denoiser:
    """A frozen network with what a sampler must know of it. All tensors are on the device of `network`."""

    family: str  # edm, adm, cm, ldm, sd, dit, pixart, sd3, flux or gmm: `model.backend` of predictor files
    network: torch.nn.Module | None  # None of gmm
    direction: Callable  # (x (R, ...), sigma (R,), condition) -> d like x: one network call, without guidance
    condition: Callable  # (given, B) -> nest of tensors with B rows, or None; given: labels (B,), B prompts, None: unconditional
    decode: Callable  # x0 (B, ...) -> images (B, 3, H, W), about [-1, 1]
    shape: tuple  # of a sample's state
    resolution: int  # of the images, in pixels
    sigma_min: float  # the range it was trained on
    sigma_max: float
    flow: bool = False  # flow-matching states, else additive ones
    shift: float | None = 3.0  # of a flow model's levels: static,
    mu: float | None = None  # or by resolution
    table: NoiseMap | None = None  # of a model of discrete timesteps
    takes: str | None = None  # what it is conditioned on: classes, prompts, or None
    classes: int = 0  # how many
    guides_itself: bool = False  # guidance has no second half: its scale is the entry "guidance" of the condition, if it has one
    device: torch.device = torch.device("cpu")


def grid(denoiser, kind, num_steps, rho=None, sigma_min=None, sigma_max=None):
    """The N = `num_steps` noise levels of schedule `kind` for this model, (N,) float64 decreasing; see `sigmas.schedule`.

    Args: `sigma_min`, `sigma_max`: None for the model's own. Raises ValueError for a schedule that does not fit the model.
    """
    if kind in sigmas.SCHEDULES and denoiser.flow != (kind == "flowmatch"):
        takes = "flowmatch" if denoiser.flow else ", ".join(name for name in sigmas.SCHEDULES if name != "flowmatch")
        raise ValueError(f"schedule_type is '{kind}'; a {'flow-matching' if denoiser.flow else 'diffusion'} model takes {takes}.")
    table = denoiser.table and NoiseMap(denoiser.table.log_signal.cpu().double())
    if kind != "discrete":
        sigma_min, sigma_max = sigma_min or denoiser.sigma_min, sigma_max or denoiser.sigma_max
    return sigmas.schedule(kind, num_steps, sigma_min, sigma_max, rho, table, denoiser.shift, denoiser.mu)


def make_direction(denoiser, condition=None, unconditional=None, scale=1.0, classifier=None):
    """The closure direction(x, sigma, rows=None) that solvers call; `rows` (R,) names each row's sample, None: row i is sample i.

    Args: `condition`: what `denoiser.condition` gave; `unconditional`: the same without label or prompt, for classifier-free
    guidance by `scale`, both halves [unconditional; condition] in one network call, skipped at scale 1; `classifier`: (network
    input, network time, rows) -> ln p (R,) of each row's class, for classifier guidance by `scale` in place of the other.
    """

    def plain(x, sigma, rows=None):
        return denoiser.direction(x, sigma, denoiser_maps.take_rows(condition, rows))

    def guided(x, sigma, rows=None):
        both = _join(*(denoiser_maps.take_rows(part, rows) for part in (unconditional, condition)))
        found = denoiser.direction(torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        return denoiser_maps.guide(*found.chunk(2), scale)

    def classified(x, sigma, rows=None):
        gradient = _classifier_gradient(denoiser, classifier, x, sigma, rows)
        return denoiser_maps.classifier_guide(plain(x, sigma, rows), gradient, sigma, scale)

    if classifier is not None:
        return classified
    return plain if unconditional is None or scale == 1 or denoiser.guides_itself else guided


def direction_for(denoiser, given, batch, guidance_type=None, scale=1.0, negative=None, classifier=None):
    """`make_direction` of B = `batch` samples with labels (B,) or B prompts `given`, None for none.

    Args: `guidance_type`: None, uncond (`given` is set aside), cfg or cg; `negative`: B prompts in place of the empty one;
    `classifier`: of cg, (network input, network time) -> logits (R, classes). Raises ValueError for guidance that the model
    cannot have.
    """
    if guidance_type == "cg":
        if denoiser.table is None or classifier is None or not isinstance(given, torch.Tensor):
            raise ValueError("guidance cg needs a model of discrete timesteps, a classifier and class labels.")

        def of_rows(inputs, timestep, rows):
            labels = denoiser_maps.take_rows(given.to(inputs.device), rows)
            return classifier(inputs, timestep).log_softmax(1).gather(1, labels[:, None])[:, 0]

        return make_direction(denoiser, denoiser.condition(given, batch), None, scale, of_rows)
    condition = denoiser.condition(None if guidance_type == "uncond" else given, batch)
    if denoiser.guides_itself and guidance_type == "cfg" and "guidance" in condition:
        condition = condition | {"guidance": torch.full_like(condition["guidance"], scale)}
    if guidance_type != "cfg" or scale == 1 or denoiser.guides_itself:
        return make_direction(denoiser, condition)
    if denoiser.takes is None:
        raise ValueError("guidance cfg needs a model with classes or prompts.")
    return make_direction(denoiser, condition, denoiser.condition(negative, batch), scale)


def _join(first, second):
    """Two nests of the same shape, each pair of tensors concatenated."""
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat([first, second])
    if isinstance(first, dict):
        return {name: _join(value, second[name]) for name, value in first.items()}
    return type(first)(_join(*pair) for pair in zip(first, second, strict=True))


def _classifier_gradient(denoiser, classifier, x, sigma, rows):
    """Gradient of ln p(y | network input, time) with respect to the network input, like x."""
    keeps_graph = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        inputs = denoiser_maps.vp_input(x, sigma)
        inputs = inputs if keeps_graph else inputs.detach().requires_grad_()
        logarithm = classifier(inputs, denoiser_maps.vp_timestep(denoiser.table, sigma), rows)
        return torch.autograd.grad(logarithm.sum(), inputs, create_graph=keeps_graph)[0]


def frozen(network, dtype=None):
    """`network` without gradients of its weights, in evaluation mode, cast to `dtype` if given."""
    network.requires_grad_(False).eval()
    return network if dtype in (None, network.dtype) else network.to(dtype)


def image_side(resolution, own, multiple):
    """`resolution` in pixels, None for the model's `own`. UserError unless it is a multiple of `multiple`."""
    if resolution and resolution % multiple:
        raise UserError(f"--resolution {resolution} must be a multiple of {multiple} for this model.")
    return resolution or own


def flow_range(shift):
    """(sigma_min, sigma_max) of a flow model trained on 1000 timesteps whose levels are shifted by q: q s / (1 + (q - 1) s)."""
    return shift / (1000 + shift - 1), 1.0


def vp_model(network, scheduler, call, clip=False, rounded=False):
    """(direction, `NoiseMap`) of a network trained on the discrete timesteps of the stock `scheduler`.

    Args: `call(inputs, timestep, condition)` -> raw output (R, C, ...); `clip`: keep D in [-1, 1]; `rounded`: tell the network
    the nearest trained timestep. Raises UserError for a scheduler without such timesteps.
    """
    from diffusers import DDPMScheduler

    if "beta_schedule" not in scheduler.config:
        raise UserError(f"the pipeline's {type(scheduler).__name__} has no betas, which its network needs.")
    plain = DDPMScheduler.from_config(scheduler.config)
    table = sigmas.noise_map((1 - plain.betas.double()).cumprod(0)).to(network.device)
    kind, dtype = plain.config.prediction_type, network.dtype  # diffusers looks through all modules for it: not in every call

    def direction(x, sigma, condition):
        timestep = denoiser_maps.vp_timestep(table, sigma, rounded)
        inputs = denoiser_maps.vp_input(x, sigma).to(dtype)
        output = call(inputs, timestep.long() if rounded else timestep, condition)
        return denoiser_maps.vp_direction(output, x, sigma, kind, clip)

    return direction, table


def latent_decoder(vae):
    """`Denoiser.decode` of a VAE, which is put into float32 (SDXL's overflows in half precision)."""
    frozen(vae, torch.float32)
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))

    def decode(latents):
        latents = latents.float() / config.scaling_factor + (getattr(config, "shift_factor", None) or 0)
        if mean and std:
            mean_row, std_row = (latents.new_tensor(values)[:, None, None] for values in (mean, std))
            latents = latents * std_row + mean_row
        return vae.decode(latents).sample

    return decode


def one_hot_or_none(labels, classes, device):
    """Labels (B,) as one-hot rows (B, classes) float32, zeros for None; None for a network without classes."""
    if not classes:
        return None
    return torch.nn.functional.one_hot(labels.to(device), classes).float()


def edm(network, config, device="cpu", dtype=torch.float32):
    """The `Denoiser` of an `edm_nets.EDMPrecond`, in `dtype`. Args: `config`: what it was made with."""
    network = network.to(device).requires_grad_(False).eval()
    for name, part in network.model.named_children():
        if name != "map_noise":  # its frequencies are large, half precision would turn their angles
            part.to(dtype)
    side, classes = network.img_resolution, network.label_dim

    def condition(labels, batch):
        if not classes:
            return None
        return torch.zeros(batch, classes, device=device) if labels is None else one_hot_or_none(labels, classes, device)

    def direction(x, sigma, labels):
        return network.direction(x, sigma, labels)

    low, high = EDM_RANGE
    low, high = max(low, config.get("sigma_min") or 0.0), min(high, config.get("sigma_max") or math.inf)
    return Denoiser("edm", network, direction, condition, lambda x0: x0, (network.img_channels, side, side), side, low, high,
                    takes="classes" if classes else None, classes=classes, device=torch.device(device))  # fmt: skip


def load_edm(path, device="cpu", dtype=torch.float32):
    """The `Denoiser` of a published EDM network: its .pkl, of which nothing is executed, or a folder with config.json and
    model.safetensors. UserError."""
    path = Path(path)
    if path.is_dir():
        from safetensors.torch import load_file

        try:
            config, weights = json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors")
        except Exception as error:  # safetensors raises its own
            raise UserError(f"{path} holds no EDM network: {' '.join(str(error).split())[:200]}.") from None
    elif path.is_file():
        config, weights = safe_pickle.read_network(path)
    else:
        raise UserError(f"{path} is neither the .pkl of an EDM network nor a folder with its config.json and model.safetensors.")
    try:
        network = edm_nets.make_network(config)
        network.load_state_dict(weights)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return edm(network, config, device, dtype)


def load_mixture(path, device="cpu", dtype=torch.float64):
    """The `Denoiser` of a mixture of Gaussians: a JSON file with shape, means, stds, weights, perhaps class_weights and flow.

    FILE:NAME picks the mixture of that name from a file with a mapping "world" of several, FILE alone the first. UserError.
    """
    file, _, name = str(path).partition(":")
    try:
        content = json.loads(Path(file).read_text())
        worlds = content.get("world") or {"": content}
        content = worlds[name or next(iter(worlds))]
        lists = (content[key] for key in ("means", "stds", "weights"))
        world = mixture.from_lists(*lists, content.get("class_weights"), dtype, device)
        shape, flow = tuple(content["shape"]), bool(content.get("flow"))
        if math.prod(shape) != world.means.shape[1]:
            raise ValueError(f"shape {list(shape)} has not the {world.means.shape[1]} values of a mean")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"--gmm_file {path} cannot be read as a mixture of Gaussians: {reason}.") from None
    classes = 0 if world.class_weights is None else len(world.class_weights)

    def condition(labels, batch):
        """Per row the weights of the components."""
        if not classes or labels is None:
            return world.weights.expand(batch, -1)
        return world.class_weights[labels.to(device)]

    def direction(x, sigma, weights):
        own = world._replace(weights=weights if weights is not None else world.weights)
        return mixture.direction(own, x.to(dtype), sigma.to(dtype), flow=flow).to(x.dtype)

    def decode(x0):
        """Three-channel pictures as they are; anything else as a grey picture of its values."""
        flat = x0.reshape(len(x0), 1, -1, x0.shape[-1]) if x0.ndim != 4 or x0.shape[1] != 3 else x0
        return flat.expand(-1, 3, -1, -1)

    low, high = EDM_RANGE
    return Denoiser("gmm", None, direction, condition, decode, shape, shape[-1], *((1e-3, 1.0) if flow else (low, high)), flow=flow,
                    takes="classes" if classes else None, classes=classes, device=torch.device(device))  # fmt: skip
