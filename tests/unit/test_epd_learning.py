"""EPD learns: distilled on a mixture of Gaussians, it reaches the stated end-point errors, by the library and by the script."""

import json

import pytest
import torch
from epd_golden import Counted, world_of
from inprocess import EPD, MIXTURES, train

from brisk import epd, epd_distill, predictor_files, sigmas, solvers

STATED = json.loads((MIXTURES.parent / "acceptance.json").read_text())
SETUP, ROWS = STATED["setup"], STATED["rows"]
LOW, HIGH = 0.002, 80.0


@pytest.fixture(scope="module")
def held_out():
    """(direction, start (8000, 2, 1, 1), end points of the long Heun run)."""
    world, shape = world_of(MIXTURES.parent, "gmm2d")
    x = HIGH * torch.randn(8000, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    direction = Counted(world)
    return direction, x, epd_distill.reference_states(direction, x, LOW, HIGH)


def end_of(tables, num_steps, held_out):
    """End points of a student."""
    direction, x, _ = held_out
    return solvers.last(epd.solve(direction, x, sigmas.time_uniform(num_steps, LOW, HIGH), epd.rows_of(tables), afs=True))


def assert_as_stated(end, reference, stated):
    """The stated error is that of 1000 other latents: ours lies within three of its standard errors."""
    squares = (end - reference).square().flatten(1).sum(1)
    error = epd_distill.end_error(end, reference).item()
    standard_error = squares.std().item() / (2 * error * 1000**0.5)
    assert standard_error < 0.08 * error
    assert abs(error - stated) <= 3 * standard_error


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"NFE {row['para_nfe']}")
def test_baselines_have_the_stated_errors(row, held_out):
    direction, x, reference = held_out
    afs = solvers.SolverOptions(afs=True, max_order=4)
    plain, student = sigmas.polynomial(row["para_nfe"] + 2, LOW, HIGH), sigmas.time_uniform(row["num_steps"], LOW, HIGH)
    runs = {"ddim": ("euler", plain, afs), "ipndm4": ("ipndm", plain, afs), "dpm2": ("dpm2", student, afs),
            "dpmpp3": ("dpmpp", sigmas.logsnr(len(plain), LOW, HIGH), afs._replace(max_order=3))}  # fmt: skip
    for name, (solver, levels, options) in runs.items():
        assert solvers.network_calls(solver, len(levels), options) == row["para_nfe"]
        end = solvers.last(solvers.find(solver).run(direction, x, levels, options))
        assert_as_stated(end, reference, row["rmse"][name])
    untrained = epd.effective(epd.initial_raw(row["num_steps"] - 1, row["num_points"]))
    assert_as_stated(end_of(untrained, row["num_steps"], held_out), reference, row["rmse"]["epd_untrained"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"NFE {row['para_nfe']}")
def test_the_script_with_the_stated_settings_reaches_the_required_error(row, held_out, tmp_path):
    assert (SETUP["iterations"], SETUP["batch"]) == (300, 64)
    world = json.loads(MIXTURES.read_text())["world"]["gmm2d"]
    (tmp_path / "world.json").write_text(json.dumps({name: world[name] for name in ("shape", "means", "stds", "weights")}))
    train(tmp_path / "out", "--backend=gmm", f"--gmm_file={tmp_path / 'world.json'}", f"--num_steps={row['num_steps']}",
          f"--num_points={row['num_points']}", "--schedule_type=time_uniform", "--afs", "--sampler_tea=dpm", "--M=3",
          "--teacher_substeps=2", "--init=spread", "--total_kimg=19.2", "--batch=64", "--lr=0.05", "--coslr", "--update_mode=joint",
          f"--scale_dir={SETUP['scale_dir_range']}", f"--scale_time={SETUP['scale_time_range']}", "--eval_every=100",
          "--eval_samples=200", "--seed=0", "--nosubdir", "--report_to=none", script=EPD)  # fmt: skip
    found = predictor_files.load(tmp_path / "out")
    assert found.nfe.para_nfe == row["para_nfe"]
    reference = held_out[2]
    error = epd_distill.end_error(end_of(found.tables, row["num_steps"], held_out), reference).item()
    assert error <= row["required_epd_max"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    start = report["start"]
    assert report["best"]["error"] < 0.7 * min(start["untrained"], start["ddim"])


@pytest.mark.parametrize("mode", ["per_step", "final_only", "detach"])
def test_other_update_modes_reach_it_as_well(mode, held_out, tmp_path):
    row = ROWS[1]
    train(tmp_path / "out", "--backend=gmm", f"--gmm_file={MIXTURES}", "--guidance_type=uncond", "--num_steps=4", "--afs",
          "--schedule_type=time_uniform", "--max_train_steps=300", "--lr=0.05", "--coslr", f"--update_mode={mode}",
          "--eval_every=0", "--seed=0", "--nosubdir", "--report_to=none", script=EPD)  # fmt: skip
    end = end_of(predictor_files.load(tmp_path / "out").tables, 4, held_out)
    assert epd_distill.end_error(end, held_out[2]).item() <= row["required_epd_max"]
