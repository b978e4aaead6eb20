"""Call a training script in this process on tiny models, and read what it wrote."""

import contextlib
import importlib
import json
import signal
from pathlib import Path

import torch
from progress_bars import close_bars
from safetensors.torch import load_file

from brisk import macs, students, tiny

SLAM, BKSDM, FPDM, EPD = "train_splam_distill_sd_wds", "train_bksdm_distill", "train_fpdm", "train_epd"
MIXTURES = Path(__file__).resolve().parent / "assets/conformance/epd/denoiser.json"
OWN = {
    SLAM: ["--validation_steps=0", "--unet_time_cond_proj_dim=16"], BKSDM: ["--dataloader_num_workers=0"],
    # 8x8 latents, 16 tokens of width 32; the run's folder is output_dir itself
    FPDM: ["--hidden_size=32", "--depth=4", "--num_heads=4", "--image_size=64", "--num_classes=4", "--global_batch_size=4",
           "--dataloader_num_workers=0", "--output_subdir=.", "--name=."],
    # a mixture of Gaussians in two dimensions, three noise levels; the run's folder is output_dir itself
    EPD: ["--backend=gmm", f"--gmm_file={MIXTURES}", "--schedule_type=time_uniform", "--num_steps=3", "--afs", "--batch=8", "--M=1",
          "--teacher_substeps=1", "--learning_rate=0.05", "--eval_samples=8", "--eval_steps=20", "--nosubdir"],
}  # fmt: skip
DONE = {}


def remembering(function, key_of):
    """`function`, each result of which is worked out once per process; `key_of` its arguments is a string."""

    def remember(*args, **named):
        key = f"{function.__name__} {key_of(*args, **named)}"
        if key not in DONE:
            DONE[key] = function(*args, **named)
        return DONE[key]

    return remember


def key_of_plan(*args):
    """What `students.make_plan` depends on: its arguments, and the file of pairs if one is named."""
    file = Path(args[4] or "") if len(args) > 4 else Path()
    return json.dumps([*args, file.read_text() if file.is_file() else None])


@contextlib.contextmanager
def remembered_plans():
    """Within it `students.make_plan` remembers: it takes most of a short run's time."""
    plan, count = students.make_plan, macs.count
    students.make_plan = remembering(plan, key_of_plan)
    macs.count = remembering(count, lambda network, sample, **call: f"{dict(network.config)} {sample.shape}")
    try:
        yield
    finally:
        students.make_plan, macs.count = plan, count


def make_inputs(folder, family="sd1", script=SLAM):
    """A tiny teacher and its shards below `folder`; the flags that name them (of FPDM and EPD, which need none, their own)."""
    if script == FPDM:
        return ["--synthetic_data=32", "--report_to=none", "--seed=7", "--log_every=1", "--adam_epsilon=1e-3", *OWN[FPDM]]
    if script == EPD:
        return ["--report_to=none", "--seed=7", "--log_every=1", "--eval_every=0", *OWN[EPD]]
    if not (folder / family).is_dir():
        tiny.make_pipeline(family).save_pretrained(folder / family)
        tiny.write_shards(folder / "shards")
    return [
        f"--pretrained_teacher_model={folder / family}",
        f"--train_shards_path_or_url={folder}/shards/synthetic-{{00000..00001}}.tar",
        "--resolution=32", "--train_batch_size=2", "--learning_rate=1e-3", "--report_to=none", "--seed=7", "--log_every=1",
        *OWN[script],
        "--adam_epsilon=1e-3",  # so that rounding does not decide the sign of an update
    ]  # fmt: skip


def train(output, *flags, script=SLAM):
    """Run a training script to its end; the rows of its metrics.jsonl."""
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with remembered_plans():
            importlib.import_module(script).main([*map(str, flags), f"--output_dir={output}"])
    finally:
        close_bars()
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def weights(output):
    """Every tensor of the networks that a run or a checkpoint wrote, by file and name."""
    networks = ("unet", "unet_target", "unet_lora", "pytorch_lora_weights.safetensors", "unet_raw", "unet_ema",
                "transformer", "transformer_raw", "transformer_ema")  # fmt: skip
    files = [
        path for path in sorted(Path(output).rglob("*.safetensors")) if path.relative_to(output).parts[0] in networks
    ]
    return {f"{path.relative_to(output)}:{name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_equal(one, two):
    """The same names with the same bits."""
    assert one.keys() == two.keys() and one
    different = [name for name in one if not torch.equal(one[name], two[name])]
    assert different == []
