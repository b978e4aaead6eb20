"""Options of train_epd_rl.py: a YAML file of sections, `--override section.key=value` over it, flags over both.

`settings` maps dotted keys to values, as {"ppo.rloo_k": 4}; `stated` is the set of those that a file or an override gave. Keys that
are flags as well (`FLAGS`) live in the namespace of flags, and any other flag may stand at the top of the file under its own name.
"""

import argparse
import re
import sys

import yaml

from brisk import options
from brisk.epd_options import BACKENDS, GUIDANCE_TYPES, SCHEDULE_TYPES
from brisk.options import UserError

HEADS = ("hps", "pickscore", "imagereward", "clip", "aesthetic")  # that can be mixed
OF_IMAGES = (*HEADS, "multi", "mps", "handwriting")  # types of rewards that see decoded images alone
PRECISIONS = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}  # of a network, as --mixed_precision names them


def _one_of(*allowed):
    def convert(text):
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(allowed)}")
        return text

    return convert


KEYS = {  # key: (default, what makes a value of its text); null is allowed where the default is None, and in `NULLABLE`
    "data.predictor_snapshot": (None, str), "data.prompt_csv": (None, str),
    "model.dataset_name": ("ms_coco", str), "model.guidance_type": ("cfg", _one_of(*GUIDANCE_TYPES)),
    "model.guidance_rate": (7.5, options.NOT_NEGATIVE), "model.schedule_type": ("discrete", _one_of(*SCHEDULE_TYPES)),
    "model.schedule_rho": (1.0, options.POSITIVE), "model.num_steps": (None, options.number(int, low=2)),
    "model.num_points": (None, options.COUNT), "model.backend": ("ldm", _one_of(*BACKENDS)),
    "model.resolution": (None, options.COUNT), "model.sigma_min": (None, options.POSITIVE),
    "model.sigma_max": (None, options.POSITIVE), "model.flowmatch_mu": (None, options.number(float)),
    "model.flowmatch_shift": (None, options.POSITIVE),
    "model.backend_options.model_name_or_path": (None, str), "model.backend_options.revision": (None, str),
    "model.backend_options.variant": (None, str), "model.backend_options.cache_dir": (None, str),
    "model.backend_options.gmm_file": (None, str), "model.backend_options.negative_prompt": (None, str),
    "model.backend_options.torch_dtype": (None, _one_of(*PRECISIONS)),
    "model.backend_options.enable_model_cpu_offload": (False, options.boolean),
    "reward.type": ("hps", str), "reward.weights_path": (None, str), "reward.batch_size": (2, options.COUNT),
    "reward.enable_amp": (True, options.boolean), "reward.hps_version": ("v2.1", str), "reward.cache_dir": (None, str),
    **{f"reward.multi.weights.{head}": (1.0, options.NOT_NEGATIVE) for head in HEADS},
    "reward.multi.pickscore.model": ("yuvalkirstain/PickScore_v1", str),
    "reward.multi.pickscore.processor": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", str),
    "reward.multi.imagereward.checkpoint": (None, str), "reward.multi.imagereward.med_config": (None, str),
    "reward.multi.imagereward.tokenizer": (None, str), "reward.multi.imagereward.cache_dir": (None, str),
    "reward.multi.clip.model": (None, str), "reward.multi.clip.cache_dir": (None, str),
    "reward.multi.aesthetic.predictor_path": (None, str), "reward.multi.aesthetic.clip_path": (None, str),
    "reward.multi.mps.checkpoint": (None, str), "reward.multi.mps.processor": (None, str),
    "ppo.rollout_batch_size": (4, options.COUNT), "ppo.rloo_k": (2, options.COUNT), "ppo.ppo_epochs": (1, options.COUNT),
    "ppo.minibatch_size": (2, options.COUNT), "ppo.learning_rate": (5e-5, options.NOT_NEGATIVE),
    "ppo.clip_range": (0.2, options.POSITIVE), "ppo.kl_coef": (0.01, options.NOT_NEGATIVE),
    "ppo.entropy_coef": (0.0, options.NOT_NEGATIVE), "ppo.max_grad_norm": (None, options.POSITIVE),
    "ppo.decode_rgb": (True, options.boolean), "ppo.dirichlet_concentration": (200.0, options.POSITIVE),
    "ppo.scale_std": (0.05, options.POSITIVE), "ppo.train_scale_dir": (None, options.boolean),
    "ppo.train_scale_time": (None, options.boolean),
}  # fmt: skip
NULLABLE = ("model.guidance_type", "model.guidance_rate")
FLAGS = {"run.output_root": "output_dir", "run.run_name": "run_name", "run.seed": "seed", "ppo.steps": "max_train_steps",
         "logging.log_interval": "log_every", "logging.save_interval": "checkpointing_steps"}  # fmt: skip
ALIASES = {"model.backend_options.model_id": "model.backend_options.model_name_or_path"}
NULLS = ("", "~", "null", "Null", "NULL", "None")
OTHERS_FLAGS = {name: f"model.{name}" for name in ("dataset_name", "backend", "resolution")} | {
    "pretrained_model_name_or_path": "model.backend_options.model_name_or_path", "gmm_file": "model.backend_options.gmm_file",
    "predictor_path": "data.predictor_snapshot",
}  # of flags of other scripts
PLACE = "model.backend_options."  # where the model lies: the predictor's file says it for the machine that it was made on


def _flat(values, before=""):
    """(dotted key, value) of nested mappings; empty sections are left out."""
    for name, value in values.items():
        key = before + str(name)
        if isinstance(value, dict):
            yield from _flat(value, key + ".")
        elif value not in NULLS or not any(known.startswith(key + ".") for known in (*KEYS, *FLAGS)):
            yield key, value


def read_config(path):
    """{dotted key: text} of a YAML file of sections. UserError."""
    try:  # every value stays the text that was written: `mixed_precision: no` is not a boolean
        values = yaml.load(path.read_text(), Loader=yaml.BaseLoader) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold sections of 'key: value' lines.")
    found = dict(_flat(values))
    for key, value in found.items():
        if isinstance(value, list):
            raise UserError(f"--config {path}: '{key}' must be a single value.")
    return found


def _token(parser, key, flag, text, where):
    """The command line's word for a key that is a flag. UserError that names the key."""
    token = f"--{flag}={int(text, 16) if re.fullmatch(r'0[xX][0-9a-fA-F]+', text) else text}"
    try:
        parser.parse_known_args([token])
    except UserError as error:
        raise UserError(f"{where}: {key}: {str(error).partition(': ')[2]}.") from None
    return token


def _split_override(text):
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--override {text} is not of the form KEY=VALUE, as in ppo.rloo_k=4.")
    return key.strip(), value.strip()


def _value(key, text, where):
    """The value of a key's text: none for null, hexadecimal whole numbers too. UserError."""
    default, convert = KEYS[key]
    if text in NULLS:
        if default is None or key in NULLABLE:
            return None
        raise UserError(f"{where}: {key} cannot be null; its default is {default}.")
    is_hex = convert is not str and re.fullmatch(r"[+-]?0[xX][0-9a-fA-F]+", text)
    try:
        return convert(str(int(text, 16)) if is_hex else text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{where}: {key}: {error}.") from None


def parse(parser, argv, config_folder):
    """(namespace, names of flags that were given, settings, stated keys) of a command line. UserError.

    The namespace has `origins` for `in_keys` too.

    Args: `parser`: the `options.Parser` of all flags, `--config` and `--override` among them.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    early.add_argument("--override", action="append", default=[])
    early.error = parser.error
    chosen, rest = early.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    path = options.find_config(chosen.config, config_folder) if chosen.config else None
    sources = [(key, text, f"--config {path}") for key, text in (read_config(path) if path else {}).items()]
    sources += [(*_split_override(text), "--override") for text in chosen.override]
    flags = {option[2:] for option in parser._option_string_actions if option.startswith("--")} - {"config", "override", "help"}
    tokens, settings, stated, origins = [], {key: default for key, (default, _) in KEYS.items()}, set(), {}
    for key, text, where in sources:
        key = ALIASES.get(key, key)
        flag = FLAGS.get(key, key.replace("-", "_"))
        if key in KEYS:
            settings[key] = _value(key, text, where)
            stated.add(key)
        elif flag not in flags:
            raise UserError(f"{where} has an unknown key '{key}'{options.nearest(key, [*KEYS, *FLAGS, *flags])}.")
        elif text not in NULLS:
            tokens.append(_token(parser, key, flag, text, where))
            origins[parser._option_string_actions[f"--{flag}"].dest] = (key, where)
    args, given = options.parse(parser, tokens + rest, config_folder)
    args.config, args.override = chosen.config, chosen.override
    alone, _ = options.parse(parser, tokens, config_folder)
    args.origins = {name: origin for name, origin in origins.items() if getattr(args, name) == getattr(alone, name)}
    return args, given, settings, stated


def in_keys(sentence, origins):
    """A `sentence` that speaks of flags, for who wrote keys: flags of other scripts, and those that the file or an override gave.

    Args: `origins`: the latter, {flag: (key, where it stands)}.
    """
    keys = OTHERS_FLAGS | {name: key for name, (key, _) in origins.items()}
    flag = r"(?<![\w-])--(\w+)"  # not within a path
    said = re.sub(flag, lambda found: keys.get(found[1], found[0]), sentence)
    first = re.search(flag, sentence)  # the culprit; those after it are what would help
    return f"{origins[first[1]][1]}: {said}" if first and first[1] in origins else said


def check(settings, stated):
    """UserError for options that contradict each other."""
    size, variants = settings["ppo.rollout_batch_size"], settings["ppo.rloo_k"]
    total = sum(settings[f"reward.multi.weights.{head}"] for head in HEADS)
    rules = [
        (settings["data.predictor_snapshot"] is None,
         "data.predictor_snapshot is missing: the predictor to start from, a file or the folder of a run of train_epd.py."),
        (size % variants, f"ppo.rollout_batch_size {size} is no multiple of ppo.rloo_k {variants}, the variants of a prompt."),
        (settings["ppo.minibatch_size"] > size,
         f"ppo.minibatch_size {settings['ppo.minibatch_size']} is above ppo.rollout_batch_size {size}."),
        (settings["reward.batch_size"] > size,
         f"reward.batch_size {settings['reward.batch_size']} is above ppo.rollout_batch_size {size}."),
        (settings["reward.type"] == "multi" and total == 0,
         "reward.multi.weights are all 0; reward.type multi needs a positive one."),
        (not settings["ppo.decode_rgb"] and settings["reward.type"] in OF_IMAGES,
         f"ppo.decode_rgb is false, reward.type {settings['reward.type']} judges decoded images."),
    ]  # fmt: skip
    backend = settings["model.backend"] if "model.backend" in stated else None
    resolution, kind = settings["model.resolution"], settings["model.schedule_type"]
    guidance = settings["model.guidance_type"]
    rules += [
        (backend == "sd3" and resolution not in (None, 512, 1024),
         f"model.resolution is {resolution}; model.backend sd3 takes 512 or 1024."),
        (backend == "flux" and resolution not in (None, 1024), f"model.resolution is {resolution}; model.backend flux takes 1024."),
        (backend == "flux" and "model.schedule_type" in stated and kind != "flowmatch",
         f"model.schedule_type is {kind}; model.backend flux takes flowmatch."),
        (backend == "flux" and guidance != "cfg", f"model.guidance_type is {guidance}; model.backend flux takes cfg."),
    ]  # fmt: skip
    for broken, sentence in rules:
        if broken:
            raise UserError(sentence)


def effects(args, settings, mixed_precision, takes):
    """The rules of `options.without_effect`. Args: `takes`: of the `Denoiser`."""
    evaluated = (args.eval_every, "--eval_every above 0")
    return {
        "eval_samples": evaluated, "eval_prompts": (args.eval_every and takes == "prompts", "--eval_every and a model of prompts"),
        "share_latents": (settings["ppo.rloo_k"] > 1, "ppo.rloo_k above 1"),
        "rloo_group": (settings["ppo.rloo_k"] > 1, "ppo.rloo_k above 1"),
        "run_name": (not args.nosubdir, "a folder of its own (--nosubdir is set)"),
        "mixed_precision": (args.mixed_precision in (None, mixed_precision), "a GPU: float32 is used (bf16 works on CPUs)"),
        "hub_token": (args.push_to_hub, "--push_to_hub"), "hub_model_id": (args.push_to_hub, "--push_to_hub"),
        **{name: (False, "--export") for name in ("checkpoint", "device", "no_manifest", "export_point", "export_scale")},
    }  # fmt: skip


def _said_by(predictor):
    """{key of section model: value} of what a predictor knows of the model and levels it is for."""
    from brisk import epd_sampling  # here: it loads torch

    model, schedule, solver = predictor.model, predictor.document["schedule"], predictor.solver
    flow, config = schedule.get("flow") or {}, model.get("backend_config") or {}
    said = {
        "dataset_name": model.get("dataset"), "backend": model.get("backend"), "resolution": epd_sampling.resolution_of(predictor),
        "schedule_type": schedule["type"], "schedule_rho": schedule.get("rho"), "num_steps": solver.num_steps,
        "num_points": solver.num_points, "sigma_min": schedule.get("sigma_min"), "sigma_max": schedule.get("sigma_max"),
        "flowmatch_mu": flow.get("mu"), "flowmatch_shift": flow.get("shift"),
        "backend_options.model_name_or_path": config.get("model_name_or_path") or config.get("model_id"),
    }  # fmt: skip
    said |= {f"backend_options.{name}": config.get(name) for name in ("revision", "variant", "gmm_file", "negative_prompt",
                                                                      "torch_dtype")}  # fmt: skip
    said = {f"model.{name}": value for name, value in said.items() if value is not None}
    if "guidance_type" in model:  # null says: none
        said |= {"model.guidance_type": model["guidance_type"], "model.guidance_rate": model.get("guidance_rate")}
    return said


def merge_model(settings, stated, predictor, prefer_yaml=False):
    """(settings whose section model is that of this run, sentences on what gave way to what, whether the levels are other ones).

    The predictor's metadata go before what YAML and overrides state, or with `prefer_yaml` after them; the place of the model
    (model.backend_options) is the stated one in any case. UserError for a size that the predictor's tables do not have.
    """
    said, found, sentences = _said_by(predictor), dict(settings), []
    for key in (key for key in settings if key.startswith("model.")):
        own, is_place = settings[key], key.startswith(PLACE)
        has_own = key in stated and (own is not None or key in NULLABLE)
        if key in said and not (has_own and (prefer_yaml or is_place)):
            found[key] = said[key]
        if has_own and key in said and own != said[key] and not is_place:
            sentences.append(f"{key} is {own} in place of the predictor's {said[key]}, as --prefer_yaml says." if prefer_yaml else
                             f"{key} {own} gives way to the predictor's {said[key]}; --prefer_yaml reverses this.")  # fmt: skip
    known, names = set(said) | stated, ("model.dataset_name", "model.backend")
    for key in names if known & {*names, PLACE + "model_name_or_path", PLACE + "gmm_file"} else names[1:]:
        if key not in known:
            found[key] = None  # the other one says which family it is, or the pipeline
    for key in ("model.num_steps", "model.num_points"):
        if found[key] != said[key]:
            raise UserError(f"{key} is {found[key]}, the predictor's tables have {said[key]} and fit no other number.")
    if found["model.guidance_type"] == "cfg" and found["model.guidance_rate"] is None:
        raise UserError("model.guidance_type is cfg; it needs model.guidance_rate.")
    levels = ("schedule_type", "schedule_rho", "sigma_min", "sigma_max", "flowmatch_mu", "flowmatch_shift")
    others = any(found[f"model.{name}"] != said.get(f"model.{name}", found[f"model.{name}"]) for name in levels)
    others = others or prefer_yaml and any(key in stated and settings[key] is not None and key not in said
                                           for key in (f"model.{name}" for name in levels))  # fmt: skip
    return found, sentences, others


def model_options(settings):
    """The `denoiser_sources.ModelOptions` of merged settings."""
    from brisk.denoiser_sources import ModelOptions

    place = {name: settings[PLACE + name] for name in ("revision", "variant", "cache_dir", "gmm_file")}
    return ModelOptions(settings["model.dataset_name"], settings["model.backend"], settings[PLACE + "model_name_or_path"],
                        resolution=settings["model.resolution"], **place)  # fmt: skip


def reward_settings(settings):
    """The `rewards.RewardSettings` of the section reward."""
    from brisk.rewards import RewardSettings

    found = {}
    for key in (key for key in settings if key.startswith("reward.")):
        *sections, name = key.split(".")
        place = found.setdefault(sections[-1], {}) if len(sections) > 1 else found
        place[name] = settings[key]
    return RewardSettings(**found)


def changed(before, now):
    """Sentences on settings that differ between a checkpoint and this run."""
    return [f"{key} is {value}, the checkpoint had {before[key]}." for key, value in now.items()
            if key in before and before[key] != value]  # fmt: skip


# what an evaluation depends on besides the tables
COMPARED = ("model.", "reward.type", "reward.hps_version", "reward.multi.weights.", "ppo.decode_rgb", "eval_samples",
            "eval_prompts")  # fmt: skip


def check_comparable(before, now, where):
    """UserError naming the first of the `COMPARED` options that differs: evaluations of the checkpoint `where` and new ones would
    measure different things. Args: `before`, `now`: settings and flags by name."""
    for key, value in now.items():
        if key.startswith(COMPARED) and not key.startswith(PLACE) and key in before and before[key] != value:
            raise UserError(f"{key} is {value}, the checkpoint {where} had {before[key]}: their evaluations cannot be compared; "
                            "start a new run from its predictor.")  # fmt: skip


def resolved(args, settings):
    """All options as a nested mapping that `--config` takes again, without secrets."""
    content = dict(options.public(args))
    for name in ("export", "checkpoint", "dry_run", "resume_from_checkpoint"):
        content.pop(name)
    for key, value in settings.items():
        if value is None and key not in NULLABLE:
            continue
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = options.redact(value) if isinstance(value, str) else value
    return content
