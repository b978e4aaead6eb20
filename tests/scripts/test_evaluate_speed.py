"""evaluate.py's flags of speed: compiled networks draw and cost the same, TF32 on request."""

import json

import numpy as np
import pytest
import random_predictor
import tiny_pipelines
import torch
from accelerate.state import PartialState
from PIL import Image
from safetensors.torch import save_file
from torch._dynamo.testing import CompileCounter

import evaluate
from brisk import edm_nets, predictor_files

EDM = {"img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_type": "SongUNet", "model_channels": 8, "channel_mult": [1],
       "num_blocks": 1, "attn_resolutions": []}  # fmt: skip


def write_model(name, folder):
    """Fill `folder` with a tiny random model; the class of its network."""
    if name == "predictor":
        (folder / "edm").mkdir()
        torch.manual_seed(0)
        save_file(edm_nets.make_network(EDM).state_dict(), folder / "edm/model.safetensors")
        (folder / "edm/config.json").write_text(json.dumps(EDM))
        content = random_predictor.make_predictor(num_steps=3, backend="edm", img_resolution=8,
                                                  backend_config={"model_name_or_path": str(folder / "edm")})  # fmt: skip
        predictor_files.write(content, folder / "predictor.json")
        return "SongUNet"
    pipe = tiny_pipelines.make("cm" if name == "unet" else "fpdm")
    if name == "unet":
        pipe.save_pretrained(folder)
        return "UNet2DModel"
    pipe.transformer.save_pretrained(folder / "transformer")  # as train_fpdm.py writes it
    pipe.vae.save_pretrained(folder / "vae")
    return "FPDMTransformer2DModel"


@pytest.fixture(autouse=True, scope="module")
def alone():
    """The processes of other tests' runs, and of these, are forgotten."""
    PartialState._reset_state()
    yield
    PartialState._reset_state()


@pytest.mark.parametrize("name", ["unet", "transformer", "predictor"])
def test_a_compiled_network_draws_the_same_and_is_counted_the_same(name, tmp_path, monkeypatch):
    """torch.compile is real but for the last part, which makes machine code of the graphs."""
    (tmp_path / "model").mkdir()
    network, called, counter, real = write_model(name, tmp_path / "model"), [], CompileCounter(), torch.compile

    def noting_compile(function):
        compiled = real(function, backend=counter)
        return lambda *given, **named: called.append(type(function.__self__).__name__) or compiled(*given, **named)

    monkeypatch.setattr(torch, "compile", noting_compile)
    rows, pictures = [], []
    for flags in ([], ["--compile"]):
        output = tmp_path / f"out{len(rows)}"
        evaluate.main(["--protocol", "custom", "--model", f"x={tmp_path / 'model'}", "--samples", "1", "--nfe", "4", "--metrics",
                       "none", "--latency_repeats", "1", "--output_dir", str(output), *flags])  # fmt: skip
        report = json.loads((output / "report.json").read_text())
        assert report["record"]["compile"] is bool(flags) and bool(called) is bool(flags)
        rows.append({name: report["x"]["4"][name] for name in ("nfe", "total_nfe", "gmacs_per_image", "parameters", "images")})
        pictures.append(np.asarray(Image.open(next(output.rglob("000000.png")))).astype(int))
    torch._dynamo.reset()
    assert called == [network] * 24, "6 images of 4 calls: the one that is kept, two whose calls are noted, three for times"
    assert counter.frame_count > 0 and rows[0] == rows[1]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and pictures[0].std() > 1


def test_allow_tf32_sets_the_backends_and_is_written_down(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/0.png")
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for flags, allowed in (([], False), (["--allow_tf32"], True), (["--allow_tf32", "False"], False)):
            evaluate.main(["--protocol", "custom", "--images", str(tmp_path / "images"), "--metrics", "none", "--output_dir",
                           str(tmp_path / "out"), *flags])  # fmt: skip
            assert [backend.allow_tf32 for backend in backends] == [allowed] * 2
            assert json.loads((tmp_path / "out/report.json").read_text())["record"]["allow_tf32"] is allowed
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was
