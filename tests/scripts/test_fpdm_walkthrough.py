"""The code on docs/fpdm.md: the walkthrough runs in order, as printed, and prints what stands below; the snippets run too."""

import contextlib
import importlib
import io
import re
import shlex
import signal

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT
from tiny_dit import make_network

from brisk import fpdm, tiny

PAGE = (ROOT / "docs/fpdm.md").read_text()
WALKTHROUGH = PAGE.split("## Walkthrough\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", WALKTHROUGH, re.DOTALL | re.MULTILINE)


def call(line):
    """Run a printed `python SCRIPT.py flags` in this process, without a trace of its state."""
    python, script, *flags = shlex.split(line)
    assert python == "python" and (ROOT / script).is_file()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    AcceleratorState._reset_state(True)
    try:
        importlib.import_module(script.removesuffix(".py")).main(flags)
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)
    return tmp_path


def test_blocks_run_in_order_and_print_what_is_shown(in_an_empty_folder):
    kinds = [*["python", "text"] * 3, "bash", "python", "python", "console", "bash", "python"]
    assert [language for language, _ in BLOCKS] == kinds
    names, printed = {}, ""
    for number, (language, body) in enumerate(BLOCKS):
        if language == "text":
            assert printed == body
        elif language == "console":  # measured
            assert re.sub(r"\d\.\d+", "", printed) == re.sub(r"\d\.\d+", "", body)
        elif language == "bash":
            for line in body.replace("\\\n", " ").splitlines():
                call(line)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as caught:
                exec(compile(body, f"docs/fpdm.md, walkthrough, block {number}", "exec"), names)
            printed = caught.getvalue()
            assert printed
    picture = (ROOT / "docs/fpdm_convergence.png").read_bytes()
    [drawn] = (in_an_empty_folder / "outputs/walkthrough/reuse").rglob("convergence.png")
    assert picture[:24] == drawn.read_bytes()[:24], "the page shows a picture of this kind and size"
    assert names["network"].config.fixed_point and not names["network"].training


def snippet(heading, part):
    """The one python block below a heading that has `part`, with what is printed replaced."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    [body] = [body for body in re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE) if part in body]
    for printed, here in (("torch.float16", "torch.float32"), ('"cuda"', '"cpu"'), ("steps=60", "steps=3")):
        body = body.replace(printed, here)
    return compile(body, f"docs/fpdm.md, {heading}", "exec")


def test_pipelines_sample_as_shown(in_an_empty_folder, capsys):
    network = make_network(num_classes=400)
    fpdm.save_pipeline(in_an_empty_folder / "results/runs/my-fpdm", network, tiny.make_vae("tiny"))
    stock, own = {}, {}
    exec(snippet("In diffusers", "DiTPipeline.from"), stock)
    assert stock["image"].size == (16, 16) and stock["pipe"].transformer.default_iterations == 4
    stock["pipe"].transformer.register_to_config(default_num_iters=2)
    assert stock["pipe"].transformer.default_iterations == 2
    exec(snippet("In diffusers", "import FPDMPipeline"), own)
    assert len(own["output"].images) == 2 and (in_an_empty_folder / "sample.png").is_file()
    assert float(capsys.readouterr().out) > 0


def test_an_official_file_is_read_as_shown(in_an_empty_folder):
    """Also one with no more than the weights and the size, as pretrained DiT weights become by wrapping them."""
    network = make_network(fixed_point=False, num_layers=12, hidden_size=384, num_attention_heads=6, patch_size=8, sample_size=8,
                           image_size=64)  # fmt: skip
    (in_an_empty_folder / "checkpoints").mkdir()
    weights = {**network.state_dict(), "pos_embed": torch.zeros(1, 256, 384)}
    args = {"model": "DiT-S/8", "image_size": 64, "num_classes": 10}
    torch.save({"model": weights, "args": args}, in_an_empty_folder / "checkpoints/0100000.pt")
    names = {}
    exec(snippet("What the output folder holds", "0100000.pt"), names)
    again = fpdm.load_transformer("outputs/from-pt")
    assert all(weight.equal(network.state_dict()[name]) for name, weight in again.state_dict().items())
