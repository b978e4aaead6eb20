"""The flags that train_epd.py and sample_epd.py share: which model it is, and on which noise levels it is sampled."""

import csv
from pathlib import Path

from brisk import options
from brisk.options import UserError

DATASETS = ("cifar10", "ffhq", "afhqv2", "imagenet64", "lsun_bedroom", "lsun_cat", "imagenet256", "lsun_bedroom_ldm", "ms_coco")
BACKENDS = ("edm", "adm", "cm", "ldm", "sd", "dit", "pixart", "sd3", "flux", "gmm")
SCHEDULE_TYPES = ("polynomial", "logsnr", "time_uniform", "discrete", "flowmatch")
GUIDANCE_TYPES = ("cg", "cfg", "uncond")
PROMPT_COLUMNS = ("text", "prompt", "caption")  # of a table of prompts


def add_model_options(parser, cache_dir=True):
    """Which model: `model_options` makes a `denoiser_sources.ModelOptions` of them.

    Args: `cache_dir`: False where another group of flags has declared --cache_dir.
    """
    group = parser.add_argument_group("model")
    add = group.add_argument
    add("--dataset_name", help=f"what the model draws: {', '.join(DATASETS)}, or a name of your own")
    add("--pretrained_model_name_or_path", help="pipeline (folder or hub id); of edm a .pkl or folder of the network")
    add("--backend", choices=BACKENDS, help="family of the model; default: by dataset_name, else by the pipeline")
    add("--revision", help="revision of the hub repository")
    add("--variant", help="variant of the weight files, as fp16")
    if cache_dir:
        add("--cache_dir", help="cache of downloaded models")
    add("--resolution", type=options.COUNT, help="side of the images in pixels; default: the model's own")
    add("--gmm_file", help="JSON file of a mixture of Gaussians, FILE or FILE:NAME; the model of --backend gmm")
    add("--classifier", help="module:function of yours; called without arguments it returns the classifier of guidance cg: "
        "(network input, network time) -> logits")  # fmt: skip
    add("--guidance_type", choices=GUIDANCE_TYPES, help="classifier (cg), classifier-free (cfg), unconditional; default none")
    add("--guidance_rate", type=options.NOT_NEGATIVE, help="scale of the guidance")
    parser.alias("--pretrained_model_name_or_path", "--model_path", "--model_id")


def model_options(args):
    """The `denoiser_sources.ModelOptions` of a namespace."""
    from brisk.denoiser_sources import ModelOptions

    return ModelOptions(
        args.dataset_name, args.backend, args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir,
        args.resolution, args.gmm_file,
    )  # fmt: skip


def read_prompts(prompt, path, flag):
    """The prompts of --prompt, or of the file that `flag` names: a column `PROMPT_COLUMNS` of a table, else one a line.

    None where neither is given. UserError for both, or for a file without prompts.
    """
    if prompt is not None and path:
        raise UserError(f"--prompt and {flag} exclude each other.")
    if not path:
        return None if prompt is None else [prompt]
    from brisk.samples import metadata_rows  # here: it loads torch

    try:
        if Path(path).suffix in (".csv", ".jsonl", ".parquet"):
            rows = metadata_rows(Path(path))
            column = next((name for name in PROMPT_COLUMNS if rows and name in rows[0]), None)
            if rows and column is None:
                raise UserError(f"{flag} {path} has no column {', '.join(PROMPT_COLUMNS)}.")
            lines = [str(row[column] or "") for row in rows]
        else:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {path} cannot be read: {reason}.") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{flag} {path} holds no prompt.")
    return prompts
