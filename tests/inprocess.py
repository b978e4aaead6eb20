"""Call a training script in this process on tiny models, and read what it wrote."""

import json
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from brisk import tiny


def make_inputs(folder, family="sd1"):
    """A tiny teacher and its shards below `folder`; the flags that name them."""
    if not (folder / family).is_dir():
        tiny.make_pipeline(family).save_pretrained(folder / family)
        tiny.write_shards(folder / "shards")
    return [
        f"--pretrained_teacher_model={folder / family}",
        f"--train_shards_path_or_url={folder}/shards/synthetic-{{00000..00001}}.tar",
        "--resolution=32", "--train_batch_size=2", "--learning_rate=1e-3", "--validation_steps=0", "--report_to=none",
        "--seed=7", "--log_every=1", "--unet_time_cond_proj_dim=16",
        "--adam_epsilon=1e-3",  # so that rounding does not decide the sign of an update
    ]  # fmt: skip


def train(output, *flags):
    """Run the SLAM script to its end; the rows of its metrics.jsonl."""
    from accelerate.state import AcceleratorState, GradientState

    import train_splam_distill_sd_wds as script

    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        script.main([*map(str, flags), f"--output_dir={output}"])
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    """Every tensor of the networks that a run or a checkpoint wrote, by file and name."""
    networks = ("unet", "unet_target", "unet_lora", "pytorch_lora_weights.safetensors")
    files = [
        path for path in sorted(Path(output).rglob("*.safetensors")) if path.relative_to(output).parts[0] in networks
    ]
    return {f"{path.relative_to(output)}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_equal(one, two):
    """The same names with the same bits."""
    assert one.keys() == two.keys() and one
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert different == []
