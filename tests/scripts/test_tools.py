"""The tools for bug reports and for comparing runs."""

import importlib.util
import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT, environment

from brisk.options import UserError

pytestmark = pytest.mark.quick


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare_runs, env_report = load("compare_runs"), load("env_report")


def write_run(folder, rows, tail=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(folder)


def row(step, loss, speed=2.0, **more):
    return {"step": step, "images": 4 * step, "loss": loss, "images_per_second": speed, "data_wait_share": 0.1,
            "peak_memory_gib": 1.0 + step / 10, **more}  # fmt: skip


@pytest.mark.parametrize("name", ("env_report", "compare_runs"))
def test_help_loads_no_model_library(name, tmp_path):
    code = (f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(ROOT / f'scripts/{name}.py')!r}, "
            "run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_env_report_runs_from_anywhere_without_an_installation(tmp_path):
    child = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/env_report.py"], capture_output=True, text=True, env=child, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = yaml.safe_load(done.stdout)
    assert {"torch", "diffusers", "accelerate"} <= set(report["packages"])
    assert {"python", "platform", "commit", "device", "cpu_cores", "gpus", "cuda"} <= set(report)


def test_env_report_shows_accelerates_defaults_and_no_secret(monkeypatch, tmp_path, capsys):
    import accelerate.commands.config.config_args as config_args

    defaults = tmp_path / "default_config.yaml"
    defaults.write_text("mixed_precision: bf16\nmain_process_ip: http://me:hunter2@host\n")
    monkeypatch.setattr(config_args, "default_config_file", str(defaults))
    monkeypatch.setenv("TORCH_API_TOKEN", "hf_abcdefgh12345678")
    monkeypatch.setenv("HF_TOKEN", "hf_zyxwvuts98765432")
    env_report.main(["--output", str(tmp_path / "report.yaml")])
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["accelerate_defaults"]["mixed_precision"] == "bf16"
    assert "hunter2" not in shown and "abcdefgh" not in shown and "zyxwvuts" not in shown
    assert (tmp_path / "report.yaml").read_text() == shown


def test_env_report_says_where_it_cannot_write(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        env_report.main(["--output", str(tmp_path / "none/report.yaml")])


def test_env_report_without_or_with_broken_defaults(monkeypatch, tmp_path):
    import accelerate.commands.config.config_args as config_args

    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    assert env_report.accelerate_defaults() is None
    (tmp_path / "none.yaml").write_text("a: [")
    assert "cannot be read" in env_report.accelerate_defaults()


def test_compare_runs_prints_common_steps_with_ratios(tmp_path, capsys):
    first = write_run(tmp_path / "a", [row(10, 0.5), row(20, 0.25), row(30, 0.2)])
    second = write_run(tmp_path / "b", [row(20, 0.5, speed=3.0), row(30, float("nan")), row(40, 0.1)])
    compare_runs.main([first, second])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"A {first}", f"B {second}"]
    table = {line.split()[0]: line.split() for line in lines[4:7]}
    assert list(table) == ["20", "30", "all"]
    assert table["20"][1:7] == ["0.25", "0.5", "2.000", "2", "3", "1.500"]
    assert table["30"][1:4] == ["0.2", "nan", "-"]
    assert table["all"][2] == "0.5" and table["all"][-2] == "4.00"


def test_compare_runs_prints_at_most_the_rows_asked_for_and_names_other_batches(tmp_path, capsys):
    first = write_run(tmp_path / "a", [row(step, 1.0) for step in range(1, 101)])
    second = write_run(tmp_path / "b", [row(step, 1.0, images=8 * step) for step in range(1, 101)])
    compare_runs.main([first, second, "--rows", "5"])
    out = capsys.readouterr().out
    steps = [line.split()[0] for line in out.splitlines()[4:9]]
    assert steps[0] == "1" and steps[-1] == "100" and len(set(steps)) == 5
    assert "global batches differ" in out and "400 images and B 800" in out


@pytest.mark.parametrize("rows", (1, 2))
def test_compare_runs_with_few_rows_ends_at_the_last_step(rows, tmp_path):
    steps = {step: row(step, 1.0) for step in range(10, 60, 10)}
    assert compare_runs.evenly(list(steps), rows)[-1] == 50


def test_compare_runs_takes_the_file_itself_and_overlooks_a_cut_last_line(tmp_path, capsys):
    first = write_run(tmp_path / "a", [row(10, 0.5)], tail='{"step": 20, "lo')
    compare_runs.main([first + "/metrics.jsonl", first])
    assert "1 common steps" in capsys.readouterr().out


@pytest.mark.parametrize("case, words", (
    ("missing", "is neither an output folder"), ("empty", "logged nothing yet"), ("broken", "line 1 is not a row"),
    ("other", "share no step"),
))  # fmt: skip
def test_compare_runs_says_what_is_wrong(case, words, tmp_path):
    good = write_run(tmp_path / "good", [row(10, 0.5)])
    if case != "missing":
        content = {"empty": "", "broken": "3\n{}\n", "other": json.dumps(row(11, 1.0)) + "\n"}[case]
        (tmp_path / case).mkdir()
        (tmp_path / case / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        compare_runs.main([good, str(tmp_path / case)])
    assert caught.value.exit_code == 2


def test_compare_runs_fails_with_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, ROOT / "scripts/compare_runs.py", tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
