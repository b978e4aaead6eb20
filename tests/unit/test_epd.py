"""EPD beyond the golden numbers: limits, conditions of the points, several processes, gradients, inits, refusals."""

from functools import partial

import pytest
import torch

from brisk import denoiser_maps, epd, epd_distill, mixture, sigmas, solvers

pytestmark = pytest.mark.quick
CLASSES = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]
WORLD = mixture.from_lists([[1.2, 0.4], [-0.8, 0.9], [0.1, -1.1]], [0.25, 0.15, 0.35], [0.5, 0.3, 0.2], CLASSES)
GRID = sigmas.time_uniform(5, 0.01, 10.0)
X = 10 * torch.tensor([[0.3, -0.2], [-0.4, -1.1], [1.0, -0.6]], dtype=torch.float64)


def direction(x, sigma, rows=None, labels=None):
    labels = None if labels is None else denoiser_maps.take_rows(labels, rows)
    return mixture.direction(WORLD, x, sigma, labels)


def make_tables(intervals, points, seed=0, ranges=(0.1, 0.2)):
    raw = epd.initial_raw(intervals, points, "normal", torch.Generator().manual_seed(seed))
    return epd.effective(epd.Tables(*(table.double() for table in raw)), *ranges)


def run(x, tables, closure=direction, **settings):
    return solvers.last(epd.solve(closure, x, GRID, epd.rows_of(tables), **settings))


def test_one_point_in_the_middle_is_dpm_solver_2():
    raw = epd.initial_raw(4, 1)
    torch.testing.assert_close(run(X, epd.effective(raw)), solvers.last(solvers.dpm2(direction, X, GRID)), atol=1e-6, rtol=0)


def test_points_can_be_listed_in_any_order():
    tables = make_tables(4, 3)
    turned = epd.Tables(*(table.flip(-1) for table in tables))
    torch.testing.assert_close(run(X, tables), run(X, turned))


def test_every_point_is_evaluated_under_its_samples_condition():
    tables, labels = make_tables(4, 2), torch.tensor([0, 1, 2])
    together = run(X, tables, partial(direction, labels=labels))
    alone = torch.cat([run(X[i : i + 1], tables, partial(direction, labels=labels[i : i + 1])) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_conditions_are_repeated_in_every_nest():
    text, rows = torch.arange(12.0).reshape(3, 4), epd.sample_of_row(3, 2)
    nest = {"text": text, "added": [text[:, :1], None], "pair": (text,)}
    found = denoiser_maps.take_rows(nest, rows)
    expected = text.repeat_interleave(2, dim=0)
    assert found["text"].equal(expected) and found["added"][0].equal(expected[:, :1]) and found["added"][1] is None
    assert found["pair"][0].equal(expected)
    assert denoiser_maps.take_rows(nest, None) is nest
    with pytest.raises(TypeError, match="str cannot be repeated"):
        denoiser_maps.take_rows("a cat", rows)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 100])
def test_chunks_change_nothing_and_are_no_larger_than_asked(limit):
    tables, labels, sizes = make_tables(4, 3), torch.tensor([0, 1, 2]), []

    def watched(x, sigma, rows=None):
        sizes.append(len(x))
        return direction(x, sigma, rows, labels)

    found = run(X, tables, epd.in_chunks(watched, limit))
    torch.testing.assert_close(found, run(X, tables, partial(direction, labels=labels)), atol=1e-12, rtol=0)
    assert max(sizes) <= limit


@pytest.mark.parametrize("world", [1, 2, 4, 20])
def test_processes_that_share_the_points_add_up_to_one(world):
    """The sum over all ranks of what each hands to the reduction is what one process computes."""
    row, predictor = make_tables(4, 3).row(0), direction(X, X.new_full((3,), 10.0))
    parts, evaluated = [], []

    def watched(x, sigma, rows=None):
        evaluated.append(len(x))
        return direction(x, sigma, rows)

    def keep(total):
        parts.append(total)
        return total

    for rank in range(world):
        epd.step(watched, X, predictor, 10.0, 4.0, row, epd.Split(rank, world, keep))
    whole = epd.step(direction, X, predictor, 10.0, 4.0, row)
    torch.testing.assert_close(X - 6 * torch.stack(parts).sum(0), whole, atol=1e-12, rtol=0)
    assert sum(evaluated) == 9 and min(evaluated) > 0


def test_a_table_per_sample_is_a_run_per_table():
    many = [make_tables(4, 2, seed) for seed in range(3)]
    stacked = epd.Tables(*(torch.stack(tables) for tables in zip(*many, strict=True)))
    alone = torch.cat([run(X[i : i + 1], tables) for i, tables in enumerate(many)])
    torch.testing.assert_close(run(X, stacked), alone, atol=1e-12, rtol=0)


def test_a_state_in_single_precision_stays_there():
    tables = make_tables(4, 2)

    def checked(x, sigma, rows=None):
        assert x.dtype == sigma.dtype == torch.float32
        return direction(x.double(), sigma.double()).float()

    found = run(X.float(), tables, checked)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), run(X, tables), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("init", ["spread", "thirds", "normal"])
def test_inits(init):
    raw = epd.initial_raw(4, 2, init, torch.Generator().manual_seed(0))
    tables = epd.effective(raw, 0.05, 0.05)
    assert all(table.shape == (4, 2) and table.dtype == torch.float32 for table in raw)
    expected = {"spread": [1 / 3, 2 / 3], "thirds": [0.335, 0.665]}.get(init)
    if expected:
        torch.testing.assert_close(tables.r, torch.tensor(expected).expand(4, 2))
        torch.testing.assert_close(tables.weight, torch.full((4, 2), 0.5))
        assert (tables.scale_dir == 1).all() and (tables.scale_time == 1).all()


def test_raw_parameters_come_back_from_effective_tables():
    tables = make_tables(4, 3)
    again = epd.effective(epd.raw_parameters(tables, 0.1, 0.2), 0.1, 0.2)
    for found, expected in zip(again, tables, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_unused_scales_are_ones_and_get_no_gradient():
    raw = epd.Tables(*(table.double().requires_grad_() for table in epd.initial_raw(4, 2)))
    states = epd.solve(direction, X, GRID, epd_distill.fresh_rows(raw, 0.0, 0.0))
    ((losses, found),) = epd_distill.updates([epd_distill.objectives(states, [X] * 4, 3)], raw, "joint")
    assert len(losses) == 4 and not any(loss.requires_grad for loss in losses)
    assert found.r.abs().min() > 0 and found.weight.abs().min() > 0
    assert not found.scale_dir.any() and not found.scale_time.any()


def test_the_last_direction_scale_can_be_fixed():
    tables = epd.effective(epd.initial_raw(3, 2, "normal", torch.Generator().manual_seed(0)), 0.1, 0.1, True)
    assert (tables.scale_dir[-1] == 1).all() and (tables.scale_dir[:-1] != 1).all()


@pytest.mark.parametrize("mode", epd_distill.UPDATE_MODES[1:])
def test_who_gets_gradient(mode):
    """Interval n reaches the rows of its predecessors unless the state is detached; the last alone counts in final_only."""
    raw = epd.Tables(*(table.double().requires_grad_() for table in epd.initial_raw(4, 2)))
    rows = epd_distill.fresh_rows(raw, 0.1, 0.1)
    states = epd.solve(direction, X, GRID, rows, afs=True, detach_state=mode == "detach")
    steps = list(epd_distill.updates([epd_distill.objectives(states, [0 * X] * 4, 3)], raw, mode))
    touched = [(grads.r != 0).any(-1).tolist() for _, grads in steps]
    if mode in ("joint", "final_only"):
        assert touched == [[True] * 4]
    else:
        assert touched == [[m == n if mode == "detach" else m <= n for m in range(4)] for n in range(4)]


def test_broken_gradients_are_made_harmless():
    raw = epd.Tables(*(torch.ones(1, 2, requires_grad=True) for _ in range(4)))
    loss = (raw.r * torch.tensor([[float("nan"), float("inf")]])).sum() - raw.weight.sum() * float("inf")
    found = epd_distill.gradients(loss, raw, False)
    assert found.r.tolist() == [[0.0, 1e5]] and found.weight.tolist() == [[-1e5, -1e5]]


@pytest.mark.parametrize(
    ("student", "num_steps", "dataset", "mode"),
    [("epd", 5, "cifar10", "final_only"), ("epd", 6, "cifar10", "per_step"), ("ipndm", 4, "cifar10", "per_step"),
     ("epd", 4, "lsun_bedroom_ldm", "per_step"), ("epd", 4, None, "per_step")],
)  # fmt: skip
def test_the_published_rule_of_updates(student, num_steps, dataset, mode):
    assert epd_distill.resolve_update_mode("auto", student, num_steps, dataset) == mode
    assert epd_distill.resolve_update_mode("joint", student, num_steps, dataset) == "joint"


def test_cost_of_a_run():
    assert epd.cost(4, 2, afs=True) == (3, 5, 8, 5)
    assert epd.cost(11, 2, guided_pair=True) == (10, 20, 30, 40)


def test_the_rate_falls_by_a_cosine():
    total = epd_distill.total_batches(10, 32)
    assert total == 313
    assert epd_distill.cosine_rate(0.2, 0, total) == 0.2
    assert epd_distill.cosine_rate(0.2, total, total) == pytest.approx(0.01)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="thirds.*num_points is 3"):
        epd.initial_raw(4, 3, "thirds")
    with pytest.raises(ValueError, match="must be one of spread"):
        epd.initial_raw(4, 2, "zeros")
    with pytest.raises(ValueError, match="cannot be negative"):
        epd.effective(epd.initial_raw(4, 2), -0.1)
    with pytest.raises(ValueError, match="max_order is 5"):
        run(X, make_tables(4, 2), max_order=5)
    with pytest.raises(ValueError, match="must be epd or ipndm"):
        epd.history_order("amed")
    with pytest.raises(ValueError, match="the update mode is 'auto'"):
        next(epd_distill.updates([], make_tables(4, 2), "auto"))
    with pytest.raises(ValueError):  # four rows, three intervals
        solvers.last(epd.solve(direction, X, GRID[:-1], epd.rows_of(make_tables(4, 2))))
