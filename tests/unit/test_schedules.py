"""Solver grids, broadcasting helpers and conversions between prediction types."""

import pytest
import torch
from diffusers import DDPMScheduler

from brisk import schedules

pytestmark = pytest.mark.quick

ABAR = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_grid_of_fifty_steps_is_the_papers():
    grid = schedules.solver_grid(ABAR, 50)
    assert grid.start_timesteps.tolist() == list(range(19, 1000, 20))
    assert grid.end_timesteps.tolist() == [0, *range(19, 980, 20)]
    assert torch.equal(grid.alpha_cumprod_start, ABAR[19::20])
    assert grid.alpha_cumprod_end[0] == ABAR[0], "the first step ends at time 0, whose signal is not 1"
    assert torch.equal(grid.alpha_cumprod_end[1:], grid.alpha_cumprod_start[:-1])


def test_grid_floors_where_the_steps_do_not_divide():
    assert schedules.solver_grid(ABAR, 3).start_timesteps.tolist() == [332, 665, 998]
    assert schedules.solver_grid(ABAR, 1).start_timesteps.tolist() == [999]
    assert schedules.solver_grid(ABAR, 1000).start_timesteps.tolist() == list(range(1000))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_grids_are_refused(steps):
    with pytest.raises(ValueError, match="num_ddim_timesteps"):
        schedules.solver_grid(ABAR, steps)


def test_grid_tables_are_float32_for_any_input_and_move_together():
    grid = schedules.solver_grid(ABAR.double(), 50).to("cpu")
    assert grid.alpha_cumprod_start.dtype == grid.alpha_cumprod_end.dtype == torch.float32
    assert grid.start_timesteps.dtype == grid.end_timesteps.dtype == torch.int64


def test_signal_and_noise_broadcast_and_preserve_variance():
    like = torch.zeros(3, 4, 2, 2)
    a, s = schedules.signal_and_noise(torch.tensor([1.0, 0.25, 0.0]), like)
    assert a.shape == s.shape == (3, 1, 1, 1)
    assert a.flatten().tolist() == [1.0, 0.5, 0.0] and s.flatten().tolist()[::2] == [0.0, 1.0]
    assert schedules.expand(torch.ones(3), torch.zeros(3, 5)).shape == (3, 1)


@pytest.mark.parametrize("kind", schedules.PREDICTION_TYPES)
def test_conversion_recovers_sample_and_noise(kind):
    x0, eps = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).double().chunk(2)
    a, s = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    raw = {"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]
    found = schedules.to_x0_eps(raw, a * x0 + s * eps, a, s, kind)
    torch.testing.assert_close(found, (x0, eps), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="flow"):
        schedules.to_x0_eps(raw, x0, a, s, "flow")


@pytest.mark.parametrize("kind", schedules.PREDICTION_TYPES)
def test_target_is_the_output_that_stands_for_the_true_sample_and_noise(kind):
    x0, eps = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(1)).double().chunk(2)
    a, s = schedules.signal_and_noise(torch.tensor([0.36, 0.9]).double(), x0)
    target = schedules.prediction_target(x0, eps, a, s, kind)
    torch.testing.assert_close(schedules.to_x0_eps(target, a * x0 + s * eps, a, s, kind), (x0, eps), atol=1e-9, rtol=1e-9)
    with pytest.raises(ValueError, match="flow.*epsilon, v_prediction, sample"):
        schedules.prediction_target(x0, eps, a, s, "flow")


def test_velocity_target_is_that_of_the_stock_scheduler():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    x0, eps = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(2)).chunk(2)
    times = torch.tensor([0, 400, 999])
    a, s = schedules.signal_and_noise(ABAR[times], x0)
    found = schedules.prediction_target(x0, eps, a, s, "v_prediction")
    torch.testing.assert_close(found, scheduler.get_velocity(x0, eps, times))
    torch.testing.assert_close(a * x0 + s * eps, scheduler.add_noise(x0, eps, times))
