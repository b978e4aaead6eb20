"""The benchmark of EPD-Solver: what its rows do is what they say, nothing waits for the device, the figures are written."""

import json
import sys

import pytest
import torch
from conftest import ROOT
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(ROOT / "scripts"))  # the benchmarks import each other as scripts do
import bench_latency  # noqa: E402
import bench_latency_epd  # noqa: E402

from brisk import denoisers, options, sigmas, tiny  # noqa: E402

NAMES = ["Euler, equal calls", "EPD, batched", "EPD, looped", "EPD, batched, AFS", "Euler, equal total"]


@pytest.fixture
def small(monkeypatch):
    """Networks with few blocks for the sizes tiny and sdxl."""

    def make_unet(size, device):
        torch.manual_seed(0)
        with torch.device(device):
            return tiny.make_unet({"tiny": "tiny", "sdxl": "tiny_xl"}[size]).requires_grad_(False).eval(), 7

    monkeypatch.setattr(bench_latency_epd, "make_unet", make_unet)


def make(*flags):
    """The entries of the benchmark by (name, batch size), and their U-Net."""
    args = bench_latency.parse_args(["--method=epd", "--steps=2", "--afs", *flags])
    entries, side = bench_latency_epd.make_entries(args, torch.device("cpu"), torch.float32)
    assert side == 8
    return {(entry.name, entry.batch_size): entry for entry in entries}, entries[0].network


@pytest.mark.parametrize("size", ["tiny", "sdxl"])
def test_figures_are_what_the_network_sees(size, small):
    entries, unet = make("--batch_sizes=1,2", "--num_points=3", f"--size={size}")
    assert list(entries) == [(name, batch) for batch in (1, 2) for name in NAMES]
    seen, made = [], {}
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for (name, batch), entry in entries.items():
        made[name, batch] = entry.call()
        assert len(seen) == entry.figures["calls"] and sum(seen) == entry.figures["rows"] * batch
        assert set(seen) == {2 * batch * points for points in ((1, 3) if "batched" in name else (1,))}
        seen.clear()
    counted = [entries[name, 1].figures for name in NAMES]
    assert [figures["calls"] for figures in counted] == [4, 4, 8, 3, 8]
    assert [figures["rows"] for figures in counted] == [8, 16, 16, 14, 16]
    torch.testing.assert_close(made["EPD, looped", 2], made["EPD, batched", 2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(made["EPD, batched, AFS", 2], made["EPD, batched", 2], rtol=0.01)


def test_without_guidance_there_is_one_row_per_point(small):
    guided, plain = (make(*flags)[0] for flags in ([], ["--guidance_scale=1"]))
    for key, entry in plain.items():
        assert 2 * entry.figures["rows"] == guided[key].figures["rows"] and entry.figures["calls"] == guided[key].figures["calls"]


class Copies(TorchDispatchMode):
    """How many tensors come from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), named=None):
        named = named or {}
        if function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            self.count += named.get("device", args[0].device).type != "cpu"
        return function(*args, **named)


def test_no_call_waits_for_the_device(small, monkeypatch):
    """On the meta device, where reading a number raises. Copies to a device wait for it: only the tables come, once a run."""
    own = bench_latency_epd.make_denoiser(*bench_latency_epd.make_unet("tiny", "cpu"))
    monkeypatch.setattr(sigmas, "sigma_range", lambda table: (own.sigma_min, own.sigma_max))
    there = bench_latency_epd.make_denoiser(*bench_latency_epd.make_unet("tiny", "meta"))
    assert there.table.log_signal.is_meta
    direction, x = denoisers.direction_for(there, ["", ""], 2, "cfg", 7.5), torch.zeros(2, *there.shape, device="meta")
    counts = []
    for intervals in (2, 4):
        for sampler in bench_latency_epd.make_samplers(own, intervals, 2, True).values():
            with Copies() as copies:
                assert bench_latency_epd.sample(sampler, direction, x).shape == x.shape
            counts.append(copies.count)
    assert counts == [0, 4, 4, 4, 0] * 2


def test_no_call_searches_the_modules_of_the_network(small, monkeypatch):
    """Which `ModelMixin.dtype` does, for milliseconds in an SDXL U-Net."""
    entries, unet = make()

    def refuse(self):
        raise AssertionError

    monkeypatch.setattr(type(unet), "dtype", property(refuse), raising=False)
    for entry in entries.values():
        entry.call()


def test_compiles_once_per_number_of_rows(small, monkeypatch):
    counter, compile = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, dynamic: compile(self, backend=counter, dynamic=dynamic))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):  # monkeypatch would leave the option hidden
        entries, _ = make("--compile", "--batch_sizes=1,2", "--guidance_scale=1")
        for entry in [*entries.values()] * 2:
            entry.call()
    assert counter.frame_count == 3  # 1, 2 and 4 rows
    torch._dynamo.reset()


def test_command_prints_a_table_per_batch_size_and_writes_the_ratios(tmp_path, capsys):
    output = tmp_path / "l.json"
    bench_latency.main(["--method=epd", "--steps=2", "--batch_sizes=1,2", "--warmup=0", "--repeats=2", f"--output={output}"])
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
    wanted = [name for name in NAMES if "AFS" not in name]
    assert [(row["batch_size"], row["model"]) for row in report["models"]] == [(batch, name) for batch in (1, 2) for name in wanted]
    assert (report["steps"], report["num_points"], report["guidance_scale"], report["batch_sizes"]) == (2, 2, 7.5, [1, 2])
    for first in (0, 4):
        rows = report["models"][first : first + 4]
        assert rows[0]["ratio_to_first"] == rows[0]["ratio_to_equal_calls"] == 1
        for row in rows:
            ratio = row["median_seconds"] / rows[0]["median_seconds"]
            assert len(row["seconds"]) == 2 and row["ratio_to_first"] == pytest.approx(ratio)
            assert row["ratio_to_equal_calls"] == pytest.approx(ratio * 4 / row["calls"])
            assert row["seconds_per_image"] == pytest.approx(row["median_seconds"] / row["batch_size"])
        batched = rows[1]["ratio_to_equal_calls"]
        assert f"EPD with batched points takes {batched:.3f} of the time of 4 plain calls" in shown
    assert shown.count("EPD, looped") == 2 and "batch 2, 2 intervals of 2 points with guidance, fp32" in shown


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--batch_sizes=1,x"], "--batch_sizes 1,x: write numbers from 1, as in 1,2,4."),
        (["--batch_sizes=0"], "--batch_sizes 0: write numbers from 1"),
        (["--size=s2"], "--size s2 is none of --method epd: tiny, sd15, sd21, sdxl."),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence):
    with pytest.raises(options.UserError, match=sentence):
        bench_latency.main(["--method=epd", *flags])


@pytest.mark.parametrize(
    "flags, flag", [(["--method=bksdm", "--num_points=3"], "num_points"), (["--method=epd", "--plans=2x2"], "plans")]
)
def test_idle_flags_are_named(flags, flag, capsys):
    bench_latency.parse_args(flags)
    assert f"--{flag} has no effect without" in capsys.readouterr().out
