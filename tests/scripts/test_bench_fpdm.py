"""The benchmarks of FPDM: every row does the training script's step, what it costs is counted right, the figures are written."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from inprocess import FPDM, OWN

sys.path.append(str(ROOT / "scripts"))  # the benchmarks import each other as scripts do
import bench_latency  # noqa: E402
import bench_latency_fpdm  # noqa: E402
import bench_step  # noqa: E402
import bench_step_fpdm  # noqa: E402

import train_fpdm  # noqa: E402
from brisk import dit, options, runlog  # noqa: E402

CPU = torch.device("cpu")
PAIRS = [(3, 2), (1, 3), (0, 1)]
SETTINGS = {setting.name: setting for setting in bench_step.rows(True, "fpdm")}
OURS = "+ no host sync"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The size `tiny` is that of the script tests."""
    monkeypatch.setitem(bench_step_fpdm.NETWORKS, "tiny", OWN[FPDM])


def make(name, batch_size=2):
    """The row `name` on the tiny network."""
    setting = SETTINGS[name]
    args = bench_step_fpdm.parse("tiny", setting.fixed_point)
    network = bench_step_fpdm.make_network(args)
    return bench_step_fpdm.Fpdm(setting, network, args, PAIRS, batch_size, torch.float32, CPU)


@pytest.fixture
def norms(monkeypatch):
    """The norms of the gradients that the rows clip."""
    noted, clip = [], torch.nn.utils.clip_grad_norm_

    def note(*args, **named):
        noted.append(clip(*args, **named))
        return noted[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    return noted


def take(name, norms):
    """(loss, norm of the gradient) of three steps of a row, (3, 2)."""
    bench, first = make(name), len(norms)
    losses = [bench.step(number) for number in range(3)]
    return torch.stack([torch.stack(losses), torch.stack(norms[first:])], 1)


def test_every_row_takes_the_same_steps(norms):
    kinds = {True: "FPDM, plain", False: "DiT"}
    wanted = {kind: take(name, norms) for kind, name in kinds.items()}
    assert all(steps.unique().numel() == 6 for steps in wanted.values())
    others = [setting for setting in SETTINGS.values() if not setting.compiled and setting.name not in kinds.values()]
    assert len(others) == 6
    for setting in others:
        found = take(setting.name, norms)
        torch.testing.assert_close(found[0], wanted[setting.fixed_point][0], rtol=1e-5, atol=0, msg=setting.name)
        # AdamW's first steps turn rounding of near-zero gradients into whole steps
        torch.testing.assert_close(found, wanted[setting.fixed_point], rtol=1e-3, atol=0, msg=setting.name)


def test_rows_differ_in_what_they_record_and_hoist(monkeypatch):
    counts, iteration = [], dit.DiT.iteration
    monkeypatch.setattr(dit.DiT, "iteration", lambda *inputs: counts.append(torch.is_grad_enabled()) or iteration(*inputs))
    recorded, block = [], dit.Block.forward
    monkeypatch.setattr(dit.Block, "forward", lambda *inputs: recorded.append(torch.is_grad_enabled()) or block(*inputs))
    found = {}
    for name in ("FPDM, plain", "+ true no-grad", "+ hoisting"):
        make(name).step_with(0, (3, 2))
        found[name] = (counts.copy(), recorded.copy())
        counts.clear(), recorded.clear()
    assert found["FPDM, plain"] == ([], [True] * 7)  # one block before and one after
    assert found["+ true no-grad"] == ([], [True] + [False] * 3 + [True] * 3)
    assert found["+ hoisting"] == ([False] * 3 + [True] * 2, [True] * 2)


@pytest.mark.parametrize("fixed_point", [True, False])
def test_rows_take_the_steps_of_the_training_script(fixed_point, run_fpdm, norms, monkeypatch):
    initialize, next_batch, batches = dit.DiT.initialize, runlog.RunLog.next_batch, []

    def open_too(network):
        initialize(network)
        bench_step_fpdm.open_gates(network)

    def note(run_log, source):
        batches.append(next_batch(run_log, source))
        return batches[-1]

    monkeypatch.setattr(dit.DiT, "initialize", open_too)
    monkeypatch.setattr(runlog.RunLog, "next_batch", note)
    run = run_fpdm(f"--fixed_point={fixed_point}", "--seed=0", "--max_train_steps=3")
    bench = make(OURS if fixed_point else "DiT", batch_size=4)
    assert {name: (value.shape, value.dtype) for name, value in bench.batch.items()} == {
        name: (batches[0][name].shape, batches[0][name].dtype) for name in bench.batch
    }
    norms.clear()
    found = []
    for number, batch in enumerate(batches):
        bench.batch = batch
        found.append(bench.step_with(number, train_fpdm.draw_iterations(bench.args, 0, number)).item())
    assert found == pytest.approx([row["loss"] for row in run.rows], rel=1e-5)
    assert [norm.item() for norm in norms] == pytest.approx([row["grad_norm"] for row in run.rows], rel=1e-3)


def test_memory_of_our_step_grows_with_m_alone():
    def peaks(name, *pairs):
        bench = make(name, batch_size=16)
        bench.step(0)
        return [bench_step_fpdm.peak_on_top(CPU, lambda pair=pair: bench.step_with(0, pair)) for pair in pairs]

    few, some, many, *with_n = peaks(OURS, (0, 4), (0, 8), (0, 12), (10, 4), (10, 12))
    assert many - some == pytest.approx(some - few, rel=0.02) and some > 1.5 * few
    assert with_n == pytest.approx([few, many], rel=0.02)
    recorded, one = peaks("FPDM, plain", (10, 1), (0, 1))
    assert recorded > 3 * one
    start, end = peaks("FPDM, recomputed", (0, 4), (0, 12))
    assert end - start < (many - few) / 5


@pytest.mark.parametrize("count", [1, 2, 11, 24])
def test_timed_pairs_have_the_means_of_the_training_draws(count):
    pairs = bench_step_fpdm.stratified_pairs(bench_step_fpdm.parse("xl2", True), count)
    assert len(pairs) == count
    n, m = zip(*pairs, strict=True)
    assert sum(n) == 5 * count and abs(2 * sum(m) - 13 * count) == count % 2
    assert 0 <= min(n) and max(n) == n[0] <= 10 and 1 <= min(m) and max(m) <= 12
    if count == 24:
        assert set(n) == set(range(11)) and set(m) == set(range(1, 13))
        assert abs(torch.corrcoef(torch.tensor([n, m]).double())[0, 1]) < 0.3


def test_floor_of_xl_is_that_of_the_paper_network():
    args = {kind: bench_step_fpdm.parse("xl2", kind) for kind in (True, False)}
    config = SimpleNamespace(**bench_step_fpdm.fpdm_options.network_config(args[True]))
    assert (config.hidden_size, config.num_layers, config.sample_size) == (1152, 28, 32)
    # 28 blocks, 12 D^2 + 2 T D multiply-accumulates each, for 256 tokens
    assert bench_step_fpdm.macs_per_image(config, None) == 3 * 28 * 256 * (12 * 1152**2 + 2 * 256 * 1152)
    block, square = 256 * (12 * 1152**2 + 2 * 256 * 1152), 256 * 1152**2
    once, iteration = 2 * block + 3 * square, block + 4 * square
    pairs = bench_step_fpdm.stratified_pairs(args[True], 24)
    assert bench_step_fpdm.macs_per_image(config, pairs) == pytest.approx(3 * once + (5 + 3 * 6.5) * iteration)


def test_step_command_prints_the_table_and_writes_the_ratios(tmp_path, capsys):
    output = tmp_path / "b.json"
    bench_step.main(["--method=fpdm", "--size=tiny", "--mixed_precision=bf16", "--batch_size=2", "--steps=2", "--warmup=0",
                     "--repeats=2", f"--output={output}"])  # fmt: skip
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == [setting.name for setting in bench_step.rows(False, "fpdm")]
    assert list(rows)[:3] == ["DiT", "DiT, recomputed", "FPDM, plain"] and len(rows) == 8
    assert len(report["pairs"]) == 2
    assert rows["FPDM, plain"]["ratio_to_plain"] == 1 and "ratio_to_plain" not in rows["DiT"]
    for name, row in rows.items():
        assert f"\n{name} " in shown and len(row["taken_seconds"]) == 2
        assert 0 < row["held_gib"] < row["peak_gib_at_one"] <= row["peak_gib"]
        if name.startswith(("FPDM", "+")):
            beside = rows["DiT, recomputed" if name == "FPDM, recomputed" else "DiT"]
            assert row["ratio_to_dit"] == pytest.approx(row["images_per_second"] / beside["images_per_second"])
    assert rows["DiT"]["flops_per_step"] != rows[OURS]["flops_per_step"]
    parameters = report["parameters"]
    for name, kind in (("DiT", "dit"), (OURS, "fpdm")):  # weights, average, two moments (and a step count per tensor)
        assert rows[name]["held_gib"] * 2**30 == pytest.approx(16 * parameters[kind], rel=0.01)


def test_latency_command_compares_dit_with_fpdm_of_equal_cost(tmp_path, capsys):
    output = tmp_path / "l.json"
    bench_latency.main(["--method=fpdm", "--steps=4", "--batch_size=2", "--warmup=0", "--repeats=2", f"--output={output}"])
    report, shown = json.loads(output.read_text()), capsys.readouterr().out
    plain, *others = report["models"]
    assert plain["model"] == "DiT 4" and plain["blocks"] == 16 and plain["ratio_to_first"] == 1
    assert [row["model"].split("x")[1] for row in others] == ["2 reuse"]  # as many blocks as a DiT of four leaves room for
    for row in report["models"]:
        assert row["model"] in shown and 0 < row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        assert row["gmacs"] <= plain["gmacs"] * (1 + 1e-9)


def test_plans_of_equal_cost_at_xl_proportions():
    network, plain = (
        bench_step_fpdm.fpdm.FPDMTransformer2DModel(sample_size=16, hidden_size=128, num_attention_heads=4, fixed_point=kind)
        for kind in (True, False)
    )
    plans = bench_latency_fpdm.equal_cost_plans(network, plain, 20)
    assert [plan[1:] for plan in plans] == [(26, False), (12, False), (6, True), (3, True)]
    assert [plan[0] for plan in plans] == sorted(plan[0] for plan in plans) and plans[0][0] < 20 < plans[1][0]
    assert bench_latency_fpdm.parse_plans("20x26, 40x6r") == [(20, 26, False), (40, 6, True)]


@pytest.mark.parametrize(
    "main, flags, sentence",
    [
        (bench_step.main, ["--method", "fpdm", "--size", "sdxl"], "none of --method fpdm: tiny, s2, b2, xl2"),
        (bench_step.main, ["--size", "xl2"], "none of --method slam: tiny, sd15"),
        (bench_latency.main, ["--size", "xl2"], "none of --method bksdm: tiny, sd15"),
        (bench_latency.main, ["--method", "fpdm", "--plans", "20x26,40"], "--plans 20x26,40: write timesteps x iterations"),
        (bench_latency.main, ["--method", "fpdm", "--plans", "2000x3"], "--steps, --plans: sampling steps"),
    ],
)
def test_bad_input_is_one_sentence(main, flags, sentence):
    with pytest.raises(options.UserError, match=sentence) as error:
        main(flags)
    assert "\n" not in str(error.value)
