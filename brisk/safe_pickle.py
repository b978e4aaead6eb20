"""Reads the pickles of EPD predictors and EDM networks without executing anything of theirs.

A pickle is a program. Here every name that it may ask for is replaced by a class that only records what it is given, any
other name is refused before it is looked up, and what was recorded becomes tensors and plain values afterwards. Source
text that a pickle carries is never run; its SHA-256 is kept.
"""

import contextlib
import hashlib
import io
import math
import pickle
import struct
from typing import NamedTuple

from brisk.options import UserError

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
STORAGE = "torch.storage._load_from_bytes"
SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
SETS = ("builtins.set", "__builtin__.set")  # a set in pickle protocol 2 or 3
ALLOWED = {PERSISTENT, TENSOR, PARAMETER, STORAGE, *SCALAR, "numpy.dtype", *MAPPINGS, *SETS}
ALLOWED_MODULES = ("torch.nn.modules.", "solvers.")  # layers and, in a loss, the solvers' functions: inert
DEPTH, VALUES = 50, 20_000  # how deep layers and values may be nested, and how many there may be
NUMBERS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}  # numpy's name: struct's


class Record:
    """What a pickle asked for: `name` called with `args`, then given `state` and `items`. Does nothing by itself."""

    name = ""

    def __new__(cls, *args, **kwargs):
        self = object.__new__(cls)
        self.__dict__.update(args=args, state=None, items={})
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.__dict__["state"] = state

    def __setitem__(self, key, value):
        self.__dict__["items"][key] = value


class Persistent(NamedTuple):
    """An object of a class whose source text the pickle carries."""

    class_name: str
    version: int
    source_sha256: str
    state: dict


class Reader(pickle._Unpickler):
    """An unpickler that knows records only; the one in Python: a crafted number cannot make it take all memory."""

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path

    def find_class(self, module, name):
        """A new kind of `Record`. Raises UserError for a name that neither a predictor nor an EDM network needs."""
        whole = f"{module}.{name}"
        if whole not in ALLOWED and not whole.startswith(ALLOWED_MODULES):
            raise UserError(
                f"{self.path} asks for {whole[:200]!r}, which no predictor and no EDM network needs: it was refused, "
                "nothing in it was executed."
            )
        return type("Record", (Record,), {"name": whole})

    def persistent_load(self, pid):
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read(path):
    """The content of the pickle at `path`: built-in values and `Record`s. UserError."""
    try:
        with open(path, "rb") as file:
            return Reader(file, path).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise damaged(path, error) from None


def damaged(path, error):
    """The UserError of a file that is no readable pickle."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path} is no pickle that can be read: {reason}.")


@contextlib.contextmanager
def reading(path):
    """Within it what goes wrong with the content of `path` becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError) as error:
        raise damaged(path, error) from None


def is_record(value, *names):
    """Whether `value` is the record of a call of one of `names`."""
    return isinstance(value, Record) and value.name in names


def persistent(value):
    """`value` as a `Persistent`, None if it is something else. ValueError if its description is incomplete."""
    if not is_record(value, PERSISTENT):
        return None
    (meta,) = value.args
    meta = mapping(meta)
    source, state = meta.get("module_src"), mapping(meta.get("state"))
    if meta.get("type") != "class" or not isinstance(meta.get("class_name"), str) or not isinstance(source, str):
        raise ValueError("an object in it lacks its class")
    return Persistent(meta["class_name"], meta.get("version"), hashlib.sha256(source.encode()).hexdigest(), state)


def mapping(value):
    """The dict that `value` stands for. ValueError for anything else."""
    if isinstance(value, dict):
        return value
    if is_record(value, *MAPPINGS):
        found = dict(value.args[0]) if value.args and not is_record(value.args[0], *MAPPINGS) else {}
        return found | value.items
    raise ValueError("it has something else where a mapping must be")


def attributes(value):
    """{name: value} of an object: of a persistent class, or a stock layer of torch. ValueError for anything else."""
    found = persistent(value)
    if found is not None:
        return found.state
    if isinstance(value, Record) and value.name.startswith("torch.nn.modules."):
        return mapping(value.state)
    raise ValueError("it has something else where a network or layer must be")


def scalar(value):
    """The number that the record of a numpy scalar stands for. ValueError for another type."""
    dtype, data = value.args
    code = dtype.args[0] if is_record(dtype, "numpy.dtype") else None
    if code not in NUMBERS or not isinstance(data, bytes):
        raise ValueError("it has a numpy value that is no plain number")
    order = dtype.state[1] if isinstance(dtype.state, tuple) else "<"
    return struct.unpack((">" if order == ">" else "<") + NUMBERS[code], data)[0]


def spend(budget, depth):
    """Count one value more. ValueError where a file has too many, or nests them too deeply."""
    budget[0] -= 1
    if depth > DEPTH or budget[0] < 0:
        raise ValueError("its values are nested too deeply, or too many")


def plain(value, depth=0, budget=None):
    """`value` in dicts with text as keys, lists, strings, numbers and None (as in JSON). ValueError for anything else."""
    budget = [VALUES] if budget is None else budget
    spend(budget, depth)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if is_record(value, *SCALAR):
        return scalar(value)
    if isinstance(value, dict) or is_record(value, *MAPPINGS):
        found = mapping(value)
        if not all(isinstance(key, str) for key in found):
            raise ValueError("it has a mapping whose keys are no text")
        return {key: plain(inner, depth + 1, budget) for key, inner in found.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner, depth + 1, budget) for inner in value]
    if is_record(value, TENSOR, PARAMETER):
        return tensor(value).tolist()
    raise ValueError(f"it has {value.name if isinstance(value, Record) else type(value).__name__} for a plain value")


def storage(record):
    """The flat tensor of the bytes that torch wrote for a storage. Decoded once. ValueError, RuntimeError."""
    import torch

    if not is_record(record, STORAGE) or len(record.args) != 1 or not isinstance(record.args[0], bytes):
        raise ValueError("a tensor in it has no storage")
    if "flat" not in record.__dict__:
        try:
            found = torch.load(io.BytesIO(record.args[0]), map_location="cpu", weights_only=True)
        except Exception as error:  # pickle's, torch's own
            raise ValueError(f"a tensor in it cannot be read: {' '.join(str(error).split())[:150]}") from None
        if not isinstance(found, torch.storage.TypedStorage):
            raise ValueError(f"a tensor in it cannot be read: a {type(found).__name__} is no storage")
        found = torch.empty(0, dtype=found.dtype).set_(found)
        record.__dict__["flat"] = found
    return record.__dict__["flat"]


def tensor(record):
    """The tensor that a record of a tensor or parameter stands for, on the CPU. ValueError."""
    for _ in range(2):
        if is_record(record, PARAMETER) and record.args:
            record = record.args[0]
    if not is_record(record, TENSOR) or len(record.args) < 4:
        raise ValueError("it has something else where a tensor must be")
    source, offset, size, stride = record.args[:4]
    numbers = (offset, *size, *stride) if isinstance(size, tuple) and isinstance(stride, tuple) else ("",)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor in it has no proper shape")
    flat, count = storage(source), math.prod(size)
    last = offset + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
    if count and last >= len(flat) or count > len(flat):
        raise ValueError("a tensor in it is larger than its storage")
    return flat.as_strided(size, stride, offset)


def state_dict(value, prefix="", depth=0, budget=None):
    """{name: tensor} of the parameters and buffers of an object and all its layers, as torch names them. ValueError."""
    budget = [VALUES] if budget is None else budget
    spend(budget, depth)
    found, own = {}, attributes(value)
    skipped = own.get("_non_persistent_buffers_set", ())
    skipped = {name for group in skipped.args for name in group} if is_record(skipped, *SETS) else set(skipped)
    for kind in ("_parameters", "_buffers"):
        for name, record in mapping(own.get(kind, {})).items():
            if record is not None and name not in skipped:
                found[f"{prefix}{name}"] = tensor(record)
    for name, record in mapping(own.get("_modules", {})).items():
        if record is not None:
            found |= state_dict(record, f"{prefix}{name}.", depth + 1, budget)
    return found


class Network(NamedTuple):
    """An EDM network out of a pickle."""

    config: dict  # keyword arguments that it was made with, plain values
    weights: dict  # {name: tensor}


def read_network(path, key="ema"):
    """The `Network` under `key` of the pickle of an EDM network at `path`, for `edm_nets.make_network`. UserError."""
    content = read(path)
    with reading(path):
        found = persistent(content.get(key)) if isinstance(content, dict) else None
        if found is None:
            raise UserError(f"{path} holds no network under '{key}': it is no pickle of an EDM network.")
        if found.class_name != "EDMPrecond":
            kind = found.class_name[:80]
            raise UserError(f"{path} holds a network of the class {kind!r}, only EDMPrecond can be used.")
        return Network(plain(found.state.get("_init_kwargs", {})), state_dict(content[key]))
