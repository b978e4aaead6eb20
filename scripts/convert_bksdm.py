#!/usr/bin/env python
"""Write the student of a BK-SDM checkpoint, or of a DiffEngine .pth file, as a U-Net folder for stock diffusers."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the training script is not part of the package

import train_bksdm_distill
from brisk import network_files, options

SHOWN = 8  # weights of each kind that an error names


def parse_args(argv=None):
    """The namespace; see `--help`. UserError for what cannot be converted."""
    parser = options.Parser(__doc__)
    add = parser.add_argument
    add("recipe", metavar="CONFIG", help="name or path of a config of train_bksdm_distill.py: its preset and its teacher")
    add("input", metavar="IN", help="checkpoint-N folder of train_bksdm_distill.py, or a .pth file of DiffEngine")
    add("output", metavar="OUT_DIR", help="the U-Net is written to OUT_DIR/unet")
    add("--save_keys", default="unet", help="parts to write; a student is a U-Net and nothing else: unet")
    options.add_flag(parser, "--use_ema", "the checkpoint's average (unet_ema) in place of its trained weights")
    add("--dtype", choices=("fp16", "bf16", "fp32"), help="precision to write; default: --variant's, else fp32")
    add("--variant", help="variant in the name of the file, e.g. fp16")
    add("--pretrained_model_name_or_path", help="the teacher, in place of CONFIG's; only its U-Net's config is read")
    add("--cache_dir", help="cache of downloaded models")
    args, _ = options.parse(parser, argv)
    if args.save_keys != "unet":
        raise options.UserError(f"--save-keys {args.save_keys}: the rest is the teacher's, only unet can be written.")
    if not Path(args.input).exists():
        raise options.UserError(f"{args.input} is neither a checkpoint folder nor a .pth file.")
    if args.use_ema and not Path(args.input).is_dir():
        raise options.UserError(f"--use_ema takes unet_ema of a checkpoint folder, {args.input} is a file.")
    return args


def read_folder(folder, use_ema):
    """(U-Net config, {name: tensor}) of our checkpoint `folder`. UserError."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    unet = Path(folder) / ("unet_ema" if use_ema else "unet")
    if not unet.is_dir():
        why = "it was trained without --use_ema" if use_ema else "it is no checkpoint of train_bksdm_distill.py"
        raise options.UserError(f"{folder} has no folder {unet.name}: {why}.")
    try:
        return UNet2DConditionModel.load_config(unet), load_file(unet / network_files.FILE)
    except Exception as error:  # OSError, SafetensorError
        raise options.UserError(f"{unet} cannot be converted: {' '.join(str(error).split())[:300]}") from None


class Ignored:
    """Stands for every object in a .pth file that is no tensor: nothing of the file's own is called."""

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        pass


def read_pth(path):
    """{name: tensor} of the weights below `state_dict` with the prefix `unet.` of a torch file. UserError."""
    import torch

    try:
        # mmengine stores its log beside the weights, as objects of its own and of numpy
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([(Ignored, name) for name in others]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle's, zipfile's and torch's own
        raise options.UserError(f"{path} cannot be converted: {' '.join(str(error).split())[:300]}") from None
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise options.UserError(f"{path} has no state_dict: it is no checkpoint of DiffEngine.")
    found = {str(name)[5:]: tensor for name, tensor in state.items()
             if str(name).startswith("unet.") and torch.is_tensor(tensor)}  # fmt: skip
    if not found:
        raise options.UserError(f"{path} has no weight whose name begins with 'unet.': it is no checkpoint of DiffEngine.")
    return found


def read_config(source, cache_dir):
    """The complete config of the U-Net in the `unet` folder, or at the root, of a folder or hub id. OSError, ValueError."""
    import torch
    from diffusers import UNet2DConditionModel

    from brisk import sd_models

    try:
        config = UNet2DConditionModel.load_config(source, subfolder="unet", cache_dir=cache_dir)
    except OSError:
        config = UNet2DConditionModel.load_config(source, cache_dir=cache_dir)
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise ValueError(f"it holds a {config.get('_class_name')}")
    with torch.device("meta"):
        return sd_models.plain_config(UNet2DConditionModel.from_config(config))


def expected_config(args, recipe):
    """(what the student is called, its U-Net config) by the options `recipe` of CONFIG. UserError."""
    from brisk import students

    cache_dir = args.cache_dir or recipe.cache_dir
    if recipe.student_init_path:
        sources = [recipe.student_init_path]
    elif args.pretrained_model_name_or_path:
        sources = [args.pretrained_model_name_or_path]
    else:
        sources = [*recorded_teacher(args.input), recipe.teacher_unet or recipe.pretrained_model_name_or_path]
    for source in sources:
        try:
            config = read_config(source, cache_dir)
            break
        except Exception as error:  # the hub client raises many kinds
            problem = " ".join(str(error).split())[:200]
    else:
        raise options.UserError(
            f"the U-Net config of {sources[-1]} cannot be read; give --pretrained_model_name_or_path: {problem}"
        )
    if recipe.student_init_path:
        return f"the student {source}", config
    name, config = students.choose_config(config, recipe.preset, recipe.unet_config_path, recipe.student_config)
    return f"the {name or 'given'} student of {source}", config


def recorded_teacher(folder):
    """[the teacher that the run of a checkpoint was given], [] where `folder` does not say."""
    try:
        given = json.loads((Path(folder) / "trainer_state.json").read_text())["options"]
        return [given["teacher_unet"] or given["pretrained_model_name_or_path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def check(state, network, what):
    """UserError that names the weights of `state` which are missing, unexpected or of another shape for `network`."""
    wanted = network.state_dict()
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "of another shape": [f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}" for name in wanted
                             if name in state and state[name].shape != wanted[name].shape],
    }  # fmt: skip
    if any(problems.values()):
        told = [f"{len(names)} {kind} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"
                for kind, names in problems.items() if names]  # fmt: skip
        raise options.UserError(f"{what}: of its weights there are {', '.join(told)}; is CONFIG the one that was trained?")


def make_student(args, recipe):
    """The student with the weights of IN, all of which fit. UserError."""
    import torch
    from diffusers import UNet2DConditionModel

    from brisk import sd_models

    state_config, state = read_folder(args.input, args.use_ema) if Path(args.input).is_dir() else (None, read_pth(args.input))
    called, config = expected_config(args, recipe)
    with torch.device("meta"):
        student = UNet2DConditionModel.from_config(config)
    check(state, student, f"{args.input} does not hold {called}")
    if state_config:
        with torch.device("meta"):
            student = UNet2DConditionModel.from_config(state_config)
        check(state, student, f"{args.input} does not fit its own config.json")
    dtype = sd_models.DTYPES.get(args.dtype or args.variant, torch.float32)
    student.load_state_dict({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, assign=True)
    return student


def main(argv=None):
    args = parse_args(argv)
    teacher = args.pretrained_model_name_or_path
    given = ["--config", args.recipe] + (["--pretrained_model_name_or_path", teacher] if teacher else [])
    recipe, _ = train_bksdm_distill.parse_args(given)
    from brisk import runlog

    runlog.quiet_libraries()
    student, folder = make_student(args, recipe), Path(args.output) / "unet"
    try:
        student.save_pretrained(folder, variant=args.variant)
    except OSError as error:
        raise options.UserError(f"OUT_DIR {args.output} cannot be written: {error.strerror}.") from None
    print(f"{folder} written: {student.num_parameters():,} parameters, {str(student.dtype).removeprefix('torch.')}.")


if __name__ == "__main__":
    options.run(main)
