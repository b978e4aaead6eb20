"""Predictors: the tables that EPD learned (arXiv 2507.14797), what they are for, where they came from; their rules.

Letters: N sigmas, S = N - 1 intervals from noise to data, K points in each.
"""

import copy
import json
import math
from typing import NamedTuple

import torch

from brisk.epd import STUDENTS, Tables, cost, effective
from brisk.options import UserError
from brisk.sigmas import SCHEDULES

FORMAT, VERSION = "epd-predictor", 1
STAGES = ("start", "distilled", "rl")
GUIDANCE = (None, "uncond", "cfg", "cg")
NAMES = Tables._fields
SUM_TOLERANCE, RAW_TOLERANCE = 1e-5, 1e-6


class Raw(NamedTuple):
    """What training continues from: four (S, K) float32 tensors, and how far c and a may be from 1."""

    r: torch.Tensor
    weight: torch.Tensor
    scale_dir: torch.Tensor
    scale_time: torch.Tensor
    scale_dir_range: float
    scale_time_range: float


class Solver(NamedTuple):
    """How a predictor's tables are used."""

    student: str  # epd or ipndm
    num_steps: int  # N
    num_points: int  # K
    afs: bool  # analytic first step
    max_order: int | None  # of ipndm, 1-4
    fix_last_scale_dir: bool


class Predictor(NamedTuple):
    """The content of a predictor file."""

    solver: Solver
    sigmas: torch.Tensor  # (N,) float64, decreasing
    tables: Tables  # (S, K) float64 on the CPU
    raw: Raw | None
    model: dict  # dataset, backend, backend_config, img_resolution, guidance_type, guidance_rate
    document: dict  # the whole file, entries that nothing here knows included

    @property
    def name(self):
        """What it is called."""
        return self.document["name"]

    @property
    def nfe(self):
        """Its network evaluations, `epd.Cost`; without guidance."""
        return cost(self.solver.num_steps, self.solver.num_points, self.solver.afs)


def tables_of(raw, solver):
    """The `epd.Tables` (S, K), float64, that `Raw` parameters stand for."""
    parameters = Tables(*(part.double() for part in raw[:4]))
    return effective(parameters, raw.scale_dir_range, raw.scale_time_range, solver.fix_last_scale_dir)


def count_nfe(solver):
    """{intervals, para_nfe, total_nfe} of a `Solver`; see `epd.Cost`."""
    counted = cost(solver.num_steps, solver.num_points, solver.afs)._asdict()
    return {name: counted[name] for name in ("intervals", "para_nfe", "total_nfe")}


def _whole(low, high=math.inf):
    return lambda value: type(value) is int and low <= value <= high


def _real(value):
    return type(value) in (int, float) and math.isfinite(value)


def _optional(test):
    return lambda value: value is None or test(value)


def _one_of(values):
    return lambda value: any(value is known or value == known for known in values)


def _is(kind):
    return lambda value: isinstance(value, kind)


RULES = (  # section, field, test, what the field must be
    ("", "name", _is(str), "a text"),
    ("", "stage", _one_of(STAGES), f"one of {', '.join(STAGES)}"),
    ("", "solver", _is(dict), "a mapping"),
    ("", "schedule", _is(dict), "a mapping"),
    ("", "model", _is(dict), "a mapping"),
    ("", "tables", _is(dict), "a mapping"),
    ("", "raw", _optional(_is(dict)), "a mapping or null"),
    ("", "teacher", _optional(_is(dict)), "a mapping or null"),
    ("", "training", _optional(_is(dict)), "a mapping or null"),
    ("", "source", _optional(_is(dict)), "a mapping or null"),
    ("", "nfe", _optional(_is(dict)), "a mapping or null"),
    ("solver", "student", _one_of(STUDENTS), f"one of {', '.join(STUDENTS)}"),
    ("solver", "num_steps", _whole(2), "a whole number, at least 2"),
    ("solver", "num_points", _whole(1), "a whole number, at least 1"),
    ("solver", "afs", _is(bool), "true or false"),
    ("solver", "max_order", _optional(_whole(1, 4)), "1, 2, 3, 4 or null"),
    ("solver", "fix_last_scale_dir", _is(bool), "true or false"),
    ("solver", "midpoint", _one_of(("geometric",)), "geometric"),
    ("schedule", "type", _one_of(SCHEDULES), f"one of {', '.join(SCHEDULES)}"),
    ("schedule", "rho", _optional(lambda value: _real(value) and value > 0), "a number greater than 0, or null"),
    ("schedule", "sigma_min", _optional(lambda value: _real(value) and value > 0), "a number greater than 0, or null"),
    ("schedule", "sigma_max", _optional(lambda value: _real(value) and value > 0), "a number greater than 0, or null"),
    ("schedule", "flow", _optional(_is(dict)), "a mapping or null"),
    ("schedule", "sigmas", lambda value: isinstance(value, list) and all(map(_real, value)), "a list of numbers"),
    ("model", "dataset", _optional(_is(str)), "a text or null"),
    ("model", "backend", _optional(_is(str)), "a text or null"),
    ("model", "backend_config", _optional(_is(dict)), "a mapping or null"),
    ("model", "img_resolution", _optional(_whole(1)), "a whole number, at least 1, or null"),
    ("model", "guidance_type", _one_of(GUIDANCE), "uncond, cfg, cg or null"),
    ("model", "guidance_rate", _optional(_real), "a number or null"),
)  # fmt: skip


def need(condition, sentence):
    """ValueError with `sentence` unless `condition`."""
    if not condition:
        raise ValueError(sentence)


def from_document(document, where):
    """The `Predictor` of the JSON content `document` of the file `where`. UserError with the first rule that it breaks."""
    try:
        return _parse(document)
    except (ValueError, OverflowError) as error:  # the latter of a whole number beyond the range of floats
        raise UserError(f"{where} is no predictor that can be used: {error}.") from None


def _parse(document):
    need(isinstance(document, dict) and document.get("format") == FORMAT, f"its format is not '{FORMAT}'")
    version = document.get("version")
    need(type(version) is int and version >= 1, f"its version is {_short(version)}, not a whole number from 1")
    need(version <= VERSION, f"it is of version {version}, here only version {VERSION} can be read")
    for section, name, test, wanted in RULES:
        value = (document[section] if section else document).get(name)
        place = f"{section}.{name}" if section else name
        need(test(value), f"{place} is {_short(value)}, it must be {wanted}")
    solver = Solver(*(document["solver"].get(name) for name in Solver._fields))
    sigmas = _check_sigmas(document["schedule"], solver.num_steps)
    tables = _check_tables(document["tables"], solver)
    raw = None if document.get("raw") is None else _check_raw(document["raw"], solver, tables)
    for name, value in count_nfe(solver).items():
        stated = (document.get("nfe") or {}).get(name, value)
        need(stated == value, f"nfe.{name} is {_short(stated)}, its tables need {value}")
    return Predictor(solver, sigmas, tables, raw, document["model"], document)


def _short(value):
    text = "missing" if value is None else json.dumps(value) if isinstance(value, (str, int, float, bool)) else ""
    return text[:60] or f"a {'list' if isinstance(value, list) else 'mapping'}"


def _check_sigmas(schedule, num_steps):
    """Its sigmas as (N,) float64. ValueError."""
    sigmas = schedule["sigmas"]
    need(len(sigmas) == num_steps, f"schedule.sigmas has {len(sigmas)} numbers, solver.num_steps is {num_steps}")
    need(sigmas[-1] > 0, f"schedule.sigmas ends at {sigmas[-1]:g}, the last sigma must be greater than 0")
    for place, (above, below) in enumerate(zip(sigmas, sigmas[1:], strict=False), 1):
        need(above > below, f"schedule.sigmas[{place}] is {below:g} after {above:g}, they must decrease")
    if schedule["type"] == "flowmatch":
        need(sigmas[0] <= 1 + 1e-6, f"schedule.sigmas begins at {sigmas[0]:g}, flowmatch's are at most 1")
    return torch.tensor([float(sigma) for sigma in sigmas], dtype=torch.float64)


def _check_rows(rows, name, solver):
    """A table as (S, K) float64. ValueError."""
    intervals, points = solver.num_steps - 1, solver.num_points
    need(isinstance(rows, list), f"{name} is {_short(rows)}, it must be a list of rows")
    need(len(rows) == intervals, f"{name} has {len(rows)} rows, {solver.num_steps} sigmas have {intervals} intervals")
    for place, row in enumerate(rows):
        proper = isinstance(row, list) and len(row) == points
        need(proper, f"{name}[{place}] must be a list of {points} numbers, one per point")
        for point, value in enumerate(row):
            need(_real(value), f"{name}[{place}][{point}] is {_short(value)}, it must be a number")
    return torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64)


def _check_each(table, name, allowed, wanted):
    for place, row in enumerate(table.tolist()):
        for point, value in enumerate(row):
            need(allowed(value), f"{name}[{place}][{point}] is {value:g}, it must be {wanted}")


def _check_tables(section, solver):
    """Its `Tables`. ValueError."""
    found = {}
    for name in NAMES:
        rows = section.get(name)
        ones = rows is None and name.startswith("scale")
        shape = (solver.num_steps - 1, solver.num_points)
        found[name] = torch.ones(shape, dtype=torch.float64) if ones else _check_rows(rows, f"tables.{name}", solver)
    _check_each(found["r"], "tables.r", lambda value: 0 < value < 1, "between 0 and 1")
    _check_each(found["weight"], "tables.weight", lambda value: value >= 0, "0 or greater")
    for name in NAMES[2:]:
        _check_each(found[name], f"tables.{name}", lambda value: value > 0, "greater than 0")
    for place, total in enumerate(found["weight"].sum(1).tolist()):
        need(abs(total - 1) <= SUM_TOLERANCE, f"tables.weight[{place}] sums to {total:g}, it must sum to 1")
    return Tables(**found)


def _check_raw(section, solver, tables):
    """Its `Raw`, which reproduces `tables`. ValueError."""
    found = {}
    for name in ("scale_dir_range", "scale_time_range"):
        value = found[name] = section.get(name)
        need(_real(value) and value >= 0, f"raw.{name} is {_short(value)}, it must be 0 or greater")
    for name in NAMES:
        if section.get(name) is None and found.get(f"{name}_range") == 0:
            found[name] = torch.zeros_like(tables.r)
        else:
            found[name] = _check_rows(section.get(name), f"raw.{name}", solver)
    raw = Raw(**{name: value.float() if torch.is_tensor(value) else float(value) for name, value in found.items()})
    for name, ours, theirs in zip(NAMES, tables_of(raw, solver), tables, strict=True):
        far = (ours - theirs).abs().max().item()
        need(far <= RAW_TOLERANCE, f"raw.{name} does not reproduce tables.{name} (they differ by {far:.2g})")
    return raw


def make(name, stage, solver, schedule, model, tables=None, raw=None, teacher=None, training=None, source=None):
    """A new `Predictor`, checked like a file.

    Args: `solver` a `Solver`; `schedule`, `model`, `teacher`, `training`, `source`: their sections as dicts, `schedule`
    with "sigmas"; `tables` a `Tables`, by default those of `raw`. Raises UserError.
    """
    tables = tables_of(raw, solver) if tables is None else tables
    document = {
        "format": FORMAT, "version": VERSION, "name": name, "stage": stage, "source": source,
        "solver": {**solver._asdict(), "midpoint": "geometric"},
        "schedule": {**schedule, "sigmas": [float(sigma) for sigma in schedule["sigmas"]]},
        "model": model, "teacher": teacher, "training": training, "raw": _raw_section(raw),
        "tables": _table_section(tables),
    }  # fmt: skip
    return from_document(document, f"the predictor {name}")


def _table_section(tables):
    return {name: None if name.startswith("scale") and (table == 1).all() else table.double().tolist()
            for name, table in tables._asdict().items()}  # fmt: skip


def _raw_section(raw):
    if raw is None:
        return None
    ranges = {"scale_dir_range": float(raw.scale_dir_range), "scale_time_range": float(raw.scale_time_range)}
    return ranges | {name: getattr(raw, name).float().tolist() for name in NAMES}


def to_document(predictor):
    """The JSON content of a file: what was read, with sigmas, tables, raw parameters and counts as they are now."""
    document = copy.deepcopy(predictor.document)
    document["schedule"]["sigmas"] = predictor.sigmas.tolist()
    document["tables"] |= _table_section(predictor.tables)
    if predictor.raw is not None:
        document["raw"] = (document.get("raw") or {}) | _raw_section(predictor.raw)
    document["nfe"] = (document.get("nfe") or {}) | count_nfe(predictor.solver)
    return document


def describe(predictor):
    """Text for people: what it is for, what it costs, its table."""
    document, solver, model, nfe = predictor.document, predictor.solver, predictor.model, predictor.nfe
    schedule, teacher = document["schedule"], document.get("teacher") or {}
    config = model.get("backend_config") or {}
    guided = model.get("guidance_type")
    subject, rate = model.get("dataset") or config.get("model_name_or_path") or "not named", model.get("guidance_rate")
    pieces = [
        model.get("backend") or "unknown family",
        f"{model['img_resolution']} px" if model.get("img_resolution") else None,
        f"guidance {guided}" + (f" {rate:g}" if rate is not None else "") if guided else "no guidance",
    ]
    order = f"order {solver.max_order or 3} history, " if solver.student == "ipndm" else ""
    calls = f"{nfe.para_nfe} sequential, {nfe.total_nfe} evaluations in all, {nfe.intervals} intervals"
    if guided == "cfg" and model.get("guidance_rate") not in (None, 1) and model.get("backend") != "flux":
        calls += f" (a guided pair counted once; twice: {2 * nfe.para_nfe} sequential)"
    rho = f" rho {schedule['rho']:g}" if schedule.get("rho") and schedule["type"] != "flowmatch" else ""
    ends = f"{predictor.sigmas[0].item():.6g} to {predictor.sigmas[-1].item():.6g}"
    lines = [
        f"{predictor.name} ({document['stage']})",
        f"model     {subject}: {', '.join(piece for piece in pieces if piece)}",
        f"solver    {solver.student}, {solver.num_points} points per interval, {order}"
        f"{'analytic' if solver.afs else 'no analytic'} first step",
        f"schedule  {schedule['type']}{rho}, {solver.num_steps} sigmas from {ends}",
        f"calls     {calls}",
    ]
    if teacher.get("solver"):
        points = f", {teacher['num_steps']} points" if teacher.get("num_steps") else ""
        lines.append(f"teacher   {teacher['solver']}{points}")
    lines += ["", "interval  sigma                  point         r    weight  at sigma    direction x  sigma x"]
    sigmas = predictor.sigmas.tolist()
    for place, (above, below) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        span = f"{above:.5g} -> {below:.5g}"
        for point in range(solver.num_points):
            r, weight, scale_dir, scale_time = (table[place, point].item() for table in predictor.tables)
            tau = above ** (1 - r) * below**r
            start = f"{place:<8}  {span:<22}" if point == 0 else " " * 32
            scales = f"{scale_dir:11.5f}  {scale_time:7.5f}"
            lines.append(f"{start} {point:<5}  {r:8.5f}  {weight:8.5f}  {tau:<10.5g}  {scales}")
    return "\n".join(lines)
