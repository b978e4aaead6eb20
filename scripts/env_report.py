#!/usr/bin/env python
"""Print versions, commit, hardware and accelerate's defaults as YAML, to paste into a bug report."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a report must not need a working installation

from brisk import options

MORE_PACKAGES = ("webdataset", "tokenizers", "huggingface_hub", "bitsandbytes", "xformers", "tensorboard", "wandb")
VARIABLES = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "NCCL_", "OMP_NUM_THREADS", "PYTORCH_", "TORCH_")


def parse_args(argv=None):
    """The namespace; see `--help`."""
    parser = options.Parser(__doc__)
    parser.add_argument("--output", help="write the report into this file as well")
    return options.parse(parser, argv)[0]


def gpus():
    """One line per CUDA device."""
    import torch

    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{device.name}, {device.total_memory / 2**30:.1f} GiB, compute {device.major}.{device.minor}"
            for device in devices]  # fmt: skip


def accelerate_defaults():
    """The file that `accelerate config` wrote, as a dict; None where there is none, its error where it is broken."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    if not path.is_file():
        return None
    try:
        return yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{path.name} cannot be read: {' '.join(str(error).split())}"


def collect():
    """The report as a dict of plain values."""
    import torch

    from brisk import runlog

    report = runlog.environment()
    report["packages"] |= {
        name: importlib.metadata.version(name) for name in MORE_PACKAGES if importlib.util.find_spec(name)
    }
    backend = getattr(torch.backends, "mps", None)
    return {
        **report,
        "machine": platform.machine(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": gpus(),
        "mps": bool(backend and backend.is_available()),
        "accelerate_defaults": accelerate_defaults(),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def main(argv=None):
    args = parse_args(argv)
    text = options.redact(yaml.safe_dump(collect(), sort_keys=False, allow_unicode=True))
    print(text, end="")
    if args.output:
        try:
            Path(args.output).write_text(text)
        except OSError as error:
            raise options.UserError(f"--output {args.output} cannot be written: {error.strerror}.") from None


if __name__ == "__main__":
    options.run(main)
