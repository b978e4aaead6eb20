"""Taps read each module once per armed pass, ignore everything else, and leave nothing behind."""

import gc

import pytest
import torch

from brisk import bksdm, macs, tiny
from brisk.feature_taps import FeatureTaps, check_pairs

pytestmark = pytest.mark.quick


class Net(torch.nn.Module):
    """Calls one layer twice, has one that returns a tuple, one that is never called and one within a list."""

    def __init__(self):
        super().__init__()
        self.twice, self.unused, self.pair = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3), Pair()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 2)])

    def forward(self, x):
        hidden, _ = self.pair(self.twice(self.twice(x)))
        return (self.layers[0](hidden),)


class Pair(torch.nn.Module):
    def forward(self, x):
        return x + 1, (x, x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.ones(1, 3)


def small_unet():
    torch.manual_seed(0)
    return tiny.make_unet("tiny")


UNET_NAMES = ["up_blocks.1", "mid_block", "down_blocks.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1"]


def call_of(unet, seed=0, batch=1):
    return macs.unet_inputs(unet.config, batch, 8, tokens=4, generator=torch.Generator().manual_seed(seed))


def test_the_first_output_is_kept_and_a_tuple_gives_its_first_element(net, x):
    taps = FeatureTaps(net, ["pair", "twice"])
    taps.arm()
    net(x)
    pair, twice = taps.read()
    once = net.twice(x)
    assert torch.equal(twice, once) and not torch.equal(net.twice(once), once)
    assert torch.equal(pair, net.twice(once) + 1)


def test_down_blocks_give_their_hidden_states_not_the_skips():
    unet = small_unet()
    taps = FeatureTaps(unet, ["down_blocks.0", "up_blocks.1"])
    taps.arm()
    unet(**call_of(unet))
    assert [tuple(feature.shape) for feature in taps.read()] == [(1, 8, 4, 4), (1, 8, 8, 8)]


def test_only_the_pass_after_arming_is_read_and_a_second_one_does_not_replace_it(net, x):
    taps = FeatureTaps(net, ["twice"])
    net(x)
    assert taps.features == {}, "not armed yet"
    taps.arm()
    net(x)
    net(2 * x)
    assert torch.equal(taps.read()[0], net.twice(x))
    net(3 * x)
    assert taps.features == {}, "reading disarms"
    taps.arm()
    net(4 * x)
    assert torch.equal(taps.read()[0], net.twice(4 * x)), "each arming listens anew"


def test_each_armed_pass_fires_each_tap_once():
    unet = small_unet()
    taps = FeatureTaps(unet, UNET_NAMES)
    stored = []

    class Noting(dict):
        def __setitem__(self, name, feature):
            stored.append(name)
            super().__setitem__(name, feature)

    for step in range(3):
        taps.arm()
        taps.features = Noting()
        unet(**call_of(unet, step))
        taps.read()
    assert sorted(stored) == sorted(3 * UNET_NAMES)


def test_a_module_named_twice_is_read_twice_through_one_hook(net, x):
    taps = FeatureTaps(net, ["twice", "pair", "twice"])
    assert len(taps.handles) == 2
    taps.arm()
    net(x)
    features = taps.read()
    assert features[0] is features[2] and features[0] is not features[1]


def test_a_silent_module_is_an_error_that_names_it(net, x):
    taps = FeatureTaps(net, ["twice", "unused"])
    taps.arm()
    net(x)
    with pytest.raises(RuntimeError, match="no output of unused was seen"):
        taps.read()
    with pytest.raises(RuntimeError, match="no output of twice, unused was seen"):
        taps.read()


def test_unknown_modules_are_one_error_naming_all_and_leave_no_hook(net):
    with pytest.raises(ValueError, match="has no module nothing, layers.1"):
        FeatureTaps(net, ["twice", "nothing", "layers.1"])
    assert not any(module._forward_hooks for module in net.modules())


def test_hooks_are_gone_after_removal(net, x):
    taps = FeatureTaps(net, ["twice", "pair"])
    assert sum(len(module._forward_hooks) for module in net.modules()) == 2
    taps.remove()
    assert not any(module._forward_hooks for module in net.modules())
    taps.arm()
    net(x)
    assert taps.features == {}


def distil_once(teacher, student, taps, seed=0):
    """One backward pass of the feature loss; (loss, gradients of the student)."""
    call = call_of(student, seed, batch=2)
    student.zero_grad()
    for network, tap in zip((teacher, student), taps, strict=True):
        tap.arm()
        with torch.set_grad_enabled(network.training):
            network(**call)
    features = [tap.read() for tap in reversed(taps)]
    loss = bksdm.feature_loss(*features).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def networks(checkpointing):
    teacher, student = small_unet().eval().requires_grad_(False), tiny.make_unet("tiny").train()
    if checkpointing:
        student.enable_gradient_checkpointing()
    return teacher, student, [FeatureTaps(network, UNET_NAMES) for network in (teacher, student)]


def test_recomputation_under_gradient_checkpointing_changes_no_gradient_and_keeps_no_feature(monkeypatch):
    calls, real = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    plain, with_checkpoints = (networks(checkpointing) for checkpointing in (False, True))
    loss, expected = distil_once(*plain)
    assert not calls
    fired = []
    watch = with_checkpoints[1].get_submodule(UNET_NAMES[3]).register_forward_hook(lambda *given: fired.append(given[2]))
    found, grads = distil_once(*with_checkpoints)
    watch.remove()
    assert len(calls) > 3 and len(fired) == 2, "the module within a checkpoint ran again in backward"
    assert with_checkpoints[2][1].features == {}, "and its second output was not kept"
    assert found == pytest.approx(loss, rel=1e-5) and grads.keys() == expected.keys() and len(grads) > 50
    for name in expected:
        torch.testing.assert_close(grads[name], expected[name], rtol=1e-4, atol=1e-6)


def test_every_tap_sends_gradient_into_the_student():
    teacher, student, taps = networks(checkpointing=True)
    call = call_of(student)
    for network, tap in zip((teacher, student), taps, strict=True):
        tap.arm()
        network(**call)
    for name, term in zip(UNET_NAMES, bksdm.feature_loss(taps[1].read(), taps[0].read()), strict=True):
        grad = torch.autograd.grad(term, student.conv_in.weight, retain_graph=True)[0]
        assert grad.abs().max() > 0, name


def live_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_tensor_outlives_its_step(checkpointing):
    teacher, student, taps = networks(checkpointing)
    distil_once(teacher, student, taps)
    before = live_tensors()
    for step in range(50):
        distil_once(teacher, student, taps, step)
    assert live_tensors() <= before
    assert taps[0].features == taps[1].features == {}


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 4)])


@pytest.mark.parametrize(("pairs", "other", "words"), [
    ([("twice", "twice"), ("a", "b"), ("c", "pair")], Net, "teacher: the U-Net has no module a, c"),
    ([("twice", "twice"), ("pair", "b")], Net, "student: the U-Net has no module b"),
    ([("layers.0", "twice"), ("pair", "pair")], Net, r"different shapes: layers.0 \(1, 2\) and twice \(1, 3\)\."),
    ([("pair", "pair")], Wide, r"different shapes: the teacher's output \(1, 2\) and the student's \(1, 4\)"),
    ([("unused", "twice")], Net, "teacher: a trial call failed: no output of unused"),
    ([("layers", "layers")], Net, "teacher: a trial call failed: no output of layers"),
    ([("twice", "twice")], torch.nn.Identity, "student: the U-Net has no module twice"),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_one_error_and_leave_no_hook(net, x, pairs, other, words):
    student = other()
    with pytest.raises(ValueError, match=f"^feature pairs.*{words}") as caught:
        check_pairs(net, student, pairs, {"x": x})
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for network in (net, student) for module in network.modules())


def test_a_student_that_cannot_be_called_like_the_teacher_is_said_so(net, x):
    student = Net()
    student.twice = torch.nn.Linear(5, 5)
    with pytest.raises(ValueError, match="student: a trial call failed: "):
        check_pairs(net, student, [("twice", "twice")], {"x": x})
    check_pairs(net, Net(), [("twice", "twice"), ("pair", "twice")], {"x": x})
