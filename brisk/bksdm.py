"""BK-SDM (arXiv 2305.15798): which blocks of a U-Net go, what the student starts from, and what it is trained on.

Configs are those of diffusers' `UNet2DConditionModel`, as dicts. Levels count from the outermost (0) inwards;
`up_blocks.i` is level n - 1 - i. Letters: B batch, C channels, T training timesteps; abar cumulative signal.
"""

import re
from typing import NamedTuple

import torch

from brisk.schedules import expand


class Preset(NamedTuple):
    """How a student differs from its teacher; None keeps what the teacher has."""

    family: str  # "sd" or "sdxl"
    feature_set: str
    layers_per_block: int | None = None
    mid: str | None = None  # "remove", or "resnet": its first residual layer alone
    drop_innermost: bool = False
    depths: tuple | None = None  # transformer_layers_per_block
    up_depths: tuple | None = None  # reverse_transformer_layers_per_block


PRESETS = {
    # arXiv 2305.15798, figure 2
    "bk_base": Preset("sd", "bk", 1),
    "bk_small": Preset("sd", "bk", 1, "remove"),
    "bk_tiny": Preset("sd", "bk", 1, "remove", drop_innermost=True),
    # the same two rules on SDXL
    "small_sd_xl": Preset("sdxl", "stage", 1),
    "tiny_sd_xl": Preset("sdxl", "stage", 1, "remove"),
    # arXiv 2312.04005
    "koala_1b": Preset("sdxl", "self_attn", 1, depths=(1, 2, 6)),
    "koala_700m": Preset("sdxl", "self_attn", 1, "remove", depths=(1, 2, 5)),
    # arXiv 2401.02677
    "ssd_1b": Preset("sdxl", "layer", mid="resnet", depths=(1, [2, 2], [4, 4]), up_depths=([4, 4, 10], [2, 1, 1], 1)),
    "segmind_vega": Preset("sdxl", "layer", mid="resnet", depths=(1, 1, 2)),
}
ALIASES = {"sd_small": {"sd": "bk_base", "sdxl": "small_sd_xl"}, "sd_tiny": {"sd": "bk_tiny", "sdxl": "tiny_sd_xl"}}
FEATURE_SETS = ("bk", "stage", "layer", "self_attn")
LEVEL_LISTS = ("block_out_channels", "down_block_types", "attention_head_dim", "num_attention_heads",
               "transformer_layers_per_block", "cross_attention_dim", "only_cross_attention", "layers_per_block")  # fmt: skip


def family_of(config):
    """"sdxl" for a U-Net that is told image sizes, else "sd"."""
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"


def resolve_preset(name, teacher_config):
    """The name in `PRESETS` that `name` (or an alias) means for this teacher. ValueError where it does not fit."""
    family = family_of(teacher_config)
    name = ALIASES.get(name, {}).get(family, name)
    if name not in PRESETS:
        raise ValueError(f"the preset '{name}' is none of {', '.join([*PRESETS, *ALIASES])}.")
    if PRESETS[name].family != family:
        fitting = ", ".join(other for other, preset in PRESETS.items() if preset.family == family)
        kind = {"sd": "Stable Diffusion 1 or 2", "sdxl": "SDXL"}[family]
        raise ValueError(f"the preset {name} does not fit a teacher of the {kind} family; those that do: {fitting}.")
    return name


def derive_student_config(teacher_config, preset):
    """The config of the student `preset` (a name in `PRESETS`) of a teacher with `teacher_config`.

    ValueError where the teacher has not what the preset removes or keeps.
    """
    preset, config = PRESETS[preset], dict(teacher_config)
    levels = len(config["block_out_channels"])
    if preset.layers_per_block:
        present = [_layers(config, level) for level in range(levels)]
        if min(present) <= preset.layers_per_block:
            raise ValueError(f"the teacher has {min(present)} layer per block already: there is none to remove.")
        is_list = isinstance(config["layers_per_block"], (list, tuple))
        config["layers_per_block"] = [1] * levels if is_list else preset.layers_per_block
    if preset.depths:
        _check_depths(config, preset)
        config["transformer_layers_per_block"] = list(preset.depths)
    if preset.up_depths:
        config["reverse_transformer_layers_per_block"] = list(preset.up_depths)
    if preset.mid:
        config["mid_block_type"] = {"remove": None, "resnet": "UNetMidBlock2D"}[preset.mid]
    if preset.drop_innermost:
        if levels < 3:
            raise ValueError(f"the teacher has {levels} levels: dropping the innermost one needs three or more.")
        for name in LEVEL_LISTS:
            if isinstance(config.get(name), (list, tuple)):
                config[name] = list(config[name])[:-1]
        config["up_block_types"] = list(config["up_block_types"])[1:]
    return config


def _check_depths(config, preset):
    present = config.get("transformer_layers_per_block", 1)
    present = present if isinstance(present, (list, tuple)) else [present] * len(config["block_out_channels"])
    present = [min(depth) if isinstance(depth, (list, tuple)) else depth for depth in present]  # per layer: the shallowest
    deepest = [max(depth) if isinstance(depth, list) else depth for depth in preset.depths]
    for up, depth in enumerate(reversed(preset.up_depths or ())):
        deepest[up] = max(deepest[up], *depth) if isinstance(depth, list) else max(deepest[up], depth)
    if len(present) != len(deepest) or any(a < b for a, b in zip(present, deepest, strict=True)):
        raise ValueError(f"the teacher has transformer depths {present}, the preset needs at least {deepest}.")


def _layers(config, level):
    layers = config.get("layers_per_block", 2)
    return layers[level] if isinstance(layers, (list, tuple)) else layers


CALLED_WITH = ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type",
               "projection_class_embeddings_input_dim", "time_cond_proj_dim")  # fmt: skip


def check_kin(student_config, teacher_config):
    """ValueError listing why a student cannot be called like the teacher: inputs of other widths, more levels."""
    first = [[value[0] if isinstance(value, (list, tuple)) else value for value in map(config.get, CALLED_WITH)]
             for config in (student_config, teacher_config)]  # fmt: skip
    problems = [f"{name} {mine}, the teacher's is {its}" for name, mine, its in zip(CALLED_WITH, *first, strict=True)
                if mine != its]  # fmt: skip
    levels = [len(config["block_out_channels"]) for config in (student_config, teacher_config)]
    if levels[0] > levels[1]:
        problems.append(f"{levels[0]} levels, the teacher has {levels[1]}")
    if problems:
        raise ValueError(f"the student does not fit this teacher: it has {'; '.join(problems)}.")


def weight_map(student_keys, student_config, teacher_config):
    """{student weight: teacher weight that it starts from}, by name.

    A student's last up layer takes the teacher's last (the widths of its skip connection fit), dropped levels shift
    the up blocks, and everything else keeps its name: the first layers and transformer blocks stay.
    """
    levels = len(student_config["block_out_channels"])
    shift = len(teacher_config["block_out_channels"]) - levels

    def source(key):
        block = re.match(r"up_blocks\.(\d+)\.", key)
        if not block:
            return key
        number, rest = int(block[1]), key[block.end() :]
        layer = re.match(r"(resnets|attentions)\.(\d+)\.", rest)
        if layer and int(layer[2]) == _layers(student_config, levels - 1 - number):
            last = _layers(teacher_config, levels - 1 - number)
            rest = f"{layer[1]}.{last}.{rest[layer.end() :]}"
        return f"up_blocks.{number + shift}.{rest}"

    return {key: source(key) for key in student_keys}


def check_weights(mapping, student_shapes, teacher_shapes):
    """ValueError listing every weight of the student that the teacher lacks or has in another shape."""
    problems = []
    for key, source in mapping.items():
        if source not in teacher_shapes:
            problems.append(f"{key}: the teacher has no {source}")
        elif student_shapes[key] != teacher_shapes[source]:
            problems.append(f"{key} {tuple(student_shapes[key])}: {source} is {tuple(teacher_shapes[source])}")
    if problems:
        raise ValueError(f"{len(problems)} weights of the student cannot come from this teacher: {'; '.join(problems)}.")


def _unit(key):
    """The layer that a weight belongs to, as the removal table names it."""
    layer = re.match(r"((up|down)_blocks\.\d+|mid_block)\.\w+\.\d+", key)
    return layer[0] if layer else key.split(".")[0]


def removal_table(mapping, teacher_numels):
    """[(teacher layer, where the student keeps it or "", parameters kept, parameters removed)].

    Args: `mapping` of `weight_map`, `teacher_numels` {weight: number of elements}.
    """
    kept_as, kept, total = {}, {}, {}
    for key, source in mapping.items():
        if source not in teacher_numels:  # the student's own
            continue
        kept_as[_unit(source)] = _unit(key)
        kept[_unit(source)] = kept.get(_unit(source), 0) + teacher_numels[source]
    for key, count in teacher_numels.items():
        total[_unit(key)] = total.get(_unit(key), 0) + count
    return [(unit, kept_as.get(unit, ""), kept.get(unit, 0), count - kept.get(unit, 0)) for unit, count in total.items()]


def removal_lines(mapping, teacher_numels):
    """`removal_table` as aligned lines of text."""
    lines = [("teacher module", "kept as", "parameters removed")]
    lines += [(unit, kept_as or "-", f"{removed:,}" if removed else "")
              for unit, kept_as, _, removed in removal_table(mapping, teacher_numels)]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def default_feature_set(preset, teacher_config):
    """The feature set of a preset; of a student with a config of its own, that of its family's first preset."""
    return PRESETS[preset].feature_set if preset else {"sd": "bk", "sdxl": "stage"}[family_of(teacher_config)]


def feature_pairs(feature_set, mapping, student_config, teacher_config):
    """[(teacher module, student module)] whose outputs are compared, in summation order.

    Args: `feature_set` one of `FEATURE_SETS` (`bk` official, `stage` with the mid block, `layer` arXiv 2401.02677,
    `self_attn` arXiv 2312.04005), `mapping` of `weight_map`.
    """
    if feature_set in ("layer", "self_attn"):
        return _inner_pairs(feature_set, mapping, student_config, teacher_config)
    n = len(student_config["block_out_channels"])
    shift = len(teacher_config["block_out_channels"]) - n
    ups = [(f"up_blocks.{i + shift}", f"up_blocks.{i}") for i in range(n)]
    downs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(n)]
    has_mid = student_config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None
    if feature_set == "bk":
        if not shift:
            return ups + downs
        # the innermost kept level: the residual branch of its last attention, as the official code has it
        layers = [_layers(config, n - 1) - 1 for config in (teacher_config, student_config)]
        return downs[:-1] + [tuple(f"down_blocks.{n - 1}.attentions.{layer}.proj_out" for layer in layers)] + ups
    if shift:
        return downs[:-1] + [(f"up_blocks.{shift - 1}", f"down_blocks.{n - 1}")] + ups
    if has_mid:
        return downs + [("mid_block", "mid_block")] + ups
    return downs[:-1] + [("mid_block", f"down_blocks.{n - 1}")] + ups


def _place(module):
    """Sort key: order of the forward pass, a residual layer before the attention of the same number."""
    numbers = [int(number) for number in re.findall(r"\.(\d+)", module)]
    return ("down", "mid_", "up_b").index(module[:4]), numbers, "attentions" in module


def _inner_pairs(feature_set, mapping, student_config, teacher_config):
    if feature_set == "self_attn":
        ending = ".attn1.to_q.weight"
        found = [(mapping[key], key) for key in mapping if key.endswith(ending)]
        pairs = [tuple(key.removesuffix(".to_q.weight") for key in pair) for pair in found]
        last = len(student_config["block_out_channels"]) - 1
        tails = [_layers(config, 0) for config in (teacher_config, student_config)]
        shift = len(teacher_config["block_out_channels"]) - 1 - last
        blocks = (last + shift, last)
        return [("down_blocks.0.downsamplers.0.conv",) * 2, *sorted(pairs, key=lambda pair: _place(pair[1])),
                tuple(f"up_blocks.{block}.resnets.{tail}.conv2" for block, tail in zip(blocks, tails, strict=True))]  # fmt: skip
    modules = {_unit(key): _unit(source) for key, source in mapping.items()
               if re.search(r"(up|down)_blocks\.\d+\.(resnets|attentions)\.", key)}  # fmt: skip
    if student_config.get("mid_block_type", "UNetMidBlock2DCrossAttn"):
        mine = max(_unit(key) for key in mapping if key.startswith("mid_block.resnets."))
        modules[mine] = "mid_block.resnets.1"
    return [(modules[module], module) for module in sorted(modules, key=_place)]


class _MeanSquare(torch.autograd.Function):
    """mean over the batch of weight x mean square difference, in float32, that keeps no float32 copy for backward."""

    @staticmethod
    def forward(ctx, student, teacher, weights):
        ctx.save_for_backward(student, teacher, weights)
        return (weights * _difference(student, teacher).square().flatten(1).mean(1)).mean()

    @staticmethod
    def backward(ctx, grad):
        student, teacher, weights = ctx.saved_tensors
        scale = expand(weights, student) * (2 * grad / student.numel())
        return (_difference(student, teacher) * scale).to(student.dtype), None, None


def _difference(a, b):
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) - b.to(wide)


def feature_loss(student_features, teacher_features, weights=None, relative=False):
    """The mean squared differences of the feature pairs, (K,): each over all elements; their sum is the loss.

    Args: lists of K tensors (B, ...); `weights` (B,) per sample; `relative` divides each pair by the mean square of the
    teacher's feature. No gradient reaches the teacher (arXiv 2305.15798, equation 3).
    """
    terms = []
    for student, teacher in zip(student_features, teacher_features, strict=True):
        with torch.autocast(student.device.type, enabled=False):
            wide = torch.promote_types(student.dtype, torch.float32)
            ones = torch.ones(len(student), device=student.device, dtype=wide)
            term = _MeanSquare.apply(student, teacher.detach(), ones if weights is None else weights.to(wide))
            if relative:
                term = term / teacher.detach().to(wide).square().mean()
        terms.append(term)
    return torch.stack(terms)


def output_loss(prediction, target, weights=None):
    """Mean over the batch of `weights` (B,) x the mean squared difference (equations 1 and 2), in float32."""
    loss = _difference(prediction, target.detach()).square().flatten(1).mean(1)
    return (loss if weights is None else loss * weights).mean()


def min_snr_weights(alpha_cumprod, gamma, prediction_type):
    """Weights (B,) of arXiv 2303.09556: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v_prediction."""
    snr = (alpha_cumprod / (1 - alpha_cumprod)).clamp(min=1e-8)
    return snr.clamp(max=gamma) / (snr + (prediction_type == "v_prediction"))


def debias_weights(alpha_cumprod, prediction_type):
    """Weights (B,) of arXiv 2310.08442: 1 / sqrt(SNR) for epsilon, 1 / sqrt(SNR + 1) for v_prediction."""
    snr = (alpha_cumprod / (1 - alpha_cumprod)).clamp(min=1e-8)
    return (snr + (prediction_type == "v_prediction")).rsqrt()


def loss_weights(alpha_cumprod, snr_gamma, debias, prediction_type):
    """Weights (B,) of the samples: min-SNR if `snr_gamma`, else debiased, else 1."""
    if not (snr_gamma or debias):
        return torch.ones_like(alpha_cumprod)
    if snr_gamma:
        return min_snr_weights(alpha_cumprod, snr_gamma, prediction_type)
    return debias_weights(alpha_cumprod, prediction_type)


FAVOURED = {"later": (0.75, 1.0), "earlier": (0.0, 0.25), "range": (0.25, 0.75)}


def draw_timesteps(uniform, sampling, total):
    """Timesteps (B,) int64 in [0, T) from `uniform` numbers in [0, 1).

    `later`, `earlier` and `range` draw the last quarter, the first one or the middle half five times as often;
    `cubic` is (1 - u^3) T.
    """
    if sampling == "cubic":
        uniform = 1 - uniform**3
    elif sampling != "uniform":
        low, high = FAVOURED[sampling]
        mass = 5 * (high - low) + 1 - (high - low)  # the inverse of a piecewise linear distribution function
        u = uniform * mass
        inside, after = low + (u - low) / 5, u - 4 * (high - low)
        uniform = torch.where(u < low, u, torch.where(u < low + 5 * (high - low), inside, after))
    return (uniform * total).long().clamp(0, total - 1)


def unpaired_probability(timesteps, rate, total):
    """exp(-rate (1 - t / T)): how likely random conditioning (arXiv 2504.02011) swaps the caption at timesteps (B,)."""
    return torch.exp(-rate * (1 - timesteps / total))


def ema_decay(update, maximum):
    """Decay of the average at its `update` (1, 2, ...): 0 first, then min(maximum, (1 + s) / (10 + s)), s = update - 1."""
    s = update - 1
    return min(maximum, (1 + s) / (10 + s)) if s else 0.0
