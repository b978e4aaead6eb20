"""The shape of the repository: layers, stages of the scripts, sizes, no host synchronisation in the training loops."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inprocess import EPD, FPDM, SLAM, make_inputs, train

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = {path.stem: path for path in sorted((ROOT / "brisk").glob("*.py"))}
SCRIPTS = sorted(ROOT.glob("train_*.py"))
FILES = [*PACKAGE.values(), *sorted(ROOT.glob("*.py")), *sorted((ROOT / "scripts").glob("*.py"))]

TENSORS = {"schedules", "sigmas", "fixed_point", "dirichlet", "metrics"}
METHODS = {"splam", "bksdm", "feature_taps", "dit", "gaussian", "edm_nets", "solvers", "epd", "epd_distill",
           "epd_policy", "denoiser_maps", "mixture"}  # fmt: skip
BLOCKS = {
    "dit": {"fixed_point"}, "bksdm": {"feature_taps"}, "epd": {"solvers"},
    "epd_distill": {"epd", "solvers"}, "epd_policy": {"epd"},
}  # fmt: skip
# plumbing that may build a method's network
BUILDERS = {"tiny", "denoisers", "pipeline_denoisers", "text_denoisers", "denoiser_sources", "sd_models", "students", "fpdm",
            "fpdm_options", "fpdm_sampling", "predictor", "epd_scheduler", "epd_sampling", "epd_validation", "epd_rl",
            "rewards", "eval_checkpoints"}  # fmt: skip
STAGES = [
    "1 options", "2 accelerator and seeds and log", "3 models (frozen, trainable)", "4 memory and precision",
    "5 EMA and optimizer", "6 data", "7 schedule and prepare", "8 state and resume", "9 manifest and dry run",
    "10 loop",
    "10a batch", "10b encode or read cache", "10c noise and time", "10d teacher", "10e student", "10f loss",
    "10g backward, clip, step, EMA", "10h log", "10i save", "10j validate", "11 export",
]  # fmt: skip


def imported(path):
    """(names of other packages, names of this package's modules) that a file imports anywhere."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            names = [f"brisk.{alias.name}" for alias in node.names] if node.module == "brisk" else [node.module]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            (inside if first == "brisk" else outside).add(rest.split(".")[0] if first == "brisk" else first)
    return outside, inside


@pytest.mark.parametrize("module", [name for name in PACKAGE if name != "__init__"])
def test_a_module_imports_only_from_the_layers_below_it(module):
    outside, inside = imported(PACKAGE[module])
    if module in TENSORS | METHODS:
        foreign = outside - {"torch", "numpy"} - set(sys.stdlib_module_names)
        assert not foreign, f"brisk/{module}.py is tensors only, it imports {foreign}"
        allowed = BLOCKS.get(module, set()) | (TENSORS if module in METHODS else set())
        assert inside <= allowed
    elif module not in BUILDERS:
        assert not inside & METHODS, "plumbing does not know the methods"


def test_every_module_has_a_docstring_and_the_package_itself_is_empty():
    assert PACKAGE["__init__"].read_text().strip() == ""
    assert [
        path.name for path in FILES if path.stem != "__init__" and not ast.get_docstring(ast.parse(path.read_text()))
    ] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_have_the_same_stages_in_the_same_order(script):
    found = re.findall(r"^ +# (\d+[a-j]? .*)$", script.read_text(), re.MULTILINE)
    assert [stage.split(":")[0] for stage in found] == STAGES


def main_of(script):
    tree = ast.parse(script.read_text())
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_training_loop_reads_nothing_from_the_device(script):
    first = next(n for n, line in enumerate(script.read_text().splitlines(), 1) if line.strip() == "# 10a batch")
    loops = [
        n for n in ast.walk(main_of(script)) if isinstance(n, (ast.While, ast.For)) and n.lineno < first <= n.end_lineno
    ]
    assert loops
    calls = [node.func for node in ast.walk(loops[0]) if isinstance(node, ast.Call)]
    reading = [c.attr for c in calls if isinstance(c, ast.Attribute) and c.attr in ("item", "tolist", "cpu", "numpy")]
    assert reading == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 450


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_main_stays_short(script):
    assert main_of(script).end_lineno - main_of(script).lineno + 1 <= 250


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_works_and_loads_no_heavy_library(script):
    code = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    heavy = {"torch", "diffusers", "transformers", "accelerate"} & set(sys.modules)
    print("CODE", stop.code, "HEAVY", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("CODE 0 HEAVY []"), done.stdout[-300:] + done.stderr
    assert "--output_dir" in done.stdout and "--config" in done.stdout


def texts():
    """(path, text) of every text file that belongs to the repository."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    skipped = (".git", ".venv", "outputs")
    names = listed.stdout.splitlines() or [str(p.relative_to(ROOT)) for p in ROOT.rglob("*") if p.is_file()]
    for name in names:
        path = ROOT / name
        if name.split("/")[0] in skipped or not path.is_file() or path.stat().st_size > 2**20:
            continue
        try:
            yield name, path.read_text()
        except UnicodeDecodeError:
            continue


def test_no_file_knows_the_machine_it_was_written_on():
    outside = ("/" + "work/", "/" + "root/", ".." + "/shared", "/" + "tmp/v/")
    found = [(name, word) for name, text in texts() for word in outside if word in text]
    assert found == []
    assert len(list(texts())) > 40


READING = ("item", "__bool__", "__float__", "__int__", "__index__", "tolist", "cpu", "numpy")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        (SLAM, ()), (SLAM, ("--gradient_accumulation_steps=2", "--subpath_param=snr", "--gamma_one_prob=0.5")),
        (SLAM, ("--use_lora", "--lora_ema")), (SLAM, ("--mixed_precision=bf16",)),
        (FPDM, ()), (FPDM, ("--fixed_point", "--gradient_accumulation_steps=2", "--predict_v", "--use_zero_terminal_snr")),
        (FPDM, ("--fixed_point", "--flow", "--mixed_precision=bf16", "--fp_grad_checkpointing")),
        (EPD, ("--update_mode=per_step", "--sampler_stu=ipndm", "--batch_gpu=4", "--gradient_checkpointing")),
        (EPD, ("--update_mode=joint", "--ema_decay=0.9", "--max_branch_batch=3", "--guidance_type=cfg", "--guidance_rate=2")),
    ],
    ids=["full", "accumulation", "lora", "bf16", "dit", "fpdm", "flow", "epd", "epd-guided"],
)  # fmt: skip
def test_steps_between_two_log_lines_never_wait_for_the_device(tmp_path, monkeypatch, script, flags):
    """Every read of a tensor's value by our code would stall a GPU; only steps that log may do it."""
    from brisk import runlog

    watching, steps, reads = [False], [], []

    def watched(name):
        real = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            caller = sys._getframe(1)
            file = Path(caller.f_code.co_filename)
            if watching[0] and file.is_relative_to(ROOT) and "site-packages" not in file.parts:
                reads.append(f"{name} in {file.name}:{caller.f_lineno}")
            return real(self, *args, **kwargs)

        return read

    for name in READING:
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    next_batch, due = runlog.RunLog.next_batch, runlog.RunLog.due

    def watch_from_here(self, batches):
        watching[0] = False
        batch = next_batch(self, batches)
        watching[0] = True
        return batch

    def stop_if_logging(self, step):
        answer = due(self, step)
        watching[0] = not answer
        steps.append(answer)
        return answer

    monkeypatch.setattr(runlog.RunLog, "next_batch", watch_from_here)
    monkeypatch.setattr(runlog.RunLog, "due", stop_if_logging)
    train(tmp_path / "out", *make_inputs(tmp_path, script=script), "--max_train_steps=4", "--log_every=4", *flags, script=script)
    assert steps == [False, False, False, True]
    assert reads == []
    watching[0] = True  # the watch itself works
    code = compile("def probe(t):\n    return float(t), t.item(), bool(t), t.tolist()", str(ROOT / "probe.py"), "exec")
    space = {}
    exec(code, space)
    space["probe"](torch.ones(()))
    watching[0] = False
    assert [read.split()[0] for read in reads] == ["__float__", "item", "__bool__", "tolist"]
