"""Pickles as the published ones are built: objects whose class travels as source text, and crafted ones that act."""

import contextlib
import io
import pickle
import sys
import types

import torch
from torch import nn

VERSION = 6
SOURCE = "open('pwned', 'w').close()\nraise SystemExit('the source text of a pickle was executed')\n"


class Evil:
    """Pickles as the call `function(*arguments)`, with `state` for what it returns."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Persistent:
    """An object of a class `class_name` that travels as source text, its attributes those of `state`."""

    def __init__(self, class_name, state, **changes):
        self.meta = {"type": "class", "version": VERSION, "module_src": SOURCE, "class_name": class_name, "state": state}
        self.meta |= changes


class Pickler(pickle.Pickler):
    """Writes every layer of torch but the stock containers as a persistent object."""

    def reducer_override(self, value):
        function = sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj
        if isinstance(value, Persistent):
            return function, (value.meta,), None
        if isinstance(value, nn.Module) and not isinstance(value, (nn.ModuleDict, nn.Sigmoid, nn.Softmax)):
            return function, (Persistent(type(value).__name__, dict(value.__dict__)).meta,), None
        return NotImplemented


@contextlib.contextmanager
def foreign_modules():
    """Within it the modules exist that the published pickles refer to, empty but for the names."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("a persistent object was reconstructed")

    def heun_sampler(*arguments):
        raise AssertionError("a solver was called")

    names = {"torch_utils.persistence": _reconstruct_persistent_obj, "solvers": heun_sampler}
    made = {name: types.ModuleType(name) for name in ("torch_utils", *names)}
    for name, function in names.items():
        function.__module__, function.__qualname__ = name, function.__name__
        setattr(made[name], function.__name__, function)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def dump(content, path, protocol=4):
    """Write `content` to `path` as such a pickle."""
    buffer = io.BytesIO()
    with foreign_modules():
        Pickler(buffer, protocol).dump(content)
    path.write_bytes(buffer.getvalue())
    return path


def solver_function():
    """Stands for a function of the module `solvers`; only within `foreign_modules`."""
    return sys.modules["solvers"].heun_sampler


def predictor_state(document):
    """The attributes of the published predictor class for the content of a predictor file."""
    solver, model, raw = (document[name] for name in ("solver", "model", "raw"))
    teacher, schedule = document["teacher"], document["schedule"]
    layer = nn.Module()
    for key, name in (("r_params", "r"), ("weight_s", "weight"), ("scale_dir_params", "scale_dir"),
                      ("scale_time_params", "scale_time")):  # fmt: skip
        layer.register_parameter(key, nn.Parameter(torch.tensor(raw[name])))
    layer.sigmoid, layer.softmax = nn.Sigmoid(), nn.Softmax(dim=-1)
    return {
        **layer.__dict__, "dataset_name": model["dataset"], "img_resolution": model["img_resolution"],
        "num_steps": solver["num_steps"], "num_points": solver["num_points"], "sampler_stu": solver["student"],
        "sampler_tea": teacher["solver"], "M": teacher["M"], "guidance_type": model["guidance_type"],
        "guidance_rate": model["guidance_rate"], "schedule_type": schedule["type"], "schedule_rho": schedule["rho"],
        "afs": solver["afs"], "scale_dir": raw["scale_dir_range"], "scale_time": raw["scale_time_range"],
        "max_order": solver["max_order"], "predict_x0": True, "lower_order_final": True,
        "fcn": solver["fix_last_scale_dir"], "alpha": 10.0,
        "_init_args": (), "_init_kwargs": {"num_steps": solver["num_steps"], "alpha": 10.0},
    }  # fmt: skip


def dump_predictor(document, path, protocol=4, loss=True, **more):
    """Write a pickle like the published ones for the content of a predictor file; `more`: attributes besides."""
    schedule = document["schedule"]
    content = {"model": Persistent("EPD_predictor", predictor_state(document) | more)}
    with foreign_modules():
        if loss:
            content["loss_fn"] = Persistent("EPD_loss", {
                "num_steps": document["solver"]["num_steps"],
                "solver_stu": solver_function(), "solver_tea": solver_function(),
                "sigma_min": schedule["sigma_min"], "sigma_max": schedule["sigma_max"],
                "t_steps": torch.tensor(schedule["sigmas"]), "buffer_model": [],
            })  # fmt: skip
        buffer = io.BytesIO()
        Pickler(buffer, protocol).dump(content)
    path.write_bytes(buffer.getvalue())
    return path
