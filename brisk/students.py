"""Students with fewer blocks than their teacher: named or given by files, checked before any work, created."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from brisk import bksdm, feature_taps, macs, sd_models
from brisk.options import UserError
from brisk.seeding import derive


class Plan(NamedTuple):
    """A student that fits its teacher."""

    preset: str | None  # None for a config of the user's own
    config: dict
    mapping: dict  # student weight -> teacher weight
    pairs: list  # (teacher module, student module)
    sizes: tuple  # `macs.Size` of teacher and student
    teacher_numels: dict  # teacher weight -> elements

    def identity(self):
        """What a checkpoint must share with the run that goes on from it, as short texts."""
        codes = [derive(json.dumps(part, sort_keys=True)) % 10**6 for part in (self.config, self.pairs)]
        return {"student": f"{self.preset or 'own config'} #{codes[0]}", "features": f"{len(self.pairs)} pairs #{codes[1]}"}

    def describe(self, with_table):
        """The lines that a run prints of its two networks: sizes, and on request which layers go."""
        lines = bksdm.removal_lines(self.mapping, self.teacher_numels) if with_table else []
        lines.append(f"preset: {self.preset or 'none, a config of its own'}")
        for name, size in zip(("teacher", "student"), self.sizes, strict=True):
            change = f" ({size.parameters / self.sizes[0].parameters - 1:+.1%})" if name == "student" else ""
            lines.append(f"{name}: {size.parameters:,} parameters{change}, {size.total:,} MACs a call, "
                         f"{size.published:,} as papers count (no attention products)")  # fmt: skip
        return lines


def read_json(flag, path):
    """The content of a JSON file; UserError naming `flag` if there is none."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} cannot be read as JSON: {error}") from None


def choose_config(teacher_config, preset, folder=None, file=None):
    """(name of the preset or None, student's config): a preset, FOLDER/preset/config.json, or a JSON file. UserError."""
    if folder or file:
        flag, path = ("--student_config", file) if file else ("--unet_config_path", Path(folder) / preset / "config.json")
        given = read_json(flag, path)
        if not isinstance(given, dict):
            raise UserError(f"{flag} {path} must hold the config of a U-Net.")
        return None, {**teacher_config, **{name: value for name, value in given.items() if not name.startswith("_")}}
    try:
        name = bksdm.resolve_preset(preset, teacher_config)
        return name, bksdm.derive_student_config(teacher_config, name)
    except ValueError as error:
        raise UserError(f"--preset {preset}: {error}") from None


def make_plan(teacher_config, preset, config, latent, feature_set=None, copies_weights=True):
    """The checked `Plan`, on networks without memory, for latents of `latent` pixels.

    Args: `feature_set` a name of `bksdm.FEATURE_SETS`, a JSON file of pairs, or None for the preset's.
    Raises UserError where weights or features do not fit; it lists them all.
    """
    try:
        teacher, student = (_shell(each) for each in (teacher_config, config))
    except Exception as error:  # the library raises what its constructor stumbles over
        raise UserError(f"the student's config makes no U-Net: {' '.join(str(error).split())[:300]}") from None
    shapes = [{key: value.shape for key, value in shell.state_dict().items()} for shell in (teacher, student)]
    mapping = bksdm.weight_map(shapes[1], config, teacher_config)
    call = macs.unet_inputs(teacher.config, 1, latent, device="meta")
    try:
        bksdm.check_kin(config, teacher_config)
        if copies_weights:
            bksdm.check_weights(mapping, shapes[1], shapes[0])
        pairs = _find_pairs(feature_set, preset, mapping, config, teacher_config)
        feature_taps.check_pairs(teacher, student, pairs, call)
    except ValueError as error:
        raise UserError(str(error)) from None
    sizes = macs.count(teacher, **call), macs.count(student, **call)
    return Plan(preset, config, mapping, pairs, sizes, {key: shape.numel() for key, shape in shapes[0].items()})


def _shell(config):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config)


def _find_pairs(feature_set, preset, mapping, config, teacher_config):
    name = feature_set or bksdm.default_feature_set(preset, teacher_config)
    if name in bksdm.FEATURE_SETS:
        return bksdm.feature_pairs(name, mapping, config, teacher_config)
    if not name.endswith(".json"):
        raise UserError(f"--feature_set {name} is none of {', '.join(bksdm.FEATURE_SETS)} and no JSON file.")
    pairs = read_json("--feature_set", name)
    good = isinstance(pairs, list) and all(isinstance(p, list) and [type(x) for x in p] == [str, str] for p in pairs)
    if not (pairs and good):
        raise UserError(f"--feature_set {name} must hold a list of [teacher module, student module] pairs.")
    return [tuple(pair) for pair in pairs]


def create(plan, teacher, copies_weights=True):
    """The trainable float32 student of `plan`, from the weights of `teacher` (a U-Net) or from random ones."""
    from diffusers import UNet2DConditionModel

    if not copies_weights:
        return _trainable(UNet2DConditionModel.from_config(plan.config))
    student, state = _shell(plan.config), teacher.state_dict()
    copied = {key: state[source].detach().float().clone() for key, source in plan.mapping.items()}
    student.load_state_dict(copied, assign=True)
    return _trainable(student)


def _trainable(student):
    student.requires_grad_(True)
    if student.time_embedding.cond_proj is not None:  # never called here: DDP would miss its gradient
        student.time_embedding.cond_proj.requires_grad_(False)
    return student


def load(source, cache_dir=None):
    """(student U-Net of a folder or hub id, its config). UserError."""
    from diffusers import UNet2DConditionModel

    student = _trainable(sd_models.load_network(UNet2DConditionModel, source, "unet", cache_dir))
    return student, sd_models.plain_config(student)


def report(plan, copied, last):
    """What `bksdm_report.json` says of a student: preset, sizes, which weights it took, the `last` row of the log or None.

    Args: `copied`: whether it started from the teacher's weights.
    """
    import hashlib

    lines = "\n".join(f"{key}\t{plan.mapping[key]}" for key in sorted(plan.mapping))
    taken = {"weight_map_entries": len(plan.mapping), "weight_map_sha256": hashlib.sha256(lines.encode()).hexdigest()}
    sizes = [{**size._asdict(), "macs_total": size.total, "macs_published": size.published} for size in plan.sizes]
    last = json.loads(json.dumps(last), parse_constant=lambda name: None)  # strict JSON has no NaN
    return {"preset": plan.preset, "teacher": sizes[0], "student": sizes[1],
            **(taken if copied else dict.fromkeys(taken)), "feature_pairs": plan.pairs, "last": last}  # fmt: skip
