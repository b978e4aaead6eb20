"""Which blocks go and what is trained on: presets, configs, weight maps, feature pairs, losses, draws."""

import functools
import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from brisk import bksdm, sd_models, tiny

pytestmark = pytest.mark.quick

SD = [name for name, preset in bksdm.PRESETS.items() if preset.family == "sd"]
SDXL = [name for name, preset in bksdm.PRESETS.items() if preset.family == "sdxl"]


def config_of(size, **changes):
    """The complete config of a U-Net of `tiny.UNETS`."""
    with torch.device("meta"):
        return sd_models.plain_config(tiny.make_unet(size, **changes))


def state_of(config):
    """Its weights, without memory."""
    return state_of_text(json.dumps(config, sort_keys=True))


@functools.cache
def state_of_text(config):
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(json.loads(config)).state_dict()


def shapes_of(config):
    return {key: value.shape for key, value in state_of(config).items()}


TOY, TOY_XL = config_of("toy"), config_of("toy_xl")
TEACHERS = {"sd": TOY, "sdxl": TOY_XL}


def mapped(preset, teacher=None):
    """(mapping, student's config, teacher's config) of a preset."""
    teacher = teacher or TEACHERS[bksdm.PRESETS[preset].family]
    student = bksdm.derive_student_config(teacher, preset)
    return bksdm.weight_map(state_of(student), student, teacher), student, teacher


# presets and configs


@pytest.mark.parametrize(("family", "alias", "name"), [
    ("sd", "sd_small", "bk_base"), ("sd", "sd_tiny", "bk_tiny"),
    ("sdxl", "sd_small", "small_sd_xl"), ("sdxl", "sd_tiny", "tiny_sd_xl"),
])  # fmt: skip
def test_aliases_mean_what_their_family_calls_so(family, alias, name):
    assert bksdm.resolve_preset(alias, TEACHERS[family]) == name


@pytest.mark.parametrize(("family", "fitting"), [("sd", SD), ("sdxl", SDXL)])
def test_presets_of_the_other_family_are_refused_naming_those_that_fit(family, fitting):
    for name in fitting:
        assert bksdm.resolve_preset(name, TEACHERS[family]) == name
    for name in set(bksdm.PRESETS) - set(fitting):
        with pytest.raises(ValueError, match=f"{name} does not fit a teacher of the .* those that do: {', '.join(fitting)}"):
            bksdm.resolve_preset(name, TEACHERS[family])


def test_an_unknown_preset_is_refused_naming_all():
    with pytest.raises(ValueError, match="'bk_huge' is none of bk_base, .*segmind_vega, sd_small, sd_tiny"):
        bksdm.resolve_preset("bk_huge", TOY)


def test_deriving_leaves_the_teachers_config_alone():
    for name, preset in bksdm.PRESETS.items():
        teacher = TEACHERS[preset.family]
        before = json.dumps(teacher, sort_keys=True)
        bksdm.derive_student_config(teacher, name)
        assert json.dumps(teacher, sort_keys=True) == before, name


CHANGED = {"inpainting": {"in_channels": 9}, "half width": {"block_out_channels": (4, 4, 8, 8)},
           "three layers": {"layers_per_block": 3}, "list of layers": {"layers_per_block": (2, 3, 2, 4)},
           "head counts": {"attention_head_dim": (2, 2, 4, 4), "use_linear_projection": True},
           "three levels": {"block_out_channels": (8, 16, 16), "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
                            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2}}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("preset", SD)
def test_students_of_unusual_teachers_are_networks_whose_weights_all_come_from_them(preset, kind):
    teacher = config_of("toy", **CHANGED[kind])
    mapping, student, _ = mapped(preset, teacher)
    bksdm.check_weights(mapping, shapes_of(student), shapes_of(teacher))
    assert student["in_channels"] == teacher["in_channels"]
    dropped = preset == "bk_tiny"
    assert list(student["block_out_channels"]) == list(teacher["block_out_channels"])[: -1 if dropped else None]
    assert len(student["down_block_types"]) == len(student["up_block_types"]) == len(student["block_out_channels"])
    if kind == "list of layers":
        assert student["layers_per_block"] == [1] * (3 if dropped else 4)
        last = "up_blocks.1.resnets.2" if dropped else "up_blocks.0.resnets.4"
        assert mapping["up_blocks.0.resnets.1.conv1.weight"] == f"{last}.conv1.weight"
    if kind == "head counts":
        assert list(student["attention_head_dim"]) == [2, 2, 4, 4][: -1 if dropped else None]


@pytest.mark.parametrize(("preset", "changes", "words"), [
    ("bk_base", {"layers_per_block": 1}, "1 layer per block already"),
    ("bk_small", {"layers_per_block": (2, 1, 2, 2)}, "1 layer per block already"),
    ("bk_tiny", {"block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                 "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, "2 levels"),
])  # fmt: skip
def test_a_teacher_that_has_not_what_goes_is_refused(preset, changes, words):
    with pytest.raises(ValueError, match=words):
        bksdm.derive_student_config(config_of("toy", **changes), preset)


@pytest.mark.parametrize(("preset", "depths", "allowed"), [
    ("koala_1b", (1, 2, 6), True), ("koala_1b", (1, 2, 5), False), ("koala_700m", (1, 2, 5), True),
    ("koala_700m", (1, 1, 5), False),
    ("ssd_1b", (1, 2, 10), True), ("ssd_1b", (1, 2, 9), False), ("segmind_vega", (1, 1, 2), True), ("segmind_vega", 1, False),
    ("koala_1b", (1, [2, 2], [4, 4]), False),
])  # fmt: skip
def test_a_teacher_with_shallower_transformers_than_the_preset_keeps_is_refused(preset, depths, allowed):
    teacher = TOY_XL | {"transformer_layers_per_block": depths}
    if allowed:
        config = bksdm.derive_student_config(teacher, preset)
        assert config["transformer_layers_per_block"] == list(bksdm.PRESETS[preset].depths)
    else:
        with pytest.raises(ValueError, match="transformer depths .* the preset needs at least"):
            bksdm.derive_student_config(teacher, preset)


# weights


def test_every_misfit_of_the_weights_is_listed_in_one_error():
    mapping, student, teacher = mapped("bk_tiny")
    mine, its = shapes_of(student), shapes_of(teacher)
    bksdm.check_weights(mapping, mine, its)
    del its["up_blocks.1.resnets.2.conv1.weight"], its["conv_in.bias"]
    its["conv_out.weight"] = torch.Size([9, 8, 3, 3])
    with pytest.raises(ValueError) as caught:
        bksdm.check_weights(mapping, mine, its)
    message = str(caught.value)
    assert message.startswith("3 weights of the student cannot come from this teacher: ") and "\n" not in message
    for part in ("up_blocks.0.resnets.1.conv1.weight: the teacher has no up_blocks.1.resnets.2.conv1.weight",
                 "conv_in.bias: the teacher has no conv_in.bias", "conv_out.weight (4, 8, 3, 3): conv_out.weight is (9, 8, 3, 3)"):
        assert part in message


@pytest.mark.parametrize("preset", bksdm.PRESETS)
def test_removal_table_accounts_for_every_parameter(preset):
    mapping, student, teacher = mapped(preset)
    numels = {key: value.numel() for key, value in state_of(teacher).items()}
    table = bksdm.removal_table(mapping, numels)
    assert len({row[0] for row in table}) == len(table)
    kept, removed = sum(row[2] for row in table), sum(row[3] for row in table)
    assert kept == sum(value.numel() for value in state_of(student).values())
    assert kept + removed == sum(numels.values()) and removed > 0
    for unit, kept_as, stays, goes in table:
        assert min(stays, goes) >= 0 and bool(kept_as) == (stays > 0), unit
    lines = bksdm.removal_lines(mapping, numels)
    assert lines[0].split("  ")[0] == "teacher module" and len(lines) == len(table) + 1


def test_removal_table_says_where_layers_went():
    mapping, _, teacher = mapped("bk_tiny")
    numels = {key: value.numel() for key, value in state_of(teacher).items()}
    place = {row[0]: row[1] for row in bksdm.removal_table(mapping, numels)}
    assert place["up_blocks.3.resnets.2"] == "up_blocks.2.resnets.1"
    assert place["down_blocks.1.resnets.0"] == "down_blocks.1.resnets.0"
    gone = ("mid_block.resnets.0", "down_blocks.3.resnets.0", "up_blocks.0.resnets.2", "up_blocks.3.resnets.1",
            "down_blocks.0.attentions.1", "down_blocks.2.downsamplers.0")  # fmt: skip
    assert [place[unit] for unit in gone] == [""] * len(gone)
    line = next(line for line in bksdm.removal_lines(mapping, numels) if line.startswith("down_blocks.3.resnets.0 "))
    count = sum(value for key, value in numels.items() if key.startswith("down_blocks.3.resnets.0."))
    assert line.split() == ["down_blocks.3.resnets.0", "-", f"{count:,}"]


# feature pairs


@pytest.mark.parametrize(("preset", "feature_set", "count"), [
    ("bk_base", "bk", 8), ("bk_small", "bk", 8), ("bk_tiny", "bk", 6), ("bk_base", "stage", 9), ("bk_small", "stage", 8),
    ("bk_tiny", "stage", 6), ("bk_base", "layer", 22), ("bk_small", "layer", 21), ("bk_tiny", "self_attn", 11),
    ("small_sd_xl", "stage", 7), ("tiny_sd_xl", "stage", 6), ("koala_1b", "self_attn", 32), ("koala_700m", "self_attn", 23),
    ("ssd_1b", "layer", 26), ("segmind_vega", "layer", 26), ("ssd_1b", "stage", 7), ("tiny_sd_xl", "bk", 6),
])  # fmt: skip
def test_feature_pairs_are_modules_of_both_and_of_equal_depth(preset, feature_set, count):
    mapping, student, teacher = mapped(preset)
    pairs = bksdm.feature_pairs(feature_set, mapping, student, teacher)
    assert len(pairs) == len({mine for _, mine in pairs}) == count
    for side, config in enumerate((teacher, student)):
        modules = {key[:end] for key in state_of(config) for end, letter in enumerate(key) if letter == "."}
        assert {pair[side] for pair in pairs} <= modules


def test_feature_set_depends_on_the_preset_or_the_family():
    assert {name: bksdm.default_feature_set(name, None) for name in bksdm.PRESETS} == {
        **dict.fromkeys(SD, "bk"), "small_sd_xl": "stage", "tiny_sd_xl": "stage", "koala_1b": "self_attn",
        "koala_700m": "self_attn", "ssd_1b": "layer", "segmind_vega": "layer"}  # fmt: skip
    assert [bksdm.default_feature_set(None, teacher) for teacher in (TOY, TOY_XL)] == ["bk", "stage"]


# losses


def draws(*shape, count=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(count)]


def test_losses_are_means_over_elements_summed_over_pairs_and_move_the_student_alone():
    ours = [tensor.requires_grad_() for tensor in draws(2, 3, 4) + draws(2, 8, seed=1)[:1]]
    theirs = [tensor.requires_grad_() for tensor in draws(2, 3, 4, seed=2) + draws(2, 8, seed=3)[:1]]
    terms = bksdm.feature_loss(ours, theirs)
    assert terms.tolist() == pytest.approx([((a - b) ** 2).mean().item() for a, b in zip(ours, theirs, strict=True)])
    terms.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, 2 * (a - b).detach() / a.numel())
    bksdm.output_loss(ours[0], theirs[0]).backward()
    assert all(tensor.grad is None for tensor in theirs)


@pytest.mark.parametrize("relative", [False, True])
def test_gradient_of_weighted_features_is_that_of_the_formula(relative):
    (student, teacher), weights = draws(3, 2, 2), torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: bksdm.feature_loss([x], [teacher], weights, relative), student)
    expected = (weights * (student - teacher).square().flatten(1).mean(1)).mean() / (teacher.square().mean() if relative else 1)
    assert bksdm.feature_loss([student], [teacher], weights, relative).item() == pytest.approx(expected.item())


def test_half_precision_features_are_compared_in_float32():
    student, teacher = torch.full((1, 100_000), 300.0, dtype=torch.float16), torch.zeros(1, 100_000, dtype=torch.bfloat16)
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        terms = bksdm.feature_loss([student], [teacher])
    assert terms.dtype == torch.float32 and terms.item() == pytest.approx(90_000)
    terms.sum().backward()
    assert student.grad.dtype == torch.float16 and torch.isfinite(student.grad).all() and student.grad.abs().min() > 0


def test_output_loss_weighs_samples():
    prediction, target = draws(3, 4, 2, 2)
    weights = torch.tensor([1.0, 0.0, 3.0])
    each = (prediction - target).square().flatten(1).mean(1)
    assert bksdm.output_loss(prediction, target, weights).item() == pytest.approx(((each[0] + 3 * each[2]) / 3).item())
    assert bksdm.output_loss(prediction, target).item() == pytest.approx(each.mean().item())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_stay_finite_where_nothing_is_left_of_the_signal(kind):
    alphas = torch.tensor([0.0, 1e-12, 0.5, 0.9])
    for weights in (bksdm.min_snr_weights(alphas, 5.0, kind), bksdm.debias_weights(alphas, kind)):
        assert torch.isfinite(weights).all() and (weights > 0 if kind == "epsilon" else weights >= 0).all()
    assert bksdm.min_snr_weights(alphas, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 1, 5 / 9])
    assert bksdm.debias_weights(alphas, "epsilon")[:2].tolist() == pytest.approx([1e4, 1e4]), "SNR is at least 1e-8"


def test_loss_weights_follow_the_options():
    alphas = torch.tensor([0.2, 0.9])
    assert bksdm.loss_weights(alphas, None, False, "epsilon").tolist() == [1, 1]
    assert torch.equal(bksdm.loss_weights(alphas, 5.0, False, "v_prediction"), bksdm.min_snr_weights(alphas, 5.0, "v_prediction"))
    assert torch.equal(bksdm.loss_weights(alphas, None, True, "epsilon"), bksdm.debias_weights(alphas, "epsilon"))


# draws


GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def shares(sampling, total=1000, quarters=4):
    """The share of the draws in each quarter of the timesteps."""
    times = bksdm.draw_timesteps(GRID.clone(), sampling, total)
    assert times.dtype == torch.int64 and times.min() == 0 and times.max() == total - 1
    return (torch.bincount(times * quarters // total, minlength=quarters) / len(GRID)).tolist()


@pytest.mark.parametrize(("sampling", "weights"), [
    ("uniform", (1, 1, 1, 1)), ("later", (1, 1, 1, 5)), ("earlier", (5, 1, 1, 1)), ("range", (1, 5, 5, 1)),
])  # fmt: skip
def test_favoured_timesteps_are_drawn_five_times_as_often(sampling, weights):
    assert shares(sampling) == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-3)


def test_cubic_draws_favour_the_late_timesteps():
    ends = [(1 - t / 4) ** (1 / 3) for t in range(5)]
    assert shares("cubic") == pytest.approx([ends[t] - ends[t + 1] for t in range(4)], abs=2e-3)


@pytest.mark.parametrize("sampling", ["uniform", *bksdm.FAVOURED, "cubic"])
def test_timesteps_stay_in_range_at_the_ends_of_the_unit_interval(sampling):
    ends = torch.tensor([0.0, 1 - 2**-24, 1.0])
    assert set(bksdm.draw_timesteps(ends, sampling, 10).tolist()) == {0, 9}


def test_unpaired_probability_grows_with_the_noise():
    chance = bksdm.unpaired_probability(torch.arange(1000), 5.0, 1000)
    assert (chance.diff() > 0).all() and chance[0].item() == pytest.approx(math.exp(-5)) and 0.99 < chance[-1] < 1
    assert (bksdm.unpaired_probability(torch.arange(1000), 0.0, 1000) == 1).all()


def test_average_starts_from_the_student_and_slows_down():
    assert [bksdm.ema_decay(update, 0.9999) for update in (1, 2, 3, 12)] == pytest.approx([0, 2 / 11, 3 / 12, 12 / 21])
    assert bksdm.ema_decay(10**7, 0.9999) == 0.9999 and bksdm.ema_decay(1000, 0.5) == 0.5
