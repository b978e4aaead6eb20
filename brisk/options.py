"""Command lines: shared groups of flags, `--config` YAML under the flags, one-sentence errors, secrets kept out."""

import argparse
import difflib
import math
import os
import re
import sys
from pathlib import Path

import yaml


class UserError(Exception):
    """Something the user can mend, said in one sentence; the script ends with `exit_code` and no traceback."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main, argv=None):
    """Call `main(argv)` as a script does: a `UserError` becomes one line on stderr and its exit code."""
    try:
        main(argv)
    except UserError as error:
        if "tqdm" in sys.modules:  # end the line of a progress bar
            for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
                bar.close()
        rank = os.environ.get("RANK", "0")
        where = f"[process {rank}] " if rank != "0" else ""
        print(f"{where}error: {redact(str(error))}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one sentence."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.add_argument("--config", help="YAML file of flag values; flags given on the command line win")

    def error(self, message):
        raise UserError(message)


def boolean(text):
    """`True` or `False` in any of the usual spellings."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")


def number(kind, low=None, high=None, above=None):
    """An argparse type: a finite `kind` (int or float) within [low, high], or greater than `above`."""

    def convert(text):
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not {'a whole' if kind is int else 'a'} number") from None
        if not ((low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)):
            bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
            bounds += [f"greater than {above}"] * (above is not None)
            raise argparse.ArgumentTypeError(f"{text} is out of range, it must be {' and '.join(bounds)}")
        return value

    return convert


COUNT = number(int, low=1)
COUNT_OR_ZERO = number(int, low=0)
POSITIVE = number(float, above=0)
NOT_NEGATIVE = number(float, low=0)
FRACTION = number(float, low=0, high=1)
BELOW_ONE = number(float, low=0, high=0.999999)


def add_flag(group, name, text, default=False):
    """A boolean option: bare, or with `True` / `False`."""
    group.add_argument(name, nargs="?", const=True, default=default, type=boolean, metavar="True|False", help=text)


def _with_underscores(argv):
    return [
        re.sub(r"^--[^=]+", lambda name: "--" + name.group()[2:].replace("-", "_"), token)
        if token.startswith("--")
        else token
        for token in argv
    ]


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; the nearest one is {close[0]}" if close else ""


def find_config(name, folder):
    """Path of a YAML file given by path, or by name within `folder` (configs/<method>)."""
    path = Path(name)
    if path.is_file():
        return path
    named = Path(folder) / f"{name}.yaml"
    if named.is_file():
        return named
    names = sorted(file.stem for file in Path(folder).glob("*.yaml"))
    raise UserError(f"--config {name} is neither a file nor one of {', '.join(names)}.")


def _config_tokens(path, known):
    try:
        # every value stays the text that was written: `mixed_precision: no` is not a boolean
        values = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold 'flag: value' lines.")
    tokens = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            raise UserError(f"--config {path} has an unknown key '{key}'{_nearest(name, known)}.")
        if isinstance(value, (dict, list)):
            raise UserError(f"--config {path}: '{key}' must be a single value.")
        if value not in ("", "~", "null"):
            tokens += [f"--{name}={value}"]
    return tokens


def parse(parser, argv=None, config_folder="configs"):
    """Parse `argv` over the YAML file of `--config` over the defaults.

    Returns (namespace, names of the flags that were given in either place and are not at their default).
    Raises UserError.
    """
    argv = _with_underscores(sys.argv[1:] if argv is None else list(argv))
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--config")
    name.error = parser.error
    chosen, rest = name.parse_known_args(argv)
    tokens = _config_tokens(find_config(chosen.config, config_folder), list(actions)) if chosen.config else []
    args, unknown = parser.parse_known_args(tokens + rest)
    args.config = chosen.config
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("--"):
            raise UserError(f"'{unknown[0]}' is not a flag and belongs to none; quote values that contain spaces.")
        raise UserError(f"unknown flag {flag}{_nearest(flag, [f'--{known}' for known in actions])}.")
    given = {token[2:].split("=")[0] for token in tokens + rest if token.startswith("--")}
    return args, {name for name in given if getattr(args, name) != parser.get_default(name)}


def without_effect(given, rules):
    """Sentences about given flags that do nothing in this run.

    Args: `rules` maps a flag name to (active, what would make it count).
    """
    return [f"--{name} has no effect without {needs}." for name, (active, needs) in rules.items()
            if name in given and not active]  # fmt: skip


PROMPTS = (
    "portrait photo of a girl, highly detailed face, depth of field, golden hour",
    "a castle on a hill above a lake at sunrise, matte painting",
    "a bowl of ramen on a wooden table, studio light, food photography",
    "an astronaut riding a horse in the desert, cinematic",
)


def read_prompts(given):
    """Validation prompts: the lines of a text file, the parts of a `|`-separated string, or four built-in ones.

    Raises UserError where there is none.
    """
    if not given:
        return list(PROMPTS)
    lines = Path(given).read_text().splitlines() if os.path.isfile(given) else given.split("|")
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--validation_prompts '{given}' holds no prompt.")
    return prompts


def read_counts(flag, text):
    """The positive whole numbers of a comma-separated list; UserError naming `flag` otherwise."""
    try:
        counts = [int(count) for count in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"{flag} is '{text}'; it must be a list of positive numbers like 1,2,4.")
    return counts


SECRETS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{6,}"), "<secret>"),
    (re.compile(r"(?i)\b(bearer|authorization:\s*\w+)\s+[^\s\"']+"), r"\1 <secret>"),
    (re.compile(r"(?i)\b([\w-]*(?:token|secret|api-?key):\s*)[^\s\"']+"), r"\1<secret>"),
    (re.compile(r"(?<=\s)(-u\s*|--user[\s=]+)[^\s:]+:[^\s\"']+"), r"\1<secret>"),
    (re.compile(r"(?i)\b([\w-]*(?:token|secret|password|signature|credential|api_?key)[\w-]*=)[^&\s\"':]+"), r"\1<secret>"),
    (re.compile(r"(?i)([?&](?:sig|key|x-amz-\w+|awsaccesskeyid)=)[^&\s\"']+"), r"\1<secret>"),
    (re.compile(r"://[^/\s@]+@"), "://<secret>@"),
)  # fmt: skip


def redact(text, *literals):
    """`text` with tokens, passwords in URLs and the given literal secrets replaced by `<secret>`."""
    for literal in literals:
        if literal:
            text = text.replace(literal, "<secret>")
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


def public(args):
    """The options as a plain dict fit to be logged, or to be given as `--config` again.

    Without `hub_token`, and secrets inside values replaced.
    """
    values = {name: value for name, value in sorted(vars(args).items()) if name not in ("hub_token", "config")}
    token = getattr(args, "hub_token", None)
    return {
        name: redact(value, token) if isinstance(value, str) else value
        for name, value in values.items()
        if isinstance(value, (str, int, float, bool, type(None)))
    }


def add_run_options(parser, output_dir, project):
    """Where the run writes, what it logs, when it saves: the same for every training script."""
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--output_dir", default=output_dir, help="folder for checkpoints, logs and the final model")
    add("--cache_dir", help="cache of downloaded models, passed to every from_pretrained")
    add("--seed", type=COUNT_OR_ZERO, help="seed of everything random; drawn and recorded if not given")
    add("--logging_dir", default="logs", help="tracker folder inside output_dir")
    add("--report_to", default="tensorboard", help="tensorboard, wandb, comet_ml, all or none")
    add("--tracker_project_name", default=project, help="project name shown by the trackers")
    add("--log_every", type=COUNT, default=10, help="optimizer steps between two log lines")
    add("--checkpointing_steps", type=COUNT, default=500, help="optimizer steps between two checkpoints")
    add("--checkpoints_total_limit", type=COUNT, help="how many checkpoints to keep")
    add("--resume_from_checkpoint", help="'latest', or the path of a checkpoint folder")
    add_flag(
        group,
        "--dry_run",
        "build everything, print the plan, take one step (on grey images if no data is given), save nothing",
    )
    add_flag(group, "--push_to_hub", "create the hub repository at the start and upload the result at the end")
    add("--hub_token", help="hub token (better: set HF_TOKEN); never logged")
    add("--hub_model_id", help="hub repository; default: the name of output_dir")
    add("--local_rank", type=int, default=-1, help="accepted for old launchers; not used")


def add_optimizer_options(parser, learning_rate):
    """Batch size, steps, AdamW and its schedule."""
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--train_batch_size", type=COUNT, default=16, help="images per process and micro-step")
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="micro-steps per optimizer step")
    add("--num_train_epochs", type=COUNT, default=100, help="epochs of max_train_samples images")
    add("--max_train_steps", type=COUNT, help="optimizer steps; overrides num_train_epochs")
    add("--learning_rate", type=NOT_NEGATIVE, default=learning_rate, help="peak learning rate")
    add_flag(group, "--scale_lr", "multiply the learning rate by accumulation x batch x processes")
    add("--lr_scheduler", default="constant", help="schedule of the learning rate, in optimizer steps",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"))  # fmt: skip
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=500, help="warm-up steps; ignored by 'constant'")
    add_flag(group, "--use_8bit_adam", "AdamW with 8-bit states (bitsandbytes)")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="AdamW beta1")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="AdamW beta2")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="AdamW weight decay")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="AdamW epsilon")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradients are clipped to this norm")


def add_speed_options(parser):
    """Precision, memory and speed."""
    group = parser.add_argument_group("precision, memory and speed")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as accelerate is configured")
    add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs")
    add_flag(group, "--gradient_checkpointing", "recompute the student's activations: slower, less memory")
    add_flag(group, "--enable_xformers_memory_efficient_attention", "use xformers attention (CUDA only)")
    add_flag(group, "--compile", "torch.compile the networks")
    add_flag(group, "--channels_last", "channels_last memory format for the U-Nets")


def add_data_options(parser):
    """Where images and captions come from, and how they are cut."""
    group = parser.add_argument_group("data (one source)")
    add = group.add_argument
    add(
        "--train_shards_path_or_url",
        help="WebDataset shards: paths, URLs or pipe:COMMAND, braces expanded, '::' between",
    )
    add("--train_data_dir", help="folder of images with metadata.jsonl, metadata.csv or sidecar .txt captions")
    add("--precomputed_shards", help="shards of latents and embeddings made by scripts/precompute_latents.py")
    add("--resolution", type=COUNT, help="the shorter side is resized to it, then cropped; default 512, SDXL 1024")
    add_flag(group, "--center_crop", "crop the centre instead of a random square")
    add_flag(group, "--random_flip", "flip images left to right at random")
    add("--interpolation_type", default="bilinear", help="resize filter",
        choices=("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"))  # fmt: skip
    add("--dataloader_num_workers", type=COUNT_OR_ZERO, default=0, help="loader processes; 0 loads in the main one")
    add("--max_train_samples", type=COUNT, help="images per epoch over all processes; a folder's default is its size")
    add("--proportion_empty_prompts", type=FRACTION, default=0.0, help="share of captions replaced by the empty prompt")
    add("--wds_min_size", type=COUNT, help="skip images whose original shorter side is below this")
    add("--wds_max_pwatermark", type=FRACTION, help="skip images whose pwatermark is above this")
    add("--data_resume", choices=("skip", "fresh"), default="skip",
        help="after a resume, go on at the exact sample, or with freshly drawn shards")  # fmt: skip
