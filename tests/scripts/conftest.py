"""What the script tests share: tiny teachers, shards, a training script called in this process or in its own."""

import contextlib
import functools
import gc
import importlib
import io
import json
import multiprocessing
import os
import random
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
SOURCES = ("--train_shards_path_or_url", "--train_data_dir", "--dataset_name", "--precomputed_shards", "--cached_latents",
           "--config", "--feature_path", "--synthetic_data")  # fmt: skip
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask a network, nor wait for one
pytest.register_assert_rewrite("ranks", "refusals")
import warm_python  # noqa: E402 - torch reads these settings when it is imported
from inprocess import BKSDM, EPD, FPDM, OWN, SLAM, remembered_plans  # noqa: E402
from progress_bars import close_bars  # noqa: E402


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
    """A TCP port that nothing listens on, and that the system gives to no connection of its own choice meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """`warm.python`: a command in place of the interpreter; `warm.bash`: a BASH_ENV with which `python` in a script is that."""
    server = warm_python.Warm(tmp_path_factory.mktemp("warm"), ROOT, environment())
    yield server
    server.close()


@pytest.fixture
def run_shell(warm, tmp_path):
    """Run a script of scripts/ to its end in an empty folder: run_shell(name, flag, ..., VARIABLE=value) -> what it printed."""

    def run(name, *flags, **variables):
        done = subprocess.run(["bash", ROOT / "scripts" / name, *flags], cwd=tmp_path, capture_output=True, text=True,
                              env=environment(**{"BASH_ENV": warm.bash, **variables}))  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of random pipelines by family of `tiny.make_pipeline`, made when first asked for."""
    from brisk import tiny

    class Models(dict):
        def __missing__(self, family):
            self[family] = tmp_path_factory.mktemp("models") / family
            tiny.make_pipeline(family).save_pretrained(self[family])
            return self[family]

    return Models()


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """The brace list of two shards of 16 synthetic pictures."""
    from brisk import tiny

    folder = tmp_path_factory.mktemp("shards")
    tiny.write_shards(folder)
    return f"{folder}/synthetic-{{00000..00001}}.tar"


@pytest.fixture(scope="session")
def base_flags(models, shards):
    """A function: (flags, family, script) -> a complete command line of two steps; later flags win over these."""

    def flags(*more, family="sd1", script=SLAM):
        more = [str(flag) for flag in more]
        if script == FPDM:
            data = [] if any(flag.startswith(SOURCES) for flag in more) else ["--synthetic_data=64"]
            return [*data, "--max_train_steps=2", "--log_every=1", "--report_to=none", "--seed=7", *OWN[FPDM], *more]
        if script == EPD:
            own = OWN[EPD] if not any(flag.startswith(("--config", "--pretrained")) for flag in more) else ["--nosubdir"]
            return ["--max_train_steps=2", "--log_every=1", "--report_to=none", "--seed=7", *own, *more]
        data = [] if any(flag.startswith(SOURCES) for flag in more) else [f"--train_shards_path_or_url={shards}"]
        own = OWN[script] if "--use_lora" not in more else ["--validation_steps=0", "--lora_rank=4"]
        own = [*own, "--preset=tiny_sd_xl"] if family == "toy_sdxl" and script == BKSDM else own
        return [f"--pretrained_teacher_model={models[family]}", *data, "--resolution=32", "--train_batch_size=2",
                "--max_train_steps=2", "--log_every=1", "--report_to=none", "--seed=7", *own, *more]  # fmt: skip

    return flags


@pytest.fixture(scope="session")
def run_main(base_flags, tmp_path_factory):
    """Train in this process: run_main(flag, ..., family=, output=, script=) -> output folder, metrics rows, stderr's text.

    Errors pass through; `run_main.log()` is the stderr of the last run, also of a failed one.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    last = {}

    def run(*flags, family="sd1", output=None, script=SLAM):
        output = Path(output or tmp_path_factory.mktemp("run") / "out")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        stderr = last["stderr"] = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr), remembered_plans():
                importlib.import_module(script).main(base_flags(f"--output_dir={output}", *flags, family=family, script=script))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # else the loader's processes live as long as the error
            raise
        finally:
            close_bars()
            gc.collect()
            if script not in last:  # what its libraries made stays for good, and need not be searched after every run
                last[script] = True
                gc.freeze()
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return SimpleNamespace(output=output, rows=read_rows(output), log=stderr.getvalue())

    run.log = lambda: last["stderr"].getvalue()
    return run


@pytest.fixture(scope="session")
def run_bksdm(run_main):
    """`run_main` of the BK-SDM script, by default on the SD1 teacher that has every block."""
    run = functools.partial(run_main, script=BKSDM, family="toy_sd1")
    run.log = run_main.log
    return run


@pytest.fixture(scope="session")
def run_fpdm(run_main):
    """`run_main` of the FPDM script: a tiny plain DiT on made-up latents unless flags say otherwise."""
    run = functools.partial(run_main, script=FPDM)
    run.log = run_main.log
    return run


@pytest.fixture(scope="session")
def run_epd(run_main):
    """`run_main` of the EPD script: three noise levels of a mixture of Gaussians unless flags say otherwise."""
    run = functools.partial(run_main, script=EPD)
    run.log = run_main.log
    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of six pictures, each with a caption of its own."""
    import numpy as np

    from brisk import tiny

    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(6):
        tiny.random_image(rng, 40, 48).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{number} red squares")
    return folder


@pytest.fixture
def calls_of(monkeypatch):
    """A function (module, name): replaces module.name by itself, noting (arguments, keyword arguments, result) of each call."""

    def note(module, name):
        calls, original = [], getattr(module, name)

        def wrapper(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append((args, kwargs, result))
            return result

        monkeypatch.setattr(module, name, wrapper)
        return calls

    return note


@pytest.fixture
def signal_at(monkeypatch):
    """A function (number, step): the process sends itself the signal while that step is logged."""

    def arrange(number, step):
        from brisk import runlog

        flush = runlog.RunLog.flush

        def flush_and_signal(self, at, *args, **named):
            if at == step:
                os.kill(os.getpid(), number)
            return flush(self, at, *args, **named)

        monkeypatch.setattr(runlog.RunLog, "flush", flush_and_signal)

    return arrange


class Forked:
    """A child process that runs a script with everything imported already; as killable as any, without the start-up."""

    def __init__(self, flags, log, prepare, script):
        """Args: `log`: file for its stderr; `prepare`: called in the child first; `script`: module name."""
        self.log, self.returncode = log, None
        self.pid = os.fork()
        if self.pid == 0:
            self._run(flags, prepare, script)

    def _run(self, flags, prepare, script):
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
            from brisk import options

            with remembered_plans():
                options.run(importlib.import_module(script).main, flags)
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
    """Start a script in a forked child: fork_script(flags, family=, prepare=, whole=, script=) -> Forked; `whole`: as given."""
    started = []

    def start(*flags, family="sd1", prepare=lambda: None, whole=False, script=SLAM):
        importlib.import_module(script)  # here, so that children start with it
        given = list(map(str, flags)) if whole else base_flags(*flags, family=family, script=script)
        started.append(Forked(given, tmp_path_factory.mktemp("forked") / "stderr.txt", prepare, script))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run_script(base_flags, tmp_path):
    """Run a script as a user does, in a new interpreter -> (exit code, stderr); `bare` leaves the standard flags out."""

    def run(*flags, env=None, bare=False, script=SLAM, family="sd1"):
        given = [str(flag) for flag in flags] if bare else base_flags(*flags, family=family, script=script)
        done = subprocess.run([sys.executable, ROOT / f"{script}.py", *given], env=environment(**env or {}),
                              capture_output=True, text=True, timeout=240)  # fmt: skip
        return done.returncode, done.stderr

    return run
