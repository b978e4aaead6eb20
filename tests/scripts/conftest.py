"""What the script tests share: tiny teachers, shards, the SLAM script called in this process or in its own."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_splam_distill_sd_wds.py"
SOURCES = ("--train_shards_path_or_url", "--train_data_dir", "--precomputed_shards", "--config")
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask a network, nor wait for one


def read_rows(output):
    """The rows of a run's metrics.jsonl."""
    path = Path(output) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def environment(**changes):
    """The environment of a child process: one thread, this repository importable, no launcher's or hub's settings."""
    foreign = ("ACCELERATE_", "HF_", "WANDB_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", **changes}  # fmt: skip


def free_port():
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny random pipelines by family: sd1, sd2 (v-prediction, zero terminal SNR), sdxl."""
    from brisk import tiny

    folder = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sd2", "sdxl"):
        tiny.make_pipeline(family).save_pretrained(folder / family)
    return {family: folder / family for family in ("sd1", "sd2", "sdxl")}


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """The brace list of two shards of 16 synthetic pictures."""
    from brisk import tiny

    folder = tmp_path_factory.mktemp("shards")
    tiny.write_shards(folder)
    return f"{folder}/synthetic-{{00000..00001}}.tar"


@pytest.fixture(scope="session")
def base_flags(models, shards):
    """A function: (flags, family) -> a complete command line of two steps; later flags win over these."""

    def flags(*more, family="sd1"):
        more = [str(flag) for flag in more]
        data = [] if any(flag.startswith(SOURCES) for flag in more) else [f"--train_shards_path_or_url={shards}"]
        return [f"--pretrained_teacher_model={models[family]}", *data, "--resolution=32", "--train_batch_size=2",
                "--max_train_steps=2", "--log_every=1", "--validation_steps=0", "--report_to=none", "--seed=7",
                "--unet_time_cond_proj_dim=16" if "--use_lora" not in more else "--lora_rank=4", *more]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def run_main(base_flags, tmp_path_factory):
    """Train in this process: run_main(flag, ..., family=, output=) -> output folder, metrics rows, what stderr got.

    Errors pass through; `run_main.log()` is the stderr of the last run, also of a failed one.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    import train_splam_distill_sd_wds as script

    torch.set_num_threads(1)
    last = {}

    def run(*flags, family="sd1", output=None):
        output = Path(output or tmp_path_factory.mktemp("run") / "out")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        stderr = last["stderr"] = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                script.main(base_flags(f"--output_dir={output}", *flags, family=family))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # else the loader's processes live as long as the error
            raise
        finally:
            gc.collect()
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(output=output, rows=read_rows(output), log=stderr.getvalue())

    run.log = lambda: last["stderr"].getvalue()
    return run


class Forked:
    """A child process that runs the script with everything imported already; as killable as any, without the start-up."""

    def __init__(self, flags, log, prepare):
        """Args: `log`: file for its stderr; `prepare`: called in the child first."""
        self.log, self.returncode = log, None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(flags, prepare)

    def _run(self, flags, prepare):
        code = 70
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            file = open(self.log, "w", buffering=1)
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            tqdm.set_lock(threading.RLock())  # the bar's own lock is shared with the parent: a kill would leave it locked
            prepare()
            import train_splam_distill_sd_wds as script
            from brisk import options

            options.run(script.main, flags)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stderr.flush()
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(code)

    def poll(self):
        """The exit code (negative: the signal that ended it), None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=240):
        """Like `poll`, at its end; the run is killed after `timeout` seconds."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        return self.returncode

    def kill(self, number=signal.SIGKILL):
        """Send a signal to it and its loader processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def err(self):
        """Its stderr so far."""
        return self.log.read_text()


@pytest.fixture(scope="module")
def fork_script(run_main, base_flags, tmp_path_factory):
    """Start the script in a forked child: fork_script(flags, family=, prepare=, whole=) -> Forked; `whole`: flags as given."""
    started = []

    def start(*flags, family="sd1", prepare=lambda: None, whole=False):
        given = list(map(str, flags)) if whole else base_flags(*flags, family=family)
        started.append(Forked(given, tmp_path_factory.mktemp("forked") / "stderr.txt", prepare))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run_script(base_flags, tmp_path):
    """Run the script as a user does, in a new interpreter -> (exit code, stderr); `bare` leaves the standard flags out."""

    def run(*flags, env=None, bare=False):
        given = [str(flag) for flag in flags] if bare else base_flags(*flags)
        done = subprocess.run([sys.executable, str(SCRIPT), *given], env=environment(**env or {}), capture_output=True,
                              text=True, timeout=240)  # fmt: skip
        return done.returncode, done.stderr

    return run
