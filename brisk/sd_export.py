"""What a Stable Diffusion run writes: pipelines in memory and on disk, sample grids, LoRA files, the model card."""

import contextlib
import csv
import io
import itertools
import json
from pathlib import Path

import torch

from brisk import runlog
from brisk.checkpoint import write_atomically
from brisk.network_files import complete, other_networks, save_network
from brisk.optim import swapped
from brisk.sd_models import load_lora_state, lora_state, plain_config

CARD = """---
{base_model}library_name: diffusers
tags: [text-to-image, diffusion-distillation, slam, {kind}]
---
# {name}

`{teacher}` distilled to few sampling steps by SLAM (sub-path linear approximation, arXiv 2404.13903).
Always pass `guidance_scale=1`: guidance (w = {w}) is part of the weights, and other values ask the network for
something else than images.

```python
{snippet}
image = pipe({prompt}, num_inference_steps=4, guidance_scale=1).images[0]
```

{steps} optimizer steps of {batch} images at {resolution} px, N = {n}, {loss} loss, learning rate {lr}; every option is in
`train_config.yaml`, versions and hardware in `run_manifest.json`.
"""
SNIPPETS = {
    "full": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")""",
    "lora": """from diffusers import DiffusionPipeline, LCMScheduler

pipe = DiffusionPipeline.from_pretrained("{teacher}")
pipe.scheduler = LCMScheduler.from_pretrained("{name}", subfolder="scheduler")
pipe.load_lora_weights("{name}")""",
}  # fmt: skip


STUDENT_CARD = """---
{base_model}library_name: diffusers
tags: [text-to-image, diffusion-distillation, bk-sdm, {preset}]
---
# {name}

The U-Net of `{teacher}` with blocks removed ({preset}) and distilled from it by BK-SDM (arXiv 2305.15798):
{parameters:,} parameters, {change:+.1%}. Same sampler, same number of steps, same guidance as the teacher.

```python
{snippet}
image = pipe({prompt}).images[0]
```

{steps} optimizer steps of {batch} images at {resolution} px, learning rate {lr}; every option is in `train_config.yaml`,
versions and hardware in `run_manifest.json`, sizes in `bksdm_report.json`.
"""
STUDENT_SNIPPETS = {
    "pipeline": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")""",
    "unet": """from diffusers import DiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{name}", subfolder="unet")
pipe = DiffusionPipeline.from_pretrained("{teacher}", unet=unet)""",
}  # fmt: skip


def own_scheduler(scheduler_config, prediction_type):
    """The scheduler that a pipeline comes with."""
    import diffusers

    cls = getattr(diffusers, scheduler_config.get("_class_name", ""), diffusers.DDIMScheduler)
    return cls.from_config(scheduler_config, prediction_type=prediction_type)


def lcm_scheduler(scheduler_config, prediction_type, num_ddim_timesteps, timestep_scaling):
    """The LCMScheduler that the distilled model is to be sampled with."""
    from diffusers import LCMScheduler

    return LCMScheduler.from_config(
        scheduler_config, prediction_type=prediction_type, original_inference_steps=num_ddim_timesteps,
        timestep_scaling=timestep_scaling,
    )  # fmt: skip


def build_pipeline(parts, unet, scheduler, with_extras=True):
    """A stock diffusers pipeline from modules in memory; without extras there is no safety checker."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    names = ("text_encoder", "text_encoder_2")[: len(parts.text_encoders)]
    components = dict(zip(names, parts.text_encoders, strict=True))
    components |= dict(zip(("tokenizer", "tokenizer_2"), parts.tokenizers, strict=False))
    components |= {"vae": parts.vae, "unet": unet, "scheduler": scheduler}
    extras = parts.extras if with_extras else {}
    if parts.is_xl:
        pipeline = StableDiffusionXLPipeline(
            **components, **extras, force_zeros_for_empty_prompt=parts.zeros_for_empty, add_watermarker=False
        )
    else:
        extras = {"safety_checker": None, "feature_extractor": None, **extras}
        pipeline = StableDiffusionPipeline(
            **components, **extras, requires_safety_checker=extras["safety_checker"] is not None
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def sample_images(pipeline, prompt, number, steps, seed, resolution, autocast, guidance_scale=1.0):
    """`number` PIL images for a prompt; the U-Net in eval mode for the call, the VAE in its own precision outside autocast."""
    was_training = pipeline.unet.training
    pipeline.unet.eval()
    generator = torch.Generator(pipeline.unet.device).manual_seed(seed)
    try:
        with autocast:
            latents = pipeline(
                prompt, num_images_per_prompt=number, num_inference_steps=steps, guidance_scale=guidance_scale,
                generator=generator, height=resolution, width=resolution, output_type="latent",
            ).images  # fmt: skip
        vae = pipeline.vae
        decoded = [vae.decode(latent[None].to(vae.dtype) / vae.config.scaling_factor).sample for latent in latents]
    finally:
        pipeline.unet.train(was_training)
    return pipeline.image_processor.postprocess(torch.cat(decoded).float(), output_type="pil")


@torch.no_grad()
def validate(accelerator, parts, networks, scheduler, prompts, step_counts, guidance_scale, per_prompt, resolution, folder,
             step, seed):  # fmt: skip
    """Sample each of `networks` (name -> U-Net) at each number of steps.

    Writes PNG grids (a row per prompt) into `folder` and sends the images to the trackers. Each prompt starts from the
    noise of `seed`, whatever the others are. The modules are those in memory: nothing is loaded again.
    """
    from diffusers.utils import make_image_grid

    encoders = [parts.vae, *parts.text_encoders]
    homes = [module.device for module in encoders]
    for module in encoders:
        module.to(accelerator.device)
    folder.mkdir(parents=True, exist_ok=True)
    captions = [prompt for prompt in prompts for _ in range(per_prompt)]
    for (name, network), count in itertools.product(networks.items(), step_counts):
        pipeline = build_pipeline(parts, network, scheduler, with_extras=False)
        images = [image for prompt in prompts for image in sample_images(
            pipeline, prompt, per_prompt, count, seed, resolution, accelerator.autocast(), guidance_scale)]  # fmt: skip
        make_image_grid(images, rows=len(prompts), cols=per_prompt).save(folder / f"{name}-{count}-steps.png")
        runlog.log_images(accelerator, f"validation/{name}-{count}-steps", images, captions, step)
    for module, home in zip(encoders, homes, strict=True):
        module.to(home)
    torch.cuda.empty_cache()  # sampling's buffers; does nothing without CUDA


def save_lora(folder, unet, config, is_xl):
    """Write `pytorch_lora_weights.safetensors` that `load_lora_weights` reads back exactly, alpha included.

    The raw PEFT names are kept: the converted ones lose the attention adapters when convolutions are adapted too.
    """
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    cls = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    cls.save_lora_weights(folder, unet_lora_layers=lora_state(unet), unet_lora_adapter_metadata=plain)


def save_adapters(folder, accelerator, unet, lora_master):
    """Write the LoRA adapters of a checkpoint (called on every rank), and their average where there is one."""
    from safetensors.torch import save_file

    if not accelerator.is_main_process:
        return
    (folder / "unet_lora").mkdir(parents=True, exist_ok=True)
    save_file(lora_state(accelerator.unwrap_model(unet)), folder / "unet_lora/adapter_model.safetensors")
    if lora_master:
        save_file(
            {str(number): tensor.contiguous() for number, tensor in enumerate(lora_master)},
            folder / "unet_lora/target.safetensors",
        )


def load_adapters(folder, accelerator, unet, lora_master):
    """Read back what `save_adapters` wrote. Raises UserError where it is of other adapters than this run's."""
    from safetensors.torch import load_file

    with other_networks(folder):
        adapters = load_file(folder / "unet_lora/adapter_model.safetensors")
        stored = load_file(folder / "unet_lora/target.safetensors") if lora_master else {}
        load_lora_state(accelerator.unwrap_model(unet), adapters)
        for number, tensor in enumerate(lora_master or []):
            tensor.copy_(stored[str(number)])


def export(output, parts, student, weights, ema, lora_config, lora_master, scheduler, card):
    """Write what stock diffusers loads: a complete pipeline and `unet_target`, or LoRA weights and their scheduler.

    Args: `weights` of the online U-Net; `ema` and `lora_config`: one of them is None; `card` the values of `CARD`.
    The network of `ema` holds the online weights afterwards. Raises UserError (exit code 1).
    """
    kind = "lora" if lora_config else "full"
    card = card | {"kind": kind, "snippet": SNIPPETS[kind].format(**card)}
    with complete(output):
        if lora_config:
            save_lora(output, student, lora_config, parts.is_xl)
            if lora_master:
                with swapped([weight for weight in student.parameters() if weight.requires_grad], lora_master):
                    save_lora(output / "target", student, lora_config, parts.is_xl)
            scheduler.save_pretrained(output / "scheduler")
        else:
            save_network(ema.network, output / "unet_target", ema.state_dict())
            ema.network.float().load_state_dict(weights)
            build_pipeline(parts, ema.network, scheduler).save_pretrained(output)
        write_card(output, CARD, card)


def export_student(output, parts, student, weights, ema, scheduler, card):
    """Write `unet` (the average where there is one, `unet_raw` beside it) or, with `scheduler`, a complete pipeline.

    Args: `weights` of the trained U-Net; `card` the values of `STUDENT_CARD`. Raises UserError (exit code 1).
    """
    final = ema.state_dict() if ema else weights
    teacher_size, size = card["sizes"]
    kind = "pipeline" if scheduler else "unet"
    card |= {"snippet": STUDENT_SNIPPETS[kind].format(**card), "parameters": size.parameters,
             "change": size.parameters / teacher_size.parameters - 1}  # fmt: skip
    with torch.device("meta"):  # FSDP left the trained one with shards, and with a class of its own
        network = type(parts.unet).from_config(plain_config(student))
    with complete(output):
        if ema:
            save_network(network, output / "unet_raw", weights)
        if scheduler:
            network.load_state_dict(final, assign=True)
            build_pipeline(parts, network, scheduler).save_pretrained(output)
        else:
            save_network(network, output / "unet", final)
        write_card(output, STUDENT_CARD, card)


def write_loss_table(output, epoch_steps, weights, say):
    """log_loss.csv with the columns of BK-SDM's official script, from metrics.jsonl; `say` takes why there is none.

    Args: `weights` {flag of a weight: its loss}.
    """
    names = ("epoch", "step", "global_step", "loss_total", *weights.values(), "lr",
             *(name.replace("lambda", "lamb") for name in weights))  # fmt: skip
    logged = ("loss", *weights.values(), "lr", *(f"weight/{term}" for term in weights.values()))
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(names)
    try:
        for line in (output / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut short by a full disk
                row = json.loads(line)
                writer.writerow([*divmod(row["step"] - 1, epoch_steps), row["step"], *map(row.get, logged)])
        write_atomically(output / "log_loss.csv", table.getvalue())
    except OSError as error:
        say(f"{output / 'log_loss.csv'} could not be written: {error.strerror}.")


def write_card(output, template, values):
    """The model card: `template` with `values`, of which `teacher` and `prompt` are written as they must be."""
    # the hub takes ids only, and a local path is nobody's business
    base_model = "" if Path(values["teacher"]).is_dir() else f"base_model: {values['teacher']}\n"
    prompt = json.dumps(values["prompt"], ensure_ascii=False)
    write_atomically(output / "README.md", template.format(**values | {"prompt": prompt}, base_model=base_model))
