"""A `python` without the start-up: a process that has imported everything forks a child for each command that it is sent.

`Warm` starts that process and leaves `Warm.python`, a command to call in place of the interpreter. The child has the caller's
arguments, folder, environment and streams, runs the program as `__main__`, and ends as an interpreter does; what libraries
read from the environment while they are imported (HF_HUB_OFFLINE) is the server's.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys

LENGTH = 4  # bytes that tell how long a message is


def call(place, words):
    """Have the server at `place` run the command `python WORDS`, with this process's streams; the exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [len(message).to_bytes(LENGTH)], [0, 1, 2])
        connection.sendall(message)
        with connection.makefile("r") as answers:
            child = int(answers.readline())
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, frame: os.kill(child, number))
            return int(answers.readline())


def serve(place):
    """Answer calls until the standard input ends; returns in the child of one, which is to run the words that are returned."""
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(place)
        door.listen(64)
        print("ready", flush=True)
        while True:
            if sys.stdin in select.select([door, sys.stdin], [], [])[0]:
                os._exit(0)
            connection, _ = door.accept()
            if os.fork():
                connection.close()
                continue
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            length, streams, *_ = socket.recv_fds(connection, LENGTH, 3)
            with connection.makefile("rb") as file:
                words, folder, environment = json.loads(file.read(int.from_bytes(length)))
            child = os.fork()
            if child:
                answer(connection, child, streams)
            connection.close()
            become(streams, folder, environment)
            return words


def answer(connection, child, streams):
    """Tell the caller the child's number, and at its end its exit code; ends this process."""
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % child)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if select.select([connection], [], [], 0.01)[0]:  # the caller is gone
                os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(ended[1])
        connection.sendall(b"%d\n" % (code if code >= 0 else 128 - code))
    os._exit(0)


def become(streams, folder, environment):
    """Take the caller's streams, folder, environment and number of threads."""
    import torch

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))


def run(words):
    """Run `python WORDS`: a file or -m with a module, and their arguments; the exit code."""
    import runpy
    import traceback

    words = words[words[0] == "-u" :]  # torchrun's; what is left unwritten is written at the end

    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as stop:
        if stop.code is not None and not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def leave(code):
    """End as an interpreter does, but for taking every object apart, which takes seconds."""
    import atexit
    import threading

    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def import_everything(root):
    """What the scripts import, most of it when they have read their flags."""
    import importlib

    import diffusers
    import transformers

    sys.path[0] = root
    for name in sorted(os.listdir(f"{root}/brisk")):
        if name.endswith(".py"):
            importlib.import_module(f"brisk.{name.removesuffix('.py')}")
    late = {diffusers: ("AutoencoderKL", "DDIMScheduler", "DiTPipeline", "StableDiffusionPipeline", "UNet2DConditionModel"),
            transformers: ("CLIPImageProcessor", "CLIPTextModel", "CLIPTokenizer")}  # fmt: skip
    for module, names in late.items():
        for name in names:
            getattr(module, name)
    for name in ("accelerate.commands.launch", "matplotlib.pyplot", "peft", "torch.utils.tensorboard", "torchmetrics"):
        importlib.import_module(name)
    sys.path[0] = ""  # of a program its folder


class Warm:
    """A server in a process of its own, which ends with this one; `python` calls it, with `bash` as BASH_ENV so does a script."""

    def __init__(self, folder, root, environment):
        import subprocess

        place, self.python, self.bash = f"{folder}/socket", f"{folder}/python", f"{folder}/bash_env"
        with open(self.python, "w") as file:
            file.write(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} call {place} "$@"\n')
        os.chmod(self.python, 0o755)
        with open(self.bash, "w") as file:  # a function comes before what is on the PATH
            file.write(f'python() {{ "{self.python}" "$@"; }}\n')
        command = [sys.executable, __file__, "serve", place, self.python, str(root)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, env=environment, **pipes)
        if self.process.stdout.readline() != b"ready\n":
            raise RuntimeError(self.process.stderr.read().decode())

    def close(self):
        self.process.communicate()


if __name__ == "__main__":
    task, place, *words = sys.argv[1:]
    if task == "call":
        sys.exit(call(place, words))
    sys.executable, root = words
    import_everything(root)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    leave(run(serve(place)))
