"""Command lines: shared groups of flags, `--config` YAML under the flags, one-sentence errors, secrets kept out."""

import argparse
import difflib
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml


class UserError(Exception):
    """Something the user can mend, said in one sentence; the script ends with `exit_code` and no traceback."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main, argv=None):
    """Call `main(argv)` as a script does: a `UserError` becomes one line on stderr and its exit code, Ctrl-C exits with 130."""
    try:
        main(argv)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        where = f"[process {rank}] " if rank != "0" else ""
        _end(f"{where}error: {redact(str(error))}", error.exit_code)
    except KeyboardInterrupt:
        _end("interrupted", 130)


def _end(text, code):
    if "tqdm" in sys.modules:  # end the line of a progress bar
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: other processes may speak too
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one sentence."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        self.add_argument("--config", help="YAML file of flag values; flags given on the command line win")
        self.exclusive = []  # groups of flags of which one on the command line replaces another in the YAML file

    def error(self, message):
        raise UserError(message)

    def alias(self, flag, *others):
        """Let a flag that was added be spelt in other ways too."""
        action = self._option_string_actions[flag]
        action.option_strings += others
        self._option_string_actions |= dict.fromkeys(others, action)


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


def nearest(name, names):
    """The end of a message that tells which of `names` is most like `name`, empty where none is."""
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
            raise UserError(f"--config {path} has an unknown key '{key}'{nearest(name, known)}.")
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
    names = {option[2:]: action.dest for action in parser._actions for option in action.option_strings
             if option.startswith("--") and action.dest != "help"}  # fmt: skip
    name = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    name.add_argument("--config")
    name.error = parser.error
    chosen, rest = name.parse_known_args(argv)
    tokens = _config_tokens(find_config(chosen.config, config_folder), list(names)) if chosen.config else []
    typed = {_dest(token, names) for token in rest}
    for group in parser.exclusive:
        if typed & set(group):
            tokens = [token for token in tokens if _dest(token, names) not in group]
    args, unknown = parser.parse_known_args(tokens + rest)
    args.config = chosen.config
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("--"):
            raise UserError(f"'{unknown[0]}' is not a flag and belongs to none; quote values that contain spaces.")
        raise UserError(f"unknown flag {flag}{nearest(flag, [f'--{known}' for known in names])}.")
    given = {_dest(token, names) for token in tokens + rest} - {None}
    return args, {name for name in given if getattr(args, name) != parser.get_default(name)}


def _dest(token, names):
    """The namespace's name for the flag of a command-line token, None if it is a value."""
    return names.get(token[2:].split("=")[0]) if token.startswith("--") else None


MAY_CHANGE = {"resume_from_checkpoint", "output_dir", "max_train_steps", "dry_run", "log_every", "local_rank"}
IN_OPTIMIZER = {"learning_rate", "scale_lr", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"}


def changed_options(before, now):
    """Sentences about options that differ between a checkpoint and this run (both as `public` gives them)."""
    changed = [name for name in sorted(now) if name in before and before[name] != now[name] and name not in MAY_CHANGE]
    return [f"--{name} is {now[name]}, the checkpoint had {before[name]}"
            + ("; the checkpoint's optimizer keeps it." if name in IN_OPTIMIZER else ".") for name in changed]  # fmt: skip


def without_effect(given, rules):
    """Sentences about given flags that do nothing in this run.

    Args: `rules` maps a flag name to (active, what would make it count).
    """
    return [f"--{name} has no effect without {needs}." for name, (active, needs) in rules.items()
            if name in given and not active]  # fmt: skip


def common_effects(args, mixed_precision):
    """The rules of `without_effect` for the shared flags; `mixed_precision` is what the run uses."""
    has_rows = bool(args.train_data_dir or args.dataset_name)
    online = {name: (not args.precomputed_shards, "online encoding (--precomputed_shards is set)") for name in
              ("center_crop", "random_flip", "interpolation_type", "wds_min_size", "wds_max_pwatermark")}  # fmt: skip
    return online | {
        "lr_warmup_steps": (args.lr_scheduler != "constant", "an --lr_scheduler other than constant"),
        "mixed_precision": (args.mixed_precision in (None, mixed_precision), "a GPU: float32 is used (bf16 works on CPUs)"),
        "hub_token": (args.push_to_hub, "--push_to_hub"),
        "hub_model_id": (args.push_to_hub, "--push_to_hub"),
        "data_resume": (not has_rows, "shards (folders and datasets always go on exactly)"),
        "dataset_config_name": (args.dataset_name, "--dataset_name"),
        "image_column": (has_rows, "--train_data_dir or --dataset_name"),
        "caption_column": (has_rows, "--train_data_dir or --dataset_name"),
        "num_train_epochs": (not args.max_train_steps, "leaving out --max_train_steps"),
    }  # fmt: skip


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


def write_config(args, path):
    """Write the resolved options to a YAML file that `--config` takes."""
    values = {name: value for name, value in public(args).items() if name != "dump_config"}
    try:
        Path(path).write_text(yaml.safe_dump(values, sort_keys=True))
    except OSError as error:
        raise UserError(f"--dump_config {path} cannot be written: {error.strerror}.") from None


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
        "build everything, print the plan, save nothing; grey images stand in where no data is given",
    )
    add_flag(group, "--push_to_hub", "create the hub repository at the start and upload the result at the end")
    add("--hub_token", help="hub token (better: set HF_TOKEN); never logged")
    add("--hub_model_id", help="hub repository; default: the name of output_dir")
    add("--local_rank", type=int, default=-1, help="accepted for old launchers; not used")


def add_optimizer_options(parser, learning_rate, lr_warmup_steps=500):
    """Steps, AdamW and its schedule."""
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add("--gradient_accumulation_steps", type=COUNT, default=1, help="micro-steps per optimizer step")
    add("--num_train_epochs", type=COUNT, default=100, help="epochs of max_train_samples images")
    add("--max_train_steps", type=COUNT, help="optimizer steps; overrides num_train_epochs")
    add("--learning_rate", type=NOT_NEGATIVE, default=learning_rate, help="peak learning rate")
    add("--lr_scheduler", default="constant", help="schedule of the learning rate, in optimizer steps",
        choices=("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"))  # fmt: skip
    add("--lr_warmup_steps", type=COUNT_OR_ZERO, default=lr_warmup_steps, help="warm-up steps; ignored by 'constant'")
    add_flag(group, "--use_8bit_adam", "AdamW with 8-bit states (bitsandbytes)")
    add("--adam_beta1", type=BELOW_ONE, default=0.9, help="AdamW beta1")
    add("--adam_beta2", type=BELOW_ONE, default=0.999, help="AdamW beta2")
    add("--adam_weight_decay", type=NOT_NEGATIVE, default=1e-2, help="AdamW weight decay")
    add("--adam_epsilon", type=POSITIVE, default=1e-8, help="AdamW epsilon")
    add("--max_grad_norm", type=POSITIVE, default=1.0, help="gradients are clipped to this norm")


def add_batch_options(parser):
    """The batch of each process, and a learning rate that follows it."""
    group = parser.add_argument_group("batch")
    group.add_argument("--train_batch_size", type=COUNT, default=16, help="images per process and micro-step")
    add_flag(group, "--scale_lr", "multiply the learning rate by accumulation x batch x processes")


def add_speed_options(parser):
    """Precision, memory and speed."""
    group = parser.add_argument_group("precision, memory and speed")
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: as accelerate is configured")
    add_flag(group, "--allow_tf32", "allow TF32 matrix products on Ampere and newer GPUs")
    add_flag(group, "--gradient_checkpointing", "recompute the student's activations: slower, less memory")
    add_flag(group, "--enable_xformers_memory_efficient_attention", "use xformers attention (CUDA only)")
    add_flag(group, "--compile", "torch.compile the networks")
    add_flag(group, "--channels_last", "channels_last memory format for the U-Nets")


SOURCES = ("train_shards_path_or_url", "train_data_dir", "dataset_name", "precomputed_shards")


class DataOptions(NamedTuple):
    """The values of the flags of `add_data_options`."""

    train_shards_path_or_url: str | None
    train_data_dir: str | None
    dataset_name: str | None
    dataset_config_name: str | None
    precomputed_shards: str | None
    image_column: str | None
    caption_column: str | None
    resolution: int | None
    center_crop: bool
    random_flip: bool
    interpolation_type: str
    dataloader_num_workers: int
    max_train_samples: int | None
    proportion_empty_prompts: float
    wds_min_size: int | None
    wds_max_pwatermark: float | None
    data_resume: str


def data_options(args):
    """The `DataOptions` of a namespace; UserError for those that contradict each other."""
    chosen = DataOptions(**{name: getattr(args, name) for name in DataOptions._fields})
    sources = [name for name in SOURCES if getattr(args, name) is not None]
    if len(sources) != 1 and not (args.dry_run and not sources):
        raise UserError(f"give one of {', '.join(f'--{name}' for name in SOURCES)}.")
    is_stream = chosen.train_shards_path_or_url or chosen.precomputed_shards
    if is_stream and not args.max_train_samples and not args.max_train_steps and not args.dry_run:
        raise UserError("shards are an endless stream: give --max_train_steps, or --max_train_samples per epoch.")
    if chosen.wds_max_pwatermark is not None and (chosen.train_data_dir or chosen.dataset_name):
        raise UserError("--wds_max_pwatermark needs the json files of shards; a folder or dataset has none.")
    return chosen


def add_data_options(parser, dataloader_num_workers=0):
    """Where images and captions come from, and how they are cut."""
    parser.exclusive.append(SOURCES)
    group = parser.add_argument_group("data (one source)")
    add = group.add_argument
    add(
        "--train_shards_path_or_url",
        help="WebDataset shards: paths, URLs or pipe:COMMAND, braces expanded, '::' between",
    )
    add("--train_data_dir", help="folder of images with metadata.jsonl, .csv or .parquet, or sidecar .txt captions")
    add("--dataset_name", help="dataset of the `datasets` library: hub id, or folder of load_dataset or save_to_disk")
    add("--dataset_config_name", help="its configuration")
    add("--image_column", help="column of images in the dataset ('image') or of file names in metadata ('file_name')")
    add("--caption_column", help="column of captions, strings or lists of them; default 'text', else 'caption'")
    add("--precomputed_shards", "--cached_latents", help="shards of latents and embeddings made by scripts/precompute_latents.py")
    add("--resolution", type=COUNT,
        help="the shorter side is resized to it, then cropped; default 512, SDXL 1024; of BK-SDM the teacher's")  # fmt: skip
    add_flag(group, "--center_crop", "crop the centre instead of a random square")
    add_flag(group, "--random_flip", "flip images left to right at random")
    add("--interpolation_type", default="bilinear", help="resize filter",
        choices=("bilinear", "bicubic", "lanczos", "box", "hamming", "nearest"))  # fmt: skip
    add("--dataloader_num_workers", type=COUNT_OR_ZERO, default=dataloader_num_workers,
        help="loader processes; 0 loads in the main one")  # fmt: skip
    add("--max_train_samples", type=COUNT, help="images per epoch over all processes; default: the size of the folder or dataset")
    add("--proportion_empty_prompts", type=FRACTION, default=0.0, help="share of captions replaced by the empty prompt")
    add("--wds_min_size", type=COUNT, help="skip images whose original shorter side is below this")
    add("--wds_max_pwatermark", type=FRACTION, help="skip images whose pwatermark is above this")
    add("--data_resume", choices=("skip", "fresh"), default="skip",
        help="after a resume, go on at the exact sample, or with freshly drawn shards")  # fmt: skip
