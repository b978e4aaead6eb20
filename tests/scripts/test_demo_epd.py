"""scripts/demo_epd.sh from beginning to end, with few steps and few samples; what the report says of known figures."""

import importlib.util
import json

import pytest
import torch
from conftest import ROOT
from PIL import Image

from brisk import epd, predictor, predictor_files

SPEC = importlib.util.spec_from_file_location("report_epd", ROOT / "scripts/report_epd.py")
report_epd = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(report_epd)


def test_demo_leaves_predictors_and_a_report_of_equal_calls(tmp_path, run_shell):
    out = tmp_path / "demo"
    small = {"DEMO_OUT": str(out), "DEMO_REPORT": "--samples 50 --seeds 1 --reference_steps 8 --solvers UniPC"}
    tiny = ["--max_train_steps=2", "--batch=2", "--M=1", "--eval_samples=2", "--eval_steps=4", "--log_every=1"]
    run_shell("demo_epd.sh", *tiny, **small)
    report = json.loads((out / "report.json").read_text())
    plain, guided = report["without captions"], report["with captions, guidance 2"]
    solvers = {"UniPC", "UniPC, chosen"}
    assert plain.keys() == solvers | {"EPD, K=2", "EPD for iPNDM, K=2"} and guided.keys() == solvers | {"EPD, K=2"}
    assert {calls: row["total_calls"] for calls, row in plain["EPD, K=2"].items()} == {"3": 5, "5": 8}
    assert {calls: row["total_calls"] for calls, row in guided["EPD, K=2"].items()} == {"6": 9}
    assert plain["UniPC"].keys() == plain["UniPC, chosen"].keys() == {"3", "5", "8"}
    assert guided["UniPC"].keys() == {"6", "9"}
    for figures in (plain, guided):
        for by_calls in figures.values():
            for calls, row in by_calls.items():
                assert row["calls"] == int(calls) and row["end_error"] > 0 and 0 <= row["agreement"] <= 1  # counted calls
    assert plain["UniPC"]["5"]["scheduler"] == "logsnr, order 3"
    assert len(report["conclusions"]) == 8 and all("end error" in sentence for sentence in report["conclusions"])
    for name in ("report.png", "table.png"):
        assert Image.open(out / name).width > 900
    page = (out / "report.html").read_text()
    assert report["conclusions"][0].split(",")[0] in page and "total calls" in page
    assert predictor_files.load(out / "guided").model["guidance_rate"] == 2


def row(error, agreement=0.5, frechet=30.0, total=3, spread=0.1):
    return {"end_error": error, "agreement": agreement, "frechet": frechet, "total_calls": total, "calls": 3,
            "spread": {"end_error": spread, "agreement": 0.01, "frechet": 1.0}}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize(("own", "word"), [(1.0, "better than"), (2.05, "within the spread of"), (3.0, "worse than")])
def test_verdict_follows_the_figures(own, word):
    others = {"DDIM": row(4.0), "UniPC, chosen": row(2.0)}
    assert report_epd.verdict(row(own), others, "end_error") == f"end error {own:.3g}, {word} 2 (UniPC, chosen)"


@pytest.mark.quick
def test_more_agreement_is_better_and_less_distance_is():
    others = {"DDIM": row(1, 0.9, 20.0), "Heun": row(1, 0.4, 50.0)}
    assert "worse than 0.9 (DDIM)" in report_epd.verdict(row(1, 0.5), others, "agreement")
    assert "worse than 20 (DDIM)" in report_epd.verdict(row(1, 0.5, 40.0), others, "frechet")


@pytest.mark.quick
def test_conclusions_compare_at_equal_calls_in_turn_and_in_all():
    figures = {"EPD, K=2": {"3": row(2.0, total=5)}, "DDIM": {"3": row(3.0), "5": row(1.0)}, "UniPC, chosen": {"3": row(2.5)}}
    turn, everything = report_epd.conclusions("here", figures)
    assert "in turn (3): end error 2, better than 2.5 (UniPC, chosen)" in turn
    assert "in all (5): end error 2, worse than 1 (DDIM)" in everything


@pytest.mark.quick
def test_plain_solvers_get_as_many_calls_as_asked():
    from brisk import denoisers, sigmas, solvers

    table = sigmas.noise_map(torch.linspace(0.9999, 0.005, 1000))
    low, high = sigmas.sigma_range(table)
    model = denoisers.Denoiser("sd", None, None, None, None, (4, 8, 8), 32, low, high, table=table)
    for name in report_epd.SOLVERS.values():
        for calls in (3, 6):
            plan = report_epd.published(name, model, calls)
            sampler = plan.sampler
            assert solvers.network_calls(name, len(sampler.sigmas), sampler.options) == calls
            assert sampler.options.afs == (name in ("heun", "dpm2") and calls == 3)  # the least departure from the published way
    assert report_epd.plan_of("heun", model, 3, ("polynomial", None)) is None


@pytest.mark.quick
def test_points_are_drawn_at_their_noise_levels(tmp_path):
    from brisk import epd_pictures

    raw = epd.initial_raw(2, 3)
    solver = predictor.Solver("epd", 3, 3, True, None, False)
    schedule = {"type": "polynomial", "rho": 7.0, "sigma_min": 0.1, "sigma_max": 10.0, "sigmas": [10.0, 1.0, 0.1]}
    content = predictor.make("tiny", "distilled", solver, schedule, {}, raw=predictor.Raw(*raw, 0.1, 0.1))
    found = epd_pictures.levels_of_points(content)
    assert torch.allclose(found.log10(), torch.tensor([[0.75, 0.5, 0.25], [-0.25, -0.5, -0.75]]).double(), atol=1e-6)
    epd_pictures.draw_tables(tmp_path / "table.png", [content, content], ["one", "two"])
    assert Image.open(tmp_path / "table.png").width > 900
