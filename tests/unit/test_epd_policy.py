"""The policy over EPD tables beyond the golden numbers: distributions against torch, its start, draws, exports, refusals."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet, LogNormal, kl_divergence

from brisk import dirichlet, epd, epd_policy

pytestmark = pytest.mark.quick
ALPHA = torch.tensor([[0.3, 4.0, 11.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
OTHER = torch.tensor([[1.0, 3.0, 2.0], [0.7, 5.0, 2.5]], dtype=torch.float64)


def make_tables(intervals=4, points=2, seed=0):
    raw = epd.initial_raw(intervals, points, "normal", torch.Generator().manual_seed(seed))
    return epd.effective(epd.Tables(*(table.double() for table in raw)), 0.1, 0.2)


def test_closed_forms_are_those_of_torch():
    x = Dirichlet(OTHER).sample()
    torch.testing.assert_close(dirichlet.log_density(ALPHA, x), Dirichlet(ALPHA).log_prob(x))
    torch.testing.assert_close(dirichlet.entropy(ALPHA), Dirichlet(ALPHA).entropy())
    torch.testing.assert_close(dirichlet.divergence(ALPHA, OTHER), kl_divergence(Dirichlet(ALPHA), Dirichlet(OTHER)))
    location, log_std = torch.tensor([0.1, -0.4]), torch.tensor([-1.0, 0.3])
    own = LogNormal(location, log_std.exp())
    torch.testing.assert_close(dirichlet.log_normal_density(location, log_std, x[0, :2]), own.log_prob(x[0, :2]))
    torch.testing.assert_close(dirichlet.log_normal_entropy(location, log_std), own.entropy())
    found = dirichlet.normal_divergence(location, log_std, log_std, location)
    torch.testing.assert_close(found, kl_divergence(own, LogNormal(log_std, location.exp())))


def test_draws_have_the_mean_of_the_distribution_and_repeat_with_the_generator():
    drawn = dirichlet.draw(ALPHA, 20000, np.random.default_rng(0))
    torch.testing.assert_close(drawn.mean(0), ALPHA / ALPHA.sum(-1, keepdim=True), atol=0.01, rtol=0)
    assert drawn[:5].equal(dirichlet.draw(ALPHA, 20000, np.random.default_rng(0))[:5])
    tiny = dirichlet.draw(torch.full((2, 3), 1e-5), 1000, np.random.default_rng(0))
    assert tiny.min() > 0 and tiny.isfinite().all() and tiny.dtype == torch.float32
    torch.testing.assert_close(tiny.sum(-1), torch.ones(1000, 2))
    scales = dirichlet.draw_log_normal(torch.tensor([0.2]), torch.tensor([-1.0]), 20000, np.random.default_rng(0))
    assert scales.log().mean().item() == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("learned", [(False, False), (True, False), (False, True), (True, True)])
def test_the_policy_starts_at_its_tables_and_keeps_scales_that_it_does_not_learn(learned):
    tables = epd_policy.sanitise(make_tables())[0]
    base = epd_policy.base_factors(tables, 10.0, *learned)
    network = epd_policy.Residual(4, epd_policy.residual_width(base), hidden=8).double()
    factors = epd_policy.apply_residuals(base, network())
    assert epd_policy.log_density(factors, epd_policy.draw(factors, 3, np.random.default_rng(0))).shape == (3,)
    torch.testing.assert_close(torch.stack(epd_policy.divergences(factors, base)).sum(), torch.zeros((), dtype=torch.float64))
    found = epd_policy.exported_tables(factors, tables, scale_point="median")
    for table, expected in zip(found, tables, strict=True):
        torch.testing.assert_close(table, expected, atol=1e-9, rtol=0)
    action = epd_policy.draw(factors, 5, np.random.default_rng(0))
    drawn = epd_policy.action_tables(action, tables)
    assert all(table.shape == (5, 4, 2) and not table.requires_grad for table in drawn)
    assert (drawn.r.diff(dim=-1) > 0).all() and 0 < drawn.r.min() and drawn.r.max() < 1
    for scale, kept, learns in zip(drawn[2:], tables[2:], learned, strict=True):
        assert scale.equal(kept.expand_as(scale)) != learns


def test_a_step_of_the_loss_moves_the_policy_towards_the_better_action():
    tables = epd_policy.sanitise(make_tables())[0]
    base = epd_policy.base_factors(tables, 10.0)
    network = epd_policy.Residual(4, epd_policy.residual_width(base), hidden=8).double()
    action = epd_policy.draw(base, 2, np.random.default_rng(0))
    old = epd_policy.log_density(base, action)
    adam = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        factors = epd_policy.apply_residuals(base, network())
        found = epd_policy.policy_loss(factors, base, action, old, torch.tensor([1.0, -1.0], dtype=torch.float64))
        adam.zero_grad()
        found.loss.backward()
        adam.step()
    moved = epd_policy.log_density(epd_policy.apply_residuals(base, network()), action) - old
    assert moved[0] > 0 > moved[1]


def test_unordered_and_crowded_positions_are_put_in_order():
    r = torch.tensor([[0.9, 0.1], [1.0, 1.0], [0.0, 0.0], [0.3, 0.6]])
    weight = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    tables, reordered, adjusted = epd_policy.sanitise(epd.Tables(r, weight, torch.ones_like(r), torch.ones_like(r)))
    assert reordered.tolist() == [True, False, False, False] and adjusted.tolist() == [False, True, True, False]
    assert tables.weight[0].tolist() == pytest.approx([0.8, 0.2])
    assert (tables.r.diff(dim=-1) > 0).all() and tables.r.min() > 0 and tables.r.max() < 1
    _, weights, _, of_weight, start = epd_policy.cold_start(tables, 10.0)
    assert of_weight.tolist() == [False, False, False, True] and weights[3].tolist() == [0.5, 0.5]
    assert all((alpha > 0).all() for alpha in start[:2])


def test_the_mode_is_exported_where_there_is_one():
    tables = epd_policy.sanitise(make_tables(2))[0]
    factors = epd_policy.Factors(ALPHA, torch.tensor([[3.0, 2.0], [0.5, 2.0]], dtype=torch.float64))
    found = epd_policy.exported_tables(factors, tables, point="mode")
    torch.testing.assert_close(found.r[1], torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(found.r[0], (ALPHA[0] / ALPHA[0].sum()).cumsum(0)[:2])  # an alpha below 1: the mean
    torch.testing.assert_close(found.weight, torch.tensor([[2 / 3, 1 / 3], [0.2, 0.8]], dtype=torch.float64))


def test_groups_of_prompts_remove_what_the_prompts_differ_in():
    rewards = torch.tensor([1.0, 2.0, 11.0, 12.0])
    torch.testing.assert_close(epd_policy.advantages(rewards, 2, "prompt", False), torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(epd_policy.advantages(rewards, 2, "mixed", False), torch.tensor([-10.0, -10.0, 10.0, 10.0]))
    assert not epd_policy.advantages(torch.ones(4), 2).any()
    with pytest.raises(ValueError, match="no multiple of 3"):
        epd_policy.advantages(rewards, 3)
    with pytest.raises(ValueError, match="prompt or mixed"):
        epd_policy.advantages(rewards, 2, "batch")


def test_ranges_grow_only_where_they_must():
    tables = make_tables()
    assert epd_policy.wide_enough(tables, 0.1, 0.2) == (0.1, 0.2)
    wide = epd_policy.wide_enough(tables._replace(scale_time=tables.scale_time + 0.5), 0.1, 0.2)
    assert wide[0] == 0.1 and wide[1] > 0.5


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="must be one of hps"):
        epd_policy.normalised_reward("fid", torch.ones(1))
    assert math.isclose(epd_policy.normalised_reward("pickscore", torch.tensor(13.0)).item(), 0.5)
