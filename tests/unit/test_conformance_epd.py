"""Golden numbers of EPD-Solver: every file of a known name under `--conformance DIR`/epd is run, the others are named."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from epd_golden import ROUNDED, SINGLE, TIGHT, Counted, close, precisions, samples, tables_of, world_of
from epd_golden_nets import check_edm_nets
from epd_golden_policy import check_rl, check_rl_toy

from brisk import denoiser_maps, epd, epd_distill, mixture, sample_seeds, sigmas, solvers

SD_BETAS = ("scaled_linear", 0.00085, 0.012, 1000)  # of Stable Diffusion, whose released tables use a discrete grid


def make_betas(kind, first, last, total):
    if kind == "linear":
        return torch.linspace(first, last, total, dtype=torch.float64)
    return torch.linspace(first**0.5, last**0.5, total, dtype=torch.float64) ** 2


def noise_map(betas):
    return sigmas.noise_map((1 - make_betas(*betas)).cumprod(0))


def make_sigmas(case):
    table = noise_map(case["betas"]) if "betas" in case else None
    numbers = (case["num_steps"], case.get("sigma_min"), case.get("sigma_max"), case.get("rho"))
    return sigmas.schedule(case["type"], *numbers, table, case.get("shift"), case.get("mu"))


def check_schedules(golden, folder):
    for case in golden["cases"]:
        close(make_sigmas(case), case["sigmas"])


def check_discrete_map(golden, folder):
    for case in golden["cases"]:
        signal = (1 - make_betas(*case["betas"])).cumprod(0)
        close(signal[[0, -1]], case["alphas_cumprod_first_last"])
        table, levels = sigmas.noise_map(signal), torch.tensor(case["sigma"], dtype=torch.float64)
        close(sigmas.sigma_range(table), [case["sigma_min"], case["sigma_max"]])
        close(sigmas.sigma_of_time(table, torch.tensor(case["t"], dtype=torch.float64)), case["sigma_of_t"])
        close(sigmas.time_of_sigma(table, levels), case["t_of_sigma"])
        close(denoiser_maps.vp_timestep(table, levels), case["network_timestep"])
        close(denoiser_maps.vp_input(torch.ones_like(levels), levels), case["c_in"])


def check_denoiser(golden, folder):
    for case in golden["cases"]:
        for dtype, tolerance in precisions(TIGHT):
            check_denoiser_case(case, folder, dtype, tolerance)


def check_denoiser_case(case, folder, dtype, tolerance):
    world, shape = world_of(folder, case["world"], dtype)
    x = samples(case["x"], shape, dtype)
    sigma = torch.tensor(case["sigma"], dtype=dtype).expand(len(x))
    classes = torch.tensor(case["classes"]) if "classes" in case else None
    flow = case["view"] == "flow"
    found = mixture.posterior_mean(world, x, sigma, flow=flow)
    if case["view"] == "edm_cfg":
        found = denoiser_maps.guide(found, mixture.posterior_mean(world, x, sigma, classes), case["guidance"])
    close(found, case["D"], tolerance)
    direction = mixture.direction(world, x, sigma, flow=flow)
    if case["view"] != "edm_cfg":
        close(denoiser_maps.denoised(x, direction, sigma), case["D"], tolerance)
    for name in ("d", "velocity", "eps"):
        if name in case and dtype == torch.float64:  # a quotient by a small sigma
            close(direction, case[name], tolerance)
    if case["view"] == "vp_eps":
        timestep = denoiser_maps.vp_timestep(noise_map(case["betas"]), sigma)
        close(timestep, case["network_timestep"] * len(x), tolerance)
        close(denoiser_maps.vp_input(x, sigma), case["network_input"], tolerance)


SOLVER_NAMES = {"deis_tab": "deis", "teacher_dpm": "dpm", "teacher_heun": "heun"}


def run_solver(case, golden, folder, dtype):
    given = dict(case["options"])
    given.pop("basis", None)
    substeps, constants = given.pop("substeps", 1), (given.pop("vp_beta_d", None), given.pop("vp_beta_min", None))
    assert given.pop("inner_points", substeps + 1) == substeps + 1 and given.pop("inner_rho", 7) == 7
    if "r" in given:
        given["midpoint"] = given.pop("r")
    options = solvers.SolverOptions(**given)
    name = SOLVER_NAMES.get(case["solver"], case["solver"])
    world, shape = world_of(folder, golden["world"].split()[0], dtype)
    direction = Counted(world)
    x = samples(golden["x_init"], shape, dtype)
    states = list(solvers.with_substeps(name, direction, x, golden["sigmas"], options, substeps))
    assert direction.calls == solvers.network_calls(name, len(golden["sigmas"]), options, substeps) == case["nfe"]
    if constants[0] is not None:
        close(sigmas.vp_constants(golden["sigmas"][-1], golden["sigmas"][0]), constants)
    return states


def check_solvers(golden, folder):
    for case in golden["cases"]:
        for dtype, tolerance in precisions(TIGHT):
            states = run_solver(case, golden, folder, dtype)
            close(torch.stack(states), case["trajectory"], tolerance)


def case_tables(case, folder, dtype):
    if "predictor" in case:
        predictor = json.loads((folder / "predictors" / f"{case['predictor']}.json").read_text())
        return tables_of(predictor["tables"], dtype)
    ranges = (case["raw"]["scale_dir_range"], case["raw"]["scale_time_range"])
    tables = epd.effective(tables_of(case["raw"], dtype), *ranges, case.get("fix_last_scale_dir", False))
    for found, expected in zip(tables, tables_of(case["effective"]), strict=True):
        close(found, expected, TIGHT if dtype == torch.float64 else SINGLE)
    return tables


def assert_trajectory(case, folder, flow, dtype, tolerance):
    world, shape = world_of(folder, case["world"], dtype)
    tables = case_tables(case, folder, dtype)
    x = samples(case["x_init"], shape, dtype)
    student, points = case.get("student", "epd"), tables.r.shape[1]
    order = epd.history_order(student, case.get("max_order"))

    def run(wrap):
        direction = Counted(world, flow, case.get("classes"), case.get("guidance", 1.0))
        rows = epd.rows_of(tables)
        return direction, torch.stack(list(epd.solve(wrap(direction), x, case["sigmas"], rows, order, case["afs"], flow)))

    direction, states = run(lambda direction: direction)
    close(states, case["trajectory"], tolerance)
    cost = epd.cost(len(case["sigmas"]), points, case["afs"])
    assert direction.calls == cost.para_nfe == case.get("para_nfe", cost.para_nfe)
    assert direction.calls == case.get("forward_calls_batched", cost.para_nfe)
    assert direction.rows == cost.total_nfe * len(x) and cost.total_nfe == case.get("total_nfe", cost.total_nfe)
    if dtype == torch.float64:  # one row at a time gives the same
        close(run(partial(epd.in_chunks, limit=1))[1], states, 1e-10)
    if "schedule" in case and isinstance(case["schedule"], dict):
        close(make_sigmas(case["schedule"]), case["sigmas"])


def check_trajectories(golden, folder, flow, released):
    cases = [case for case in golden["cases"] if "solver" not in case and ("predictor" in case) == released]
    if released and cases and not (folder / "predictors").is_dir():
        pytest.skip(f"{len(cases)} cases need the released tables, there is no {folder / 'predictors'}")
    for case in cases:
        for dtype, tolerance in precisions(ROUNDED):
            assert_trajectory(case, folder, flow, dtype, tolerance)


def check_epd(golden, folder):
    check_trajectories(golden, folder, False, False)


def check_flow(golden, folder):
    check_trajectories(golden, folder, True, False)
    for case in golden["cases"]:
        if "solver" in case:
            for dtype, tolerance in precisions(ROUNDED):
                world, shape = world_of(folder, case["world"], dtype)
                x = samples(case["x_init"], shape, dtype)
                states = solvers.find(case["solver"]).run(Counted(world, True), x, case["sigmas"])
                close(torch.stack(list(states)), case["trajectory"], tolerance)


def feature(x):
    pixels = (127.5 * x.flatten(1) + 128).clamp(0, 255)
    i, j = torch.arange(6, dtype=x.dtype)[:, None], torch.arange(pixels.shape[1], dtype=x.dtype)
    return pixels @ (torch.cos(0.1 * (i + 1) * (j + 1)) / 50).T


def leaves(golden):
    raw = tables_of(golden["raw"])
    return epd.Tables(*(table.requires_grad_() for table in raw))


def student_chain(golden, case, direction, raw, x, targets, mode, batch):
    ranges = (golden["raw"]["scale_dir_range"], golden["raw"]["scale_time_range"])
    order, rows = epd.history_order(case["student"], case["max_order"]), epd_distill.fresh_rows(raw, *ranges)
    states = epd.solve(direction, x, golden["sigmas"], rows, order, case["afs_student"], detach_history=True,
                       detach_state=mode == "detach")  # fmt: skip
    return epd_distill.objectives(states, targets, batch, feature, case["alpha"])


def teacher_targets(golden, case, direction, x):
    options = solvers.SolverOptions(max_order=case["max_order"] if case["teacher"] == "ipndm" else 3)
    return epd_distill.teacher_states(
        case["teacher"], direction, x, golden["teacher_sigmas"], case["M"], options, case["teacher_substeps"]
    )


def check_distill(golden, folder):
    lists = golden["world"]
    direction = Counted(mixture.from_lists(lists["means"], lists["stds"], lists["weights"]))
    starts = [samples(values, lists["shape"]) for values in golden["batches_x_init"]]
    assert len(golden["teacher_sigmas"]) == epd_distill.teacher_points(len(golden["sigmas"]), golden["cases"][0]["M"])
    for case in golden["cases"]:
        targets = [teacher_targets(golden, case, direction, x) for x in starts]
        close(torch.stack(targets[0]), case["teacher_at_student_times"])
        check_first_batch(golden, case, direction, starts[0], targets[0])
        for name, after in case["after"].items():
            for pieces in (1, 2):
                mode, batches = name.rsplit("_", 1)
                check_training(golden, case, direction, starts[: int(batches)], targets, mode, after, pieces)


def check_first_batch(golden, case, direction, x, targets):
    raw = leaves(golden)
    losses = list(student_chain(golden, case, direction, raw, x, targets, "per_step", len(x)))
    close(torch.stack(losses), case["step_objectives"])
    for loss, expected in zip(losses, case["grads_first_batch"], strict=True):
        for found, grads in zip(epd_distill.gradients(loss, raw, True), tables_of(expected), strict=True):
            close(found, grads)
    for direction_ in (direction, epd.checkpointed(direction)):  # recomputed activations change nothing
        chain = student_chain(golden, case, direction_, raw, x, targets, "per_step", len(x))
        (_, joint), = epd_distill.updates([chain], raw, "joint")
        for table, grads in enumerate(joint):
            close(grads, sum(tables_of(expected)[table] for expected in case["grads_first_batch"]))


def check_training(golden, case, direction, starts, targets, mode, after, pieces):
    """The tables after the optimiser's steps, with each batch in one or more micro-batches."""
    raw, cosine = leaves(golden), case["cosine"]
    adam = torch.optim.Adam(raw, lr=case["lr"])
    for index, x in enumerate(starts):
        adam.param_groups[0]["lr"] = epd_distill.cosine_rate(case["lr"], index, cosine["T_max"], cosine["eta_min"])
        parts = zip(x.chunk(pieces), zip(*(target.chunk(pieces) for target in targets[index]), strict=True), strict=True)
        chains = [student_chain(golden, case, direction, raw, part, goal, mode, len(x)) for part, goal in parts]
        losses = []
        for found, grads in epd_distill.updates(chains, raw, mode):
            losses += found
            epd_distill.set_gradients(raw, grads)
            adam.step()
        close(torch.stack(losses), after["losses"][index])
    for found, expected in zip(raw, tables_of(after["params"]), strict=True):
        close(found, expected)


def check_seeds(golden, folder):
    for case in golden["randn"]:
        latent = sample_seeds.draw_latents(sample_seeds.generators([case["seed"]]), case["shape"])
        close(latent.flatten()[:8], case["first8"])
        assert latent.sum().item() == pytest.approx(case["sum"], abs=1e-4)
    shape = golden["randn"][0]["shape"]
    sources = sample_seeds.generators([case["seed"] for case in golden["label"]])
    sample_seeds.draw_latents(sources, shape)
    assert sample_seeds.draw_labels(sources, 10).tolist() == [case["label_after_latent"] for case in golden["label"]]
    for text, seeds in golden["parse"]:
        assert sample_seeds.parse_seeds(text) == seeds
    for case in golden["batches"]:
        seeds = list(range(case["seeds"]))
        ranks = [sample_seeds.batches(seeds, case["max_batch"], rank, case["world"]) for rank in range(case["world"])]
        assert ranks == case["ranks"]


def check_acceptance(golden, folder):
    """Distil tables on the mixture by the stated recipe; the end-point error must be within the stated limit."""
    world, shape = world_of(folder, "gmm2d")
    direction, setup = Counted(world), golden["setup"]
    generator = torch.Generator().manual_seed(0)
    iterations, batch = setup["iterations"], setup["batch"]
    x = 80 * torch.randn(1000 + iterations * batch, *shape, generator=generator, dtype=torch.float64)
    held_out, training = x[:1000], x[1000:]
    reference = epd_distill.reference_states(direction, held_out, 0.002, 80.0)
    for row in golden["rows"]:
        levels = sigmas.time_uniform(row["num_steps"], 0.002, 80.0)
        dense = sigmas.time_uniform(epd_distill.teacher_points(row["num_steps"], 3), 0.002, 80.0)
        goals = epd_distill.teacher_states("dpm2", direction, training, dense, 3, substeps=2)
        raw = epd.initial_raw(row["num_steps"] - 1, row["num_points"])
        raw = epd.Tables(*(table.double().requires_grad_() for table in raw))
        ranges = (setup["scale_dir_range"], setup["scale_time_range"])

        def error(raw, levels=levels, ranges=ranges):
            with torch.no_grad():
                rows = epd.rows_of(epd.effective(raw, *ranges))
                end = solvers.last(epd.solve(direction, held_out, levels, rows, afs=True))
                return epd_distill.end_error(end, reference).item()

        assert error(raw) == pytest.approx(row["rmse"]["epd_untrained"], rel=0.1)
        adam = torch.optim.Adam(raw, lr=0.05)
        for index, start in enumerate(training.split(batch)):
            adam.param_groups[0]["lr"] = epd_distill.cosine_rate(0.05, index, iterations + 1)
            states = epd.solve(direction, start, levels, epd_distill.fresh_rows(raw, *ranges), afs=True)
            goal = [states[index * batch : (index + 1) * batch] for states in goals]
            for _, grads in epd_distill.updates([epd_distill.objectives(states, goal, batch)], raw, "joint"):
                epd_distill.set_gradients(raw, grads)
                adam.step()
        assert error(raw) <= row["required_epd_max"], row["para_nfe"]


def test_released_tables_sample_as_stated(released):
    """The tables under predictors/, where they lie beside the other files."""
    names = [name for name in ("epd", "flow") if (released / f"{name}.json").is_file()]
    assert names, f"no epd.json or flow.json in {released}"
    for name in names:
        check_trajectories(json.loads((released / f"{name}.json").read_text()), released, name == "flow", True)


def test_released_tables_follow_from_their_raw_parameters_and_schedules(released):
    paths = sorted((released / "predictors").glob("*.json"))
    if not paths:
        pytest.skip(f"there are no released tables in {released / 'predictors'}")
    for path in paths:
        check_released(json.loads(path.read_text()))


def check_released(predictor):
    solver, grid, raw = predictor["solver"], predictor["schedule"], predictor["raw"]
    ranges = (raw["scale_dir_range"], raw["scale_time_range"], solver["fix_last_scale_dir"])
    tables = tables_of(predictor["tables"])
    for found, expected in zip(epd.effective(tables_of(raw), *ranges), tables, strict=True):
        close(found, expected, 1e-6)
    again = epd.effective(epd.raw_parameters(tables, *ranges[:2]), *ranges)  # and back
    for found, expected in zip(again, tables, strict=True):
        close(found, expected, 1e-6)
    flow = grid["flow"] or {}
    table = noise_map(SD_BETAS) if grid["type"] == "discrete" else None
    ends = (grid["sigma_min"], grid["sigma_max"])
    found = sigmas.schedule(grid["type"], solver["num_steps"], *ends, grid["rho"], table, flow.get("shift"), flow.get("mu"))
    close(found, grid["sigmas"])
    cost, stated = epd.cost(solver["num_steps"], solver["num_points"], solver["afs"]), predictor["nfe"]
    assert (cost.intervals, cost.para_nfe, cost.total_nfe) == (stated["intervals"], stated["para_nfe"], stated["total_nfe"])


KNOWN = {
    "schedules": check_schedules, "discrete_map": check_discrete_map, "denoiser": check_denoiser, "solvers": check_solvers,
    "epd": check_epd, "flow": check_flow, "distill": check_distill, "seeds": check_seeds, "acceptance": check_acceptance,
    "rl": check_rl, "rl_toy": check_rl_toy, "edm_nets": check_edm_nets,
}  # fmt: skip


def pytest_generate_tests(metafunc):
    folder = Path(metafunc.config.getoption("--conformance")) / "epd"
    if "path" in metafunc.fixturenames:
        metafunc.parametrize("path", sorted(folder.glob("*.json")) or [folder], ids=lambda path: path.stem)
    if "released" in metafunc.fixturenames:
        metafunc.parametrize("released", [folder], ids=["predictors"])


def test_golden(path):
    assert path.is_file(), f"no golden file in {path}"
    assert path.stem in KNOWN, f"{path.name} is of no known name"
    KNOWN[path.stem](json.loads(path.read_text()), path.parent)
