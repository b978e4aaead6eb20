"""What a distillation run of EPD-Solver leaves behind: its folder, tables in checkpoints, predictor files, the card.

Letters: N noise levels, K points per interval, S = N - 1 intervals.
"""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from brisk import predictor, seeding
from brisk.checkpoint import write_atomically
from brisk.options import UserError, redact

TABLES_FILE = "tables.safetensors"  # of a checkpoint
RAW_LIMIT = 30.0  # of raw positions in files: beyond it their sigmoid is 0 or 1, which no predictor may hold
SCHEDULE_NAMES = {"polynomial": "poly{:g}", "logsnr": "logsnr", "time_uniform": "uni{:g}", "discrete": "discrete",
                  "flowmatch": "flow"}  # fmt: skip
DISTILLED_FOR = ("num_steps", "num_points", "sampler_stu", "max_order", "afs", "fcn", "scale_dir", "scale_time", "schedule_type",
                 "schedule_rho")  # fmt: skip


def run_name(dataset, num_steps, para_nfe, student, teacher, inserted, schedule, afs=False, desc=None):
    """What a run is called after its number: <dataset>-<N>-<NFE>-<student>-<teacher>-<M>-<schedule>[-afs][-desc].

    Args: `dataset`: a name or path; `para_nfe` counts twice for ms_coco, as published; `schedule`: (type, rho).
    """
    nfe = 2 * para_nfe if dataset == "ms_coco" else para_nfe
    parts = [Path(dataset).name, num_steps, nfe, student, teacher, inserted, SCHEDULE_NAMES[schedule[0]].format(schedule[1])]
    return "-".join(map(str, [*parts, *(["afs"] if afs else []), *([desc] if desc else [])]))


def choose_folder(parent, name, resume):
    """The run's folder below `parent`: of the newest run called `name` with checkpoints if `resume`, else a new number."""
    numbers = {int(found[1]): path for path in Path(parent).glob("*") if (found := re.match(r"(\d{5})-", path.name))}
    same = [number for number, path in numbers.items() if path.name[6:] == name and any(path.glob("checkpoint-*"))]
    if resume and same:
        return numbers[max(same)]
    return Path(parent) / f"{max(numbers, default=0) + 1:05d}-{name}"


def claim_folder(folder):
    """Make the run's folder, under the next free number if another run has taken it meanwhile; its path."""
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = choose_folder(folder.parent, folder.name[6:], False)
        except OSError as error:
            raise UserError(f"--output_dir {folder.parent} cannot be written: {error.strerror}.") from None


def draw(count, denoiser, prompts, *key):
    """Of `count` samples: noise (count, *shape) float32, and what they are conditioned on: labels (count,), prompts, or None.

    Args: `prompts`: a list to draw from, of models that take them; `key`: see `seeding.generator`.
    """
    device = denoiser.device
    noise = torch.randn(count, *denoiser.shape, generator=seeding.generator(*key, "noise", device=device), device=device)
    if denoiser.takes == "classes":
        return noise, torch.randint(denoiser.classes, (count,), generator=seeding.generator(*key, "labels"))
    if prompts:
        drawn = torch.randint(len(prompts), (count,), generator=seeding.generator(*key, "prompts"))
        return noise, [prompts[number] for number in drawn.tolist()]
    return noise, None


def draw_batches(batch, micro_batch, denoiser, prompts, seed, number, rows):
    """Yield the rows [first, end) of each batch from `number` on, as a list of micro-batches of `draw`.

    Every process draws the whole batch, so that it does not depend on how many share it.
    """
    while True:
        noise, given = draw(batch, denoiser, prompts, seed, number)
        starts = range(*rows, micro_batch)
        yield [(noise[at : at + micro_batch], None if given is None else given[at : at + micro_batch]) for at in starts]
        number += 1


def check_same_student(options, stored, where):
    """UserError naming the first flag in which a run and the checkpoint `where` that it goes on from have another student."""
    for name in DISTILLED_FOR:
        if options[name] != stored.get(name):
            raise UserError(f"--{name} is {options[name]}, the tables in {where} were trained with {stored.get(name)}.")


def save_tables(folder, accelerator, raw, optimizer, others):
    """Write raw tables, Adam's moments of them and `others` ({name: tables}) into a checkpoint, from the main process."""
    if not accelerator.is_main_process:
        return
    named = {"raw": raw, **others}
    tensors = {f"{name}.{field}": table for name, tables in named.items() for field, table in tables._asdict().items()}
    for field, table in zip(raw._fields, raw, strict=True):
        tensors |= {f"adam.{field}.{key}": value for key, value in optimizer.state[table].items()}
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, folder / TABLES_FILE)


def load_tables(folder, accelerator, raw, optimizer, others):
    """Read what `save_tables` wrote, in place."""
    stored = load_file(folder / TABLES_FILE)
    for name, tables in {"raw": raw, **others}.items():
        for field, table in zip(raw._fields, tables, strict=True):
            table.data.copy_(stored[f"{name}.{field}"])
    for field, table in zip(raw._fields, raw, strict=True):
        kept = {key: stored[f"adam.{field}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        optimizer.state[table] = {key: value if key == "step" else value.to(table.device) for key, value in kept.items()}


def add_up(accelerator, losses, found):
    """Losses (a list) and gradients (`epd.Tables`) of this process's rows, added up over the processes."""
    flat = torch.cat([torch.stack(losses), torch.stack(found).flatten()])
    flat = accelerator.reduce(flat, "sum")
    return list(flat[: len(losses)]), type(found)(*flat[len(losses) :].view(len(found), *found[0].shape))


def flat_rows(tables):
    """{"table/<name>/<interval>.<point>": value} of effective tables, for the log."""
    return {f"table/{name}/{interval}.{point}": value for name, table in tables._asdict().items()
            for interval, row in enumerate(table.tolist()) for point, value in enumerate(row)}  # fmt: skip


def load_feature(path, denoiser):
    """The features x (B, ...) -> (B, F) of the last interval's objective (arXiv 2507.14797, section 3): those that the
    TorchScript network in `path` gives of images clip(127.5 x + 128, 0, 255), decoded first. UserError.

    A TorchScript archive is run by torch's own interpreter, not by Python; still, load only files you trust. A network whose
    forward takes `return_features` (the 2015 Inception as published for FID) is asked for them.
    """
    try:
        network = torch.jit.load(path, map_location=denoiser.device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--feature_model {path} cannot be read as TorchScript: {str(error).split(chr(10))[0][:200]}.") from None
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    named = "return_features" in [argument.name for argument in network.forward.schema.arguments]

    def feature(x):
        images = (127.5 * denoiser.decode(x).float() + 128).clamp(0, 255)
        return (network(images, return_features=True) if named else network(images)).flatten(1)

    try:
        feature(torch.zeros(1, *denoiser.shape, device=denoiser.device))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise UserError(f"--feature_model {path} does not take images of {denoiser.resolution} pixels: {reason}.") from None
    return feature


def from_anywhere(source):
    """A local folder or file (FILE:NAME too) by its whole path, without secrets; a hub id or None as it is."""
    if source is None:
        return None
    file, colon, name = (source, "", "") if Path(source).exists() else source.partition(":")
    return redact(os.path.abspath(file) + colon + name if Path(file).exists() else source)


def make_predictor(name, args, denoiser, levels, raw, training):
    """The `predictor.Predictor` `name` of raw tables (S, K) trained with the flags `args` on N noise `levels`. UserError.

    Args: `training`: what its section of that name says.
    """
    order = None if args.sampler_stu == "epd" else args.max_order or 3
    solver = predictor.Solver(args.sampler_stu, args.num_steps, args.num_points, args.afs, order, args.fcn)
    schedule = {"type": args.schedule_type, "rho": args.schedule_rho, "sigma_min": levels[-1],
                "sigma_max": levels[0], "sigmas": levels}  # fmt: skip
    if denoiser.flow:
        schedule["flow"] = {"shift": denoiser.shift, "mu": denoiser.mu}
    source, mixture = map(from_anywhere, (args.pretrained_model_name_or_path, args.gmm_file))
    config = {"model_name_or_path": source, "revision": args.revision, "variant": args.variant,
              "gmm_file": mixture, "resolution": denoiser.resolution, "round_timesteps": args.round_timesteps or None,
              "clip_denoised": args.clip_denoised}  # fmt: skip
    model = {"dataset": args.dataset_name, "backend": denoiser.family, "img_resolution": denoiser.resolution,
             "backend_config": {key: value for key, value in config.items() if value is not None},
             "guidance_type": args.guidance_type, "guidance_rate": args.guidance_rate}  # fmt: skip
    teacher = {"solver": args.sampler_tea, "M": args.M, "num_steps": (args.M + 1) * (args.num_steps - 1) + 1,
               "substeps_per_interval": args.teacher_substeps}  # fmt: skip
    raw = raw._replace(r=raw.r.clamp(-RAW_LIMIT, RAW_LIMIT))
    tables = predictor.Raw(*(table.detach().float().cpu() for table in raw), args.scale_dir, args.scale_time)
    return predictor.make(name, "distilled", solver, schedule, model, raw=tables, teacher=teacher, training=training)


def say_errors(record, para_nfe, num_steps):
    """A sentence on what validation found. Args: `record`: {"start": {what: error}, "best": {"step", "error"} or None};
    `num_steps` of the run it compares with."""
    if record["best"] is None:
        return "No validation measured its error."
    start = record["start"]
    return (f"Distance to a Heun run of {num_steps} levels (RMSE): untrained {start['untrained']:.4g} -> trained "
            f"{record['best']['error']:.4g} (update {record['best']['step']}); DDIM {start['ddim']:.4g}, iPNDM "
            f"{start['ipndm']:.4g} at the same para-NFE {para_nfe}.")  # fmt: skip


CARD = """---
license: apache-2.0
tags:
- epd-solver
- diffusion
- diffusers
---
# {name}

Tables of EPD-Solver (arXiv 2507.14797), distilled by `train_epd.py` from {teacher}: {steps} updates of the batch {batch},
learning rate {lr:g}. {quality}

```
{description}
```

Sample with it:

```bash
python sample_epd.py --predictor_path {path}{prompt}
```

{snippet}`export/predictor.json` holds the tables; `train_config.yaml` the options, `metrics.jsonl` the course of the run.
"""
SNIPPET = """In a diffusers pipeline as it is, with one network call per point:

```python
from diffusers import DiffusionPipeline
from brisk.epd_scheduler import EPDScheduler

pipe = DiffusionPipeline.from_pretrained("{source}")
pipe.scheduler = EPDScheduler.from_predictor("{path}", pipe.scheduler.config)
image = pipe({call}num_inference_steps={intervals}).images[0]
```

"""
IN_PIPELINES = ("sd", "dit", "pixart", "sd3", "flux", "ldm", "adm")  # families whose stock pipelines take the scheduler


def write_card(output, content, args, denoiser, steps, quality):
    """Write `output`/README.md, which says what the `Predictor` `content` is and how to sample with it.

    Args: `args`: the flags it was trained with; `quality`: a sentence on its error.
    """
    substeps = f", {args.teacher_substeps} sub-steps each" if args.teacher_substeps > 1 else ""
    rate = f", guidance_scale={args.guidance_rate:g}" if args.guidance_type == "cfg" else ""
    call = {"prompts": f'"a prompt"{rate}, ', "classes": f"class_labels=[0]{rate}, ", None: ""}[denoiser.takes]
    source = args.pretrained_model_name_or_path
    snippet = SNIPPET.format(source=source, path=output, call=call, intervals=content.nfe.intervals)
    prompt = ' --prompt "a prompt"' if denoiser.takes == "prompts" and args.guidance_type != "uncond" else ""
    card = CARD.format(
        prompt=prompt,
        name=content.name, steps=steps, batch=args.batch, lr=args.learning_rate, quality=quality, path=output,
        description=predictor.describe(content), snippet=snippet if source and denoiser.family in IN_PIPELINES else "",
        teacher=f"`{args.sampler_tea}` with {args.M} points inserted into every interval{substeps}",
    )  # fmt: skip
    write_atomically(Path(output) / "README.md", redact(card))
