"""Averages, optimizers, schedules, skipped steps and the guard against non-finite values."""

import copy
import types

import pytest
import torch

from brisk import optim
from brisk.options import UserError

pytestmark = pytest.mark.quick


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 2, 1))


def values(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def move(module, seed):
    """Change the weights in place, as an optimizer does."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + number))


def test_lerp_equals_a_loop():
    targets, sources = values(network(0)), values(network(1))
    expected = [0.95 * t + (1 - 0.95) * s for t, s in zip(targets, sources, strict=True)]
    before = [t.data_ptr() for t in targets]
    optim.lerp_(targets, sources, 0.95)
    assert [t.data_ptr() for t in targets] == before
    torch.testing.assert_close(targets, expected, atol=1e-7, rtol=1e-6)
    kept = [t.clone() for t in targets]
    optim.lerp_(targets, sources, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(targets, kept, strict=True))
    optim.lerp_(targets, sources, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(targets, sources, strict=True))
    with pytest.raises(ValueError):
        optim.lerp_(targets, sources[:-1], 0.5)


def test_lerp_of_half_precision_sources_into_a_float32_master():
    target = [torch.ones(4)]
    optim.lerp_(target, [torch.full((4,), 2.0, dtype=torch.bfloat16)], 0.9)
    assert target[0].dtype == torch.float32
    torch.testing.assert_close(target[0], torch.full((4,), 1.1))


@pytest.mark.parametrize("layout", ["plain", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_follows_the_student_in_master_and_network(dtype, layout):
    student = network()
    ema = optim.EMA(copy.deepcopy(student))
    if layout == "channels_last":  # replaces the storage of the weights after the average was made
        ema.network.to(memory_format=torch.channels_last)
    ema.work_in(dtype)
    expected = values(student)
    for seed in range(4):
        move(student, seed)
        ema.update(student.parameters(), 0.8)
        expected = [0.8 * e + (1 - 0.8) * p.detach() for e, p in zip(expected, student.parameters(), strict=True)]
        torch.testing.assert_close(ema.master, expected, atol=1e-6, rtol=1e-6)
        for working, master in zip(ema.network.parameters(), ema.master, strict=True):
            assert working.dtype == dtype and torch.equal(working, master.to(dtype))
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert not ema.network.training


def test_small_updates_are_not_lost_while_the_network_works_in_bfloat16():
    student = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(student.weight)
    ema = optim.EMA(copy.deepcopy(student))
    ema.work_in(torch.bfloat16)
    torch.nn.init.constant_(student.weight, 1.002)  # bfloat16 steps near 1 are 2^-7
    for _ in range(200):
        ema.update(student.parameters(), 0.95)
    assert ema.master[0].dtype == torch.float32
    assert ema.master[0].item() == pytest.approx(1.002, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_state_round_trip_is_exact(dtype):
    student = network()
    ema = optim.EMA(copy.deepcopy(student))
    ema.work_in(dtype)
    move(student, 1)
    ema.update(student.parameters(), 0.7)
    state = {name: value.clone() for name, value in ema.state_dict().items()}
    assert set(state) == set(student.state_dict()), "the network's own names, buffers included"
    assert all(state[name].dtype == torch.float32 for name, _ in student.named_parameters())
    other = optim.EMA(network(5))
    other.work_in(dtype)
    other.load_state_dict(state)
    for mine, theirs in zip(other.master, ema.master, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(other.network.parameters(), ema.network.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def make(name, parameters, **settings):
    arguments = {"learning_rate": 0.1, "betas": (0.9, 0.999), "weight_decay": 0.01, "epsilon": 1e-8,
                 "device": torch.device("cpu"), "warn": pytest.fail}  # fmt: skip
    return optim.create_optimizer(name, list(parameters), **{**arguments, **settings})


def adamw(parameters):
    return make("adamw", parameters)


def test_optimizer_is_adamw_and_its_fused_form_equals_the_plain_one():
    one, two = network(), network()
    fused, plain = (
        adamw(one.parameters()),
        torch.optim.AdamW(two.parameters(), lr=0.1, weight_decay=0.01, foreach=False),
    )
    assert fused.defaults["fused"]
    for seed in range(3):
        for module, optimizer in ((one, fused), (two, plain)):
            for number, parameter in enumerate(module.parameters()):
                parameter.grad = torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(10 * seed + number)
                )
            optimizer.step()
    torch.testing.assert_close(values(one), values(two), atol=1e-6, rtol=1e-5)


def test_8bit_adam_where_bitsandbytes_is_missing(monkeypatch):
    monkeypatch.setattr(optim.importlib.util, "find_spec", lambda name: None)
    said = []
    made = make("adamw8bit", network().parameters(), warn=said.append)
    assert type(made) is torch.optim.AdamW and len(said) == 1 and "pip install bitsandbytes" in said[0]
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        make("adamw8bit", network().parameters(), device=torch.device("cuda"))


def test_adafactor_takes_the_given_rate_without_a_schedule_of_its_own():
    module = network()
    before, optimizer = values(module), make("adafactor", module.parameters(), learning_rate=0.01)
    assert (optimizer.defaults["relative_step"], optimizer.defaults["scale_parameter"]) == (False, False)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.step_if_finite(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, values(module), strict=True))
    optim.step_if_finite(optimizer, torch.tensor(True))
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, values(module), strict=True)])
    assert moved.min() > 0 and moved.max() <= 0.0111, "a first step of about the rate"


def everything(module, optimizer):
    state = [value.clone() for entry in optimizer.state.values() for value in entry.values()]
    return values(module) + state


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_step_touches_neither_parameters_nor_state(fused):
    module = network()
    optimizer = adamw(module.parameters()) if fused else torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(gradient, finite):
        for parameter in module.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optim.step_if_finite(optimizer, torch.tensor(finite))

    step(1.0, True)
    before = everything(module, optimizer)
    assert len(before) > len(list(module.parameters()))
    step(float("nan"), False)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module, optimizer), strict=True))
    assert not hasattr(optimizer, "found_inf")
    step(1.0, True)
    after = everything(module, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True)), "training goes on"
    assert all(torch.isfinite(value).all() for value in after)


def test_a_first_step_that_is_skipped_does_no_harm():
    module = network()
    optimizer, before = adamw(module.parameters()), values(module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optim.step_if_finite(optimizer, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, values(module), strict=True))


def test_under_a_gradient_scaler_the_scaler_decides():
    taken = []
    wrapped = types.SimpleNamespace(
        scaler=object(), step=lambda: taken.append(1), optimizer=adamw(network().parameters())
    )
    optim.step_if_finite(wrapped, torch.tensor(False))
    assert taken == [1]


def guard():
    return optim.FiniteGuard(("latents", "loss"), torch.device("cpu"))


FINE, NAN, INF = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_guard_allows_finite_steps_and_forbids_others():
    watched = guard()
    watched.watch(torch.ones(3), FINE)
    assert watched.finish_step(FINE, scaled=False).item() is True
    watched.watch(torch.ones(3), NAN)
    watched.watch(torch.ones(3), FINE)  # a later micro-step of the same step does not make it good
    assert watched.finish_step(FINE, scaled=False).item() is False
    watched.watch(torch.ones(3), FINE)
    assert watched.finish_step(INF, scaled=False).item() is False
    watched.watch(torch.ones(3), FINE)
    assert watched.finish_step(FINE, scaled=False).item() is True
    assert watched.check() == 2


def test_guard_counts_every_term_and_names_it_after_ten_in_a_row():
    watched = guard()
    for _ in range(optim.FiniteGuard.LIMIT):
        watched.watch(torch.tensor([1.0, float("inf")]), NAN)
        watched.finish_step(NAN, scaled=False)
    with pytest.raises(UserError) as error:
        watched.check()
    text = str(error.value)
    assert "10 steps in a row" in text and "latents 10x, loss 10x, gradient 10x" in text and error.value.exit_code == 1
    watched = guard()
    for _ in range(10):
        watched.watch(FINE, NAN)
        watched.finish_step(FINE, scaled=False)
    with pytest.raises(UserError, match=r"\(loss 10x\)"):
        watched.check()


def test_nine_in_a_row_again_and_again_do_not_stop_the_run():
    watched = guard()
    for step in range(60):
        watched.watch(FINE, FINE if step % 10 == 9 else NAN)
        watched.finish_step(FINE, scaled=False)
        assert watched.check() == step + 1 - (step + 1) // 10


def test_infinite_loss_scaled_gradients_are_the_scalers_business():
    watched = guard()
    for _ in range(12):
        watched.watch(FINE, FINE)
        watched.finish_step(INF, scaled=True)
    assert watched.check() == 0


def test_swapped_exchanges_values_and_restores_them():
    mine, theirs = values(network(0)), values(network(1))
    kept = copy.deepcopy(mine), copy.deepcopy(theirs)
    mine[0].requires_grad_()
    with optim.swapped(mine, theirs):
        assert all(torch.equal(a, b) for a, b in zip(mine, kept[1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(theirs, kept[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(mine + theirs, kept[0] + kept[1], strict=True))
    with pytest.raises(KeyError), optim.swapped(mine, theirs):
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(mine, kept[0], strict=True)), "also after an error"
    with optim.swapped(mine, None):
        assert all(torch.equal(a, b) for a, b in zip(mine, kept[0], strict=True))


def test_learning_rate_follows_the_optimizer_steps():
    optimizer = adamw(network().parameters())
    schedule = optim.create_lr_scheduler("linear", optimizer, 2, 10)
    rates = [schedule.get_last_lr()[0]]
    for _ in range(10):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    expected = [0, 0.05, 0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375, 0.025, 0.0125, 0]
    assert rates == pytest.approx(expected)
    constant = optim.create_lr_scheduler("constant", optimizer, 500, 10)
    assert constant.get_last_lr() == [0.1], "no warm-up"
