"""What a run says of itself: one status line and one metrics.jsonl row per interval, trackers, manifest."""

import datetime
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from brisk.checkpoint import write_atomically
from brisk.options import UserError, redact

PATIENCE = datetime.timedelta(hours=2)  # of a process for one that downloads, validates or uploads
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet_ml": "comet_ml"}


def check_trackers(report_to):
    """The value of `--report_to` as `Accelerator(log_with=...)` takes it; UserError if a package is missing."""
    if report_to == "none":
        return None
    if report_to == "all":
        return [name for name, package in TRACKERS.items() if importlib.util.find_spec(package)]
    if report_to not in TRACKERS:
        raise UserError(f"--report_to {report_to} is not one of {', '.join(TRACKERS)}, all, none.")
    if not importlib.util.find_spec(TRACKERS[report_to]):
        raise UserError(f"--report_to {report_to} needs a package: pip install {TRACKERS[report_to]}")
    return [report_to]


def quiet_libraries():
    """Keep the model libraries' notices and loading bars off the screen; errors still show."""
    import diffusers
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # they warn when loader processes fork
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def usable_precision(wanted):
    """What the Accelerator is to be given for `--mixed_precision`: float32 in place of fp16 where there is only a CPU."""
    wanted = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION")
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return "no" if wanted == "fp16" and not has_gpu else wanted


def check_processes(accelerator, needs_whole_tensors=False):
    """Wait until every process has started; UserError for launches that cannot work.

    Processes that each believe to be alone would overwrite each other. Some runs (`needs_whole_tensors`) cannot take FSDP's
    sharded parameters.
    """
    accelerator.wait_for_everyone()  # who leaves while others start, because of a bad flag, breaks their start
    if needs_whole_tensors and accelerator.distributed_type == "FSDP":
        raise UserError("FSDP shards the parameters, which LoRA, 8-bit Adam, Adafactor and train_fpdm.py cannot take.")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were launched and this one sees {accelerator.num_processes}: on CPUs set "
            "ACCELERATE_USE_CPU=true in the environment, whatever launches them."
        )


def create_accelerator(output_dir, logging_dir, accumulation, mixed_precision, report_to, needs_whole_tensors=False):
    """The Accelerator of a run; UserError for a launch, tracker or precision that cannot work here."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    project = ProjectConfiguration(output_dir, logging_dir=str(Path(output_dir) / logging_dir))
    accelerator = Accelerator(
        gradient_accumulation_steps=accumulation, mixed_precision=usable_precision(mixed_precision),
        log_with=check_trackers(report_to), project_config=project,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=PATIENCE)],
    )  # fmt: skip
    check_processes(accelerator, needs_whole_tensors)
    return accelerator


def setup_logging(accelerator):
    """A logger whose messages stand above the progress bar; only the main process speaks below ERROR."""
    quiet_libraries()

    class Handler(logging.Handler):
        def emit(self, record):
            from tqdm import tqdm

            tqdm.write(f"{redact(self.format(record))}\n", file=sys.stderr, end="")  # in one piece: others may speak too

    handler = Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("brisk")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    return logger


def open_output(rank, output_dir):
    """Create the output folder and prove that it can be written; UserError if not."""
    probe = Path(output_dir) / f".write-test-{rank}"
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from None
    return Path(output_dir)


def start_trackers(accelerator, project, options, folder):
    """Start the trackers of the run; their files go below `folder`. Args: `options` are the public ones."""
    if accelerator.log_with:
        Path(folder).mkdir(parents=True, exist_ok=True)
    given, sys.argv = sys.argv, sys.argv[:1]  # wandb records the command line, a --hub_token in it included
    try:
        accelerator.init_trackers(project, options, init_kwargs={"wandb": {"dir": str(folder)}})
    except Exception as error:  # each tracker raises its own
        reason = redact(" ".join(str(error).split())[:300])
        raise UserError(f"--report_to: the tracker does not start: {reason}") from None
    finally:
        sys.argv = given


def allow_fast_maths(tf32):
    """cuDNN picks its fastest kernels (shapes never change), TF32 matrix products on request."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def peak_memory():
    """(GiB at the peak so far, what it is): device memory on CUDA, resident memory of this process elsewhere."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "process"


class RunLog:
    """Sums loss terms on the device and reads them once per interval: no host synchronisation in between."""

    def __init__(self, accelerator, output_dir, log_every, images_per_step, first_step=0, prefix=""):
        """`images_per_step` over all processes; no file without `output_dir`; `prefix` of the plain names in trackers.

        Rows of metrics.jsonl after `first_step` belong to a lost run and are dropped.
        """
        self.accelerator, self.log_every, self.images_per_step = accelerator, log_every, images_per_step
        self.prefix = prefix
        self.path = Path(output_dir) / "metrics.jsonl" if output_dir and accelerator.is_main_process else None
        self.sums, self.counts, self.waited = {}, {}, 0.0
        self.since, self.last_step = time.perf_counter(), first_step
        if self.path:
            self._drop_rows_after(first_step)

    def _drop_rows_after(self, step):
        kept = []
        for line in self.path.read_text().splitlines() if self.path.is_file() and step else []:
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (ValueError, KeyError, TypeError):  # a line cut short by a kill
                continue
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def _append(self, line):
        try:
            with open(self.path, "a") as file:
                file.write(line)
        except OSError as error:  # a full disk must not end the run
            logging.getLogger("brisk").warning(f"{self.path} could not be written: {error.strerror}.")

    def next_batch(self, batches):
        """`next(batches)`, its time counted as waiting for data."""
        started = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - started
        return batch

    def add(self, **terms):
        """Add 0-dim device tensors (or numbers) to this interval's means."""
        for name, value in terms.items():
            value = value.detach().float() if torch.is_tensor(value) else value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pause(self, seconds):
        """Leave `seconds` (saving, validation) out of the interval's speed."""
        self.since += seconds

    def due(self, step):
        """Whether the interval ends at `step`."""
        return step % self.log_every == 0

    def flush(self, step, progress=None, **constants):
        """Reduce over ranks, write the row, start the next interval. Returns the row (the same on every rank)."""
        seconds = time.perf_counter() - self.since
        steps = max(step - self.last_step, 1)
        names = sorted(self.sums)
        means = [torch.as_tensor(self.sums[name], device=self.accelerator.device) / self.counts[name] for name in names]
        means.append(torch.tensor(self.waited / max(seconds, 1e-9), device=self.accelerator.device))
        reduced = self.accelerator.reduce(torch.stack([mean.float() for mean in means]), "mean").tolist()
        row = {"step": step, "images": step * self.images_per_step, **dict(zip(names, reduced, strict=False))}
        row |= {name: value for name, value in constants.items() if value is not None}
        row["steps_per_sec"] = round(steps / max(seconds, 1e-9), 4)
        row["images_per_second"] = round(steps * self.images_per_step / max(seconds, 1e-9), 3)
        row["data_wait_share"] = round(reduced[-1], 4)
        row["peak_memory_gib"] = round(peak_memory()[0], 3)
        if self.path:  # strict JSON has no NaN
            finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self._append(json.dumps(finite) + "\n")
        shown = "  ".join(f"{name} {_short(value)}" for name, value in row.items() if "/" not in name)  # no lists of layers
        logging.getLogger("brisk").info(shown)
        if progress is not None:
            progress.set_postfix_str(f"loss {_short(row.get('loss', float('nan')))}", refresh=False)
        tracked = {name if "/" in name else self.prefix + name: value for name, value in row.items()}
        tracked.pop("step", None)  # with a prefix it is a metric like the others
        self.accelerator.log(tracked, step=step)
        self.sums, self.counts, self.waited = {}, {}, 0.0
        self.since, self.last_step = time.perf_counter(), step
        return row


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def log_images(accelerator, tag, images, captions, step):
    """Send PIL `images` with `captions` to every tracker of the run."""
    import numpy as np

    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            stack = np.stack([np.asarray(image) for image in images])
            tracker.writer.add_images(tag, stack, step, dataformats="NHWC")
        elif tracker.name == "wandb":
            import wandb

            shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
            tracker.log({tag: shown}, step=step)
        elif tracker.name == "comet_ml":
            for image, caption in zip(images, captions, strict=True):
                tracker.writer.log_image(image, name=f"{tag}: {caption}", step=step)


def _commit():
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu():
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return named or platform.processor() or platform.machine()


def environment():
    """Versions, commit and hardware, as a dict for manifests, reports and bug reports."""
    packages = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy")
    versions = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return {
        "python": platform.python_version(), "platform": platform.platform(), "packages": versions,
        "commit": _commit(), "device": device, "cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads(),
    }  # fmt: skip


def write_manifest(output_dir, options, facts):
    """`train_config.yaml` (the resolved public options) and `run_manifest.json` (environment and `facts`)."""
    output_dir = Path(output_dir)
    write_atomically(output_dir / "train_config.yaml", yaml.safe_dump(options, sort_keys=True))
    write_atomically(output_dir / "run_manifest.json", json.dumps({**environment(), **facts}, indent=1) + "\n")
