"""The DiT / FPDM network and its pipeline as diffusers knows them: saved, loaded and sampled like any other model."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, DDPMScheduler, DiTPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

from brisk import dit, fpdm_options, gaussian
from brisk.checkpoint import write_atomically
from brisk.network_files import complete, save_network
from brisk.options import UserError
from brisk.sd_models import load_network

NO_CLASS = 1000  # what diffusers' DiTPipeline says however many classes there are


@dataclass
class FPDMOutput(BaseOutput):
    """What `FPDMTransformer2DModel` returns; see `dit.Output`."""

    sample: torch.Tensor
    state: torch.Tensor | None = None
    num_iters: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class FPDMTransformer2DModel(dit.DiT, ModelMixin, ConfigMixin):
    """`dit.DiT` with a config: what it is, and how it was trained and is to be sampled."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]

    @register_to_config
    def __init__(self, sample_size=32, image_size=256, patch_size=2, in_channels=4, out_channels=8, hidden_size=1152, num_layers=28,
                 num_attention_heads=16, mlp_ratio=4.0, num_classes=1000, class_dropout_prob=0.1, fixed_point=False,
                 pre_depth=1, post_depth=1, pre_post_timestep_conditioning=False, label_type="class", label_dim=None,
                 no_grad_iters=(0, 10), with_grad_iters=(1, 12), default_num_iters=None, prediction_type="epsilon",
                 zero_terminal_snr=False, reuse_solution=False):  # fmt: skip
        """`label_type`: class, vector (of `label_dim`) or none; `prediction_type`: epsilon, v_prediction or flow.

        The ranges of iterations are those of the training; `reuse_solution`: `enable_solution_reuse` from the start.
        """
        ModelMixin.__init__(self)
        dit.DiT.__init__(
            self, sample_size, patch_size, in_channels, out_channels, hidden_size, num_layers, num_attention_heads,
            mlp_ratio, num_classes, fixed_point, pre_depth, post_depth, pre_post_timestep_conditioning, label_dim,
        )  # fmt: skip
        self.gradient_checkpointing = False
        self.enable_solution_reuse(reuse_solution)

    @property
    def default_iterations(self):
        """Iterations where none are asked for: as many blocks as the plain DiT of this size has."""
        config = self.config
        return config.default_num_iters or max(config.num_layers - config.pre_depth - config.post_depth, 1)

    def forward(self, hidden_states, timestep, class_labels=None, num_iters=None, init_state=None, return_dict=True,
                solver=None):  # fmt: skip
        """Latents (B, C, h, h), a timestep (scalar, (1,) or (B,)) and labels (B,) -> `FPDMOutput`; see `dit.DiT.forward`."""
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(len(hidden_states))
        class_labels = self._labels(class_labels, hidden_states)
        keeps = self._reuses and not self.training
        if keeps and init_state is None:
            init_state = self._kept_state(hidden_states.shape, timestep)
        init_state = None if init_state is False else init_state
        output = dit.DiT.forward(self, hidden_states, timestep, class_labels, num_iters or self.default_iterations, init_state,
                                 self.gradient_checkpointing and self.training, solver)  # fmt: skip
        if keeps:
            self._kept = (output.state.detach(), hidden_states.shape, timestep[0])
        return FPDMOutput(*output) if return_dict else tuple(output)

    def enable_solution_reuse(self, enabled=True):
        """Start every forward pass in eval mode from the solution of the one before, for pipelines that pass no `init_state`.

        It starts afresh when the batch's shape changes or the timestep does not fall (which is read from the device in each
        call), and where `init_state` is False.
        """
        self._reuses, self._kept = enabled and self.config.fixed_point, None

    def _kept_state(self, shape, timestep):
        state, old_shape, old_timestep = self._kept or (None, None, None)
        return state if shape == old_shape and timestep[0] < old_timestep else None

    def _labels(self, labels, latents):
        """Those given, or none: 0 or zeros; `NO_CLASS` is no class for networks with fewer classes."""
        config = self.config
        if config.label_type == "vector":
            return latents.new_zeros(len(latents), config.label_dim) if labels is None else labels
        if labels is None:
            known = config.label_type == "none"
            return torch.full((len(latents),), 0 if known else config.num_classes, device=latents.device)
        return labels.masked_fill(labels == NO_CLASS, config.num_classes) if config.num_classes < NO_CLASS else labels

    def betas(self):
        """The betas (T,) this network was trained with, float64."""
        betas = gaussian.linear_betas()
        return gaussian.zero_terminal_snr(betas) if self.config.zero_terminal_snr else betas


def find_transformer(path, prefer_average=True):
    """The folder with the network in a run's or pipeline's folder, a checkpoint-N, or itself. UserError."""
    path = Path(path)
    names = ("transformer_ema" if prefer_average else "transformer_raw", "transformer")
    for folder in (path, *(path / name for name in names)):
        if (folder / "config.json").is_file():
            return folder
    checkpoints = sorted(path.glob("checkpoint-*"))
    hint = f"; it holds {', '.join(folder.name for folder in checkpoints)}" if checkpoints else ""
    raise UserError(f"--ckpt {path} holds no transformer folder and is no .pt file{hint}.")


def load_transformer(path, prefer_average=True):
    """The network of a folder (`find_transformer`) or of an official .pt file, in float32 and eval mode. UserError.

    Args: `prefer_average`: the weights' moving average where there is one.
    """
    if Path(path).suffix == ".pt":
        stored = read_pt(path)
        network = FPDMTransformer2DModel(**stored["config"])
        weights = stored["ema"] if prefer_average and "ema" in stored else stored["model"]
        load_weights(network, weights, path)
        return network.eval()
    folder = find_transformer(path, prefer_average)
    try:
        config = FPDMTransformer2DModel.load_config(folder)
        if config.get("_class_name") != FPDMTransformer2DModel.__name__:
            raise UserError(f"{folder} holds a {config.get('_class_name')}, not a network of train_fpdm.py.")
        return FPDMTransformer2DModel.from_pretrained(folder, dtype=torch.float32).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def load_weights(network, weights, where):
    """Load a state dict with the published names strictly; the position table and launchers' prefixes are ignored. UserError."""
    prefixes = ("module.", "_orig_mod.")
    weights = {_without(name, prefixes): value for name, value in weights.items()}
    weights.pop("pos_embed", None)  # fixed, and of another size where another image size was trained
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"the weights in {where} do not fit the network: {' '.join(str(error).split())[:400]}") from None


def _without(name, prefixes):
    for prefix in prefixes:
        name = name.replace(prefix, "")
    return name


def read_pt(path):
    """The content of an official checkpoint: "model", "ema", "opt", "train_steps", and "config" of the network. UserError.

    Nothing in the file is executed.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is no such file.") from None
    except Exception as error:  # zipfile's, pickle's and torch's own
        raise UserError(f"{path} cannot be read as a checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(stored, dict) or "model" not in stored or "args" not in stored:
        raise UserError(f"{path} is no checkpoint of a DiT or FPDM training: it needs model and args.")
    return {**stored, "config": config_of_args(stored["args"])}


def config_of_args(args):
    """The network's config for the `args` (a namespace or dict) of an official checkpoint; missing ones at their defaults."""
    from brisk import options

    parser = options.Parser("")
    fpdm_options.add_network_options(parser)
    values = vars(parser.parse_args([]))
    known = dict(args) if isinstance(args, dict) else vars(args)
    values |= {name: value for name, value in known.items() if name in values and value is not None}
    return fpdm_options.network_config(argparse.Namespace(**values))


def write_pt(path, network, ema, optimizer, args, step, total_limit=None):
    """Write an official checkpoint: model, ema, opt, args, train_steps.

    Args: `args` the options as a plain dict; `total_limit`: delete all others but the newest, so that this many are left.
    """
    path.parent.mkdir(exist_ok=True)
    table = {"pos_embed": network.pos_embed}
    states = {"model": {**network.state_dict(), **table}, "ema": {**ema.state_dict(), **table}}
    temporary = path.with_suffix(".tmp")
    torch.save({**states, "opt": optimizer.state_dict(), "args": args, "train_steps": step}, temporary)
    temporary.replace(path)
    others = sorted(file for file in path.parent.glob("*.pt") if file.stem.isdecimal() and file != path)
    for file in others[: max(len(others) + 1 - total_limit, 0)] if total_limit else []:
        file.unlink()


def load_vae(source, config, cache_dir=None):
    """The frozen float32 VAE of a folder or hub id, with the channels that the network's `config` needs. UserError."""
    from diffusers import AutoencoderKL

    vae = load_network(AutoencoderKL, source, "vae", cache_dir)
    if vae.config.latent_channels != config["in_channels"]:
        raise UserError(f"--vae {source} has {vae.config.latent_channels} channels, the network {config['in_channels']}.")
    return vae


def describe(network):
    """Lines that a run prints of its network: parameters, and multiply-accumulates of a call."""
    config, count = network.config, sum(p.numel() for p in network.parameters())
    plain = dit.forward_macs(config)
    if not config.fixed_point:
        return [f"DiT: {config.num_layers} blocks, {count:,} parameters, {plain / 1e9:,.4g} GMACs a call"]
    iterations = network.default_iterations
    own = dit.forward_macs(config, iterations)
    return [f"FPDM: {config.pre_depth} + {config.post_depth} blocks around a fixed-point layer, {count:,} parameters; "
            f"{own / 1e9:,.4g} GMACs a call with {iterations} iterations (the plain DiT: {plain / 1e9:,.4g})"]  # fmt: skip


CARD = """---
library_name: diffusers
tags: [{tag}]
---
# {name}

{description}

```python
{snippet}
```

{steps} optimizer steps of {batch} images, learning rate {lr}; every option is in `train_config.yaml`, versions and hardware in
`run_manifest.json`. `transformer` holds the average of the weights, `transformer_raw` the last ones.
"""
DESCRIPTIONS = {
    True: "A DiT whose inner blocks are one fixed-point layer (FPDM, arXiv 2401.08741). The number of its iterations is free at\n"
          "sampling time; starting each timestep from the last one's solution makes few of them enough.",
    False: "A diffusion transformer (DiT, arXiv 2212.09748), the plain baseline of FPDM.",
}  # fmt: skip
SNIPPETS = {
    True: """from brisk.fpdm_pipeline import FPDMPipeline

pipe = FPDMPipeline.from_pretrained("{name}")
image = pipe(class_labels=[0], num_inference_steps=20, guidance_scale={guidance}).images[0]""",
    False: """from brisk.fpdm import FPDMTransformer2DModel

transformer = FPDMTransformer2DModel.from_pretrained("{name}", subfolder="transformer")""",
}


def export(output, network, ema, vae, classes, card):
    """Write `transformer` (the average), `transformer_raw`, the scheduler, with a VAE a complete pipeline, and the model card.

    diffusers has no pipeline for a flow network: of that only the networks are written.

    Args: `classes` their names in order or None; `card` values of `CARD`. UserError (exit code 1).
    """
    is_fixed_point, is_flow = network.config.fixed_point, network.config.prediction_type == "flow"
    card |= {"tag": "fpdm" if is_fixed_point else "dit", "description": DESCRIPTIONS[is_fixed_point],
             "snippet": SNIPPETS[vae is not None and not is_flow].format(**card)}  # fmt: skip
    with complete(output):
        save_network(network, output / "transformer_raw", network.state_dict())
        save_network(ema.network, output / "transformer", ema.state_dict())
        if is_flow:
            if vae is not None:
                vae.save_pretrained(output / "vae")
        elif vae is None:
            export_scheduler(network.config).save_pretrained(output / "scheduler")
        else:
            save_pipeline(output, ema.network, vae, dict(enumerate(classes)) if classes else None)
        write_atomically(output / "README.md", CARD.format(**card))


def export_scheduler(config, sees_variance=True):
    """The `DDPMScheduler` of a network's config. UserError for flow networks, which no pipeline for DiT can sample.

    It steps as `gaussian.ddpm_step` does. Args: `sees_variance`: False for stock `DiTPipeline`, which hides a learned variance
    from its scheduler.
    """
    learned = "learned_range" if sees_variance else "fixed_small"
    variance_type = learned if config.out_channels > config.in_channels else "fixed_large"
    if config.prediction_type == "flow":
        raise UserError("a flow network has no scheduler in diffusers' DiTPipeline; sample it with sample_fpdm.py.")
    return DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type=variance_type, clip_sample=False,
        prediction_type=config.prediction_type, timestep_spacing="linspace", rescale_betas_zero_snr=config.zero_terminal_snr,
    )  # fmt: skip


def save_pipeline(folder, transformer, vae, id2label=None):
    """Write a pipeline folder that `DiTPipeline`, `DiffusionPipeline` and `FPDMPipeline` load.

    Args: `vae`: None leaves it out, then only `FPDMPipeline` samples, and only latents; `id2label`: {class: names}.
    """
    stock_pipeline(transformer, vae, export_scheduler(transformer.config, sees_variance=False), id2label).save_pretrained(folder)


def stock_pipeline(transformer, vae, scheduler, id2label=None):
    """A `DiTPipeline` that knows its labels when it is loaded again."""
    pipeline = DiTPipeline(transformer, vae, scheduler, id2label)
    if id2label:
        pipeline.register_to_config(id2label={str(label): name for label, name in id2label.items()})
    return pipeline
