"""tests/warm_python.py: programs see and say there what they do in an interpreter of their own."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import environment

PROGRAM = """import json, os, signal, sys
if sys.argv[1:] == ["wait"]:
    print("up", flush=True)
    signal.pause()
print(json.dumps([__name__, sys.argv, sys.path, os.getcwd(), os.environ["MINE"], sys.stdin.read()]))
print("said", file=sys.stderr)
"""
ENDS = {"": 0, "sys.exit()": 0, "sys.exit(3)": 3, "sys.exit('in words')": 1, "raise ValueError('no')": 1,
        "os.kill(os.getpid(), 9)": 137}  # fmt: skip


@pytest.fixture
def program(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


@pytest.mark.parametrize("end", ENDS)
def test_a_program_is_told_and_tells_the_same(warm, program, end):
    program.write_text(PROGRAM + end)
    found = [subprocess.run([python, program, "a", "b c"], input="given", cwd=program.parent / "elsewhere", capture_output=True,
                            text=True, env=environment(MINE="x")) for python in (warm.python, sys.executable)]  # fmt: skip
    one, other = found
    assert one.stdout == other.stdout and json.loads(one.stdout)[0] == "__main__"
    assert one.stderr.splitlines()[-1] == other.stderr.splitlines()[-1] and one.stderr.startswith("said\n")
    assert one.returncode == ENDS[end] == (other.returncode if other.returncode >= 0 else 128 - other.returncode)


def test_a_signal_reaches_it(warm, program):
    process = subprocess.Popen([warm.python, program, "wait"], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
