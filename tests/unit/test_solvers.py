"""Solvers beyond the golden numbers: limits, orders of convergence, cost, refusals."""

import math

import pytest
import torch

from brisk import mixture, sigmas, solvers

pytestmark = pytest.mark.quick
WORLD = mixture.from_lists([[1.2, 0.4], [-0.8, 0.9]], [0.25, 0.15], [0.6, 0.4])
SINGLE = mixture.from_lists([[0.5, -0.3]], [0.4], [1.0])  # one Gaussian, whose flow is known in closed form
X = torch.tensor([[0.3, -0.2], [-0.4, -1.1], [1.0, -0.6]], dtype=torch.float64)


class Counted:
    def __init__(self, world=WORLD, flow=False):
        self.world, self.flow, self.calls = world, flow, 0

    def __call__(self, x, sigma, rows=None):
        assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
        self.calls += 1
        return mixture.direction(self.world, x, sigma, flow=self.flow)


def exact(x, start, end):
    """The flow of the single Gaussian: x - mu scales with sqrt(std^2 + sigma^2)."""
    std = SINGLE.stds[0]
    return SINGLE.means[0] + (x - SINGLE.means[0]) * ((std**2 + end**2) / (std**2 + start**2)).sqrt()


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(solvers.SOLVERS))
@pytest.mark.parametrize("num_steps", [2, 3, 4, 7])
def test_the_stated_number_of_calls_is_the_number_of_calls(name, order, afs, num_steps):
    options = solvers.SolverOptions(max_order=order, afs=afs)
    highest = solvers.find(name).highest_order
    if highest is not None and order > highest:
        with pytest.raises(ValueError, match=f"{name} takes 1 to {highest}"):
            solvers.last(solvers.find(name).run(Counted(), X, sigmas.polynomial(num_steps, 0.01, 10.0), options))
        return
    direction = Counted()
    states = list(solvers.find(name).run(direction, 10 * X, sigmas.polynomial(num_steps, 0.01, 10.0), options))
    assert direction.calls == solvers.network_calls(name, num_steps, options)
    assert len(states) == num_steps - (name != "edm")
    assert all(state.isfinite().all() for state in states)


@pytest.mark.parametrize(
    ("name", "order", "expected"),
    [("euler", 1, 1), ("heun", 1, 2), ("dpm2", 1, 2), ("ipndm_v", 2, 2), ("ipndm_v", 3, 3), ("deis", 2, 2), ("deis", 3, 3),
     ("dpmpp", 1, 1), ("dpmpp", 2, 2), ("unipc", 1, 2), ("unipc", 2, 3)],
)  # fmt: skip
def test_the_error_falls_with_the_order(name, order, expected):
    """Halving the steps divides the error by 2^order, towards the exact solution of a Gaussian."""
    options, start = solvers.SolverOptions(max_order=order, lower_order_final=False), 4.0
    errors = []
    for num_steps in (41, 81):
        end = solvers.last(solvers.find(name).run(Counted(SINGLE), 4 * X, sigmas.polynomial(num_steps, 0.1, start), options))
        errors.append((end - exact(4 * X, start, 0.1)).norm().item())
    assert math.log2(errors[0] / errors[1]) > expected - 0.25


def test_one_direction_makes_every_multistep_solver_the_euler_step():
    grid, options = sigmas.polynomial(6, 0.01, 10.0), solvers.SolverOptions(max_order=1)
    euler = torch.stack(list(solvers.euler(Counted(), 10 * X, grid)))
    for name in ("ipndm", "ipndm_v", "deis", "dpmpp"):
        torch.testing.assert_close(torch.stack(list(solvers.find(name).run(Counted(), 10 * X, grid, options))), euler)


def test_edm_without_noise_is_heun_and_a_last_step_to_the_clean_sample():
    grid = sigmas.polynomial(6, 0.01, 10.0)
    heun, states = list(solvers.heun(Counted(), 10 * X, grid)), list(solvers.edm(Counted(), 10 * X, grid))
    torch.testing.assert_close(torch.stack(states[:-1]), torch.stack(heun))
    torch.testing.assert_close(states[-1], mixture.posterior_mean(WORLD, heun[-1], X.new_full((3,), 0.01)))


def test_edm_adds_noise_between_its_bounds_only():
    grid, drawn = sigmas.polynomial(6, 0.01, 10.0), []

    def noise(x):
        drawn.append(len(x))
        return torch.zeros_like(x)

    options = solvers.SolverOptions(churn=3.0, churn_min=0.05, churn_max=5.0, noise=noise)
    solvers.last(solvers.edm(Counted(), 10 * X, grid, options))
    assert len(drawn) == sum(0.05 <= sigma <= 5 for sigma in grid.tolist()) > 0
    with pytest.raises(ValueError, match="flow matching"):
        solvers.last(solvers.edm(Counted(flow=True), X, sigmas.flowmatch(4), options._replace(flow=True)))


@pytest.mark.parametrize("name", ["euler", "heun", "dpm2", "ipndm", "ipndm_v", "deis", "dpmpp", "unipc"])
def test_every_solver_takes_flow_matching_states_to_the_same_end(name):
    grid = sigmas.flowmatch(200)
    end = solvers.last(solvers.find(name).run(Counted(flow=True), X, grid, solvers.SolverOptions(flow=True, max_order=2)))
    reference = solvers.last(solvers.heun(Counted(flow=True), X, sigmas.flowmatch(800)))
    torch.testing.assert_close(end, reference, atol=0.05, rtol=0)


def test_the_analytic_first_direction_is_right_where_noise_is_all_there_is():
    far = mixture.direction(WORLD, 1000 * X, X.new_full((3,), 1000.0))
    torch.testing.assert_close(solvers.analytic_direction(1000 * X, 1000.0), far, atol=2e-3, rtol=0)
    nothing = mixture.from_lists([[0.0, 0.0]], [1e-9], [1.0])
    velocity = mixture.direction(nothing, X, X.new_ones(3), flow=True)
    torch.testing.assert_close(solvers.analytic_direction(X, 1.0, flow=True), velocity)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm"])
def test_substeps_cut_every_interval_of_the_one_step_solvers(name):
    grid = sigmas.time_uniform(5, 0.01, 10.0)
    direction = Counted(SINGLE)
    cut = list(solvers.with_substeps(name, direction, 10 * X, grid, substeps=4))
    assert len(cut) == 4
    assert direction.calls == solvers.network_calls(name, 5, substeps=4)
    plain = solvers.last(solvers.find(name).run(Counted(SINGLE), 10 * X, grid))
    goal = exact(10 * X, 10.0, 0.01)
    assert (cut[-1] - goal).norm() < (plain - goal).norm() / 2


@pytest.mark.parametrize(("name", "substeps"), [("ipndm", 2), ("dpmpp", 3), ("edm", 2), ("heun", 0)])
def test_what_cannot_be_cut_is_refused(name, substeps):
    with pytest.raises(ValueError, match="only euler, heun and dpm2 can be cut"):
        next(solvers.with_substeps(name, Counted(), X, sigmas.polynomial(3, 0.01, 10.0), substeps=substeps))


@pytest.mark.parametrize("levels", [[1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, -0.1], [2.0, math.nan]])
def test_levels_that_no_solver_can_use_are_refused(levels):
    with pytest.raises(ValueError, match="decrease strictly and end above 0"):
        solvers.last(solvers.euler(Counted(), X, levels))


def test_unknown_names_and_settings_are_refused():
    with pytest.raises(ValueError, match="must be one of euler"):
        solvers.find("rk45")
    with pytest.raises(ValueError, match="bh1 or bh2"):
        next(solvers.unipc(Counted(), X, [2.0, 1.0], solvers.SolverOptions(variant="bh3")))
    with pytest.raises(ValueError, match="between 0 and 1"):
        next(solvers.dpm2(Counted(), X, [2.0, 1.0], solvers.SolverOptions(midpoint=1.0)))


def test_thresholding_keeps_every_sample_within_one():
    x0 = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.2, 1.0, 5.0]).reshape(3, 1, 1, 1)
    clipped = solvers.threshold(x0)
    torch.testing.assert_close(clipped[0], x0[0])
    assert clipped.abs().max() <= 1
