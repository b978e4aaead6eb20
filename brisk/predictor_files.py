"""Predictor files: JSON, or safetensors whose header holds the JSON; found by name, by folder or by number."""

import json
import os
import re
from pathlib import Path

import torch

from brisk import predictor
from brisk.checkpoint import MARKER, write_atomically
from brisk.options import UserError

HEADER = "epd_predictor"  # key of the safetensors header
SUFFIXES = (".json", ".safetensors")


def write(content, path):
    """Write the `predictor.Predictor` `content` to `path`, JSON or safetensors by its name. UserError."""
    from safetensors.torch import save

    path, document = Path(path), predictor.to_document(content)
    _check_suffix(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_atomically(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
            return
        rows = {name: document["tables"].pop(name) for name in predictor.NAMES}
        rows |= {f"raw.{name}": document["raw"].pop(name) for name in predictor.NAMES if content.raw is not None}
        tensors = {name: torch.tensor(table, dtype=torch.float32) for name, table in rows.items() if table is not None}
        tensors["r"] = tensors["r"].clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)  # rounded, still in (0, 1)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(save(tensors, {HEADER: json.dumps(document, allow_nan=False)}))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the predictor {path} cannot be written: {error.strerror}.") from None


def _check_suffix(path):
    if path.suffix == ".pkl":
        raise UserError(f"{path} is a pickle, which is never executed: convert it by scripts/convert_epd_predictor.py.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} cannot be a predictor: its name must end in {' or '.join(SUFFIXES)}.")


def _no_constant(text):
    raise ValueError(f"it has {text}, which is no number of JSON")


def read(path):
    """The `predictor.Predictor` of a .json or .safetensors file. UserError."""
    path = Path(path)
    _check_suffix(path)
    try:
        if path.suffix == ".json":
            document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        else:
            document = _read_safetensors(path)
    except OSError as error:
        raise UserError(f"the predictor {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:  # of JSON, of text, of safetensors
        raise UserError(f"the predictor {path} is damaged: {' '.join(str(error).split())[:200]}.") from None
    return predictor.from_document(document, path)


def _read_safetensors(path):
    """The JSON content of a safetensors file, its tensors in their places. ValueError, OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    predictor.need(HEADER in header, f"its header has no '{HEADER}'")
    document = json.loads(header[HEADER], parse_constant=_no_constant)
    for name, tensor in tensors.items():
        first, _, last = name.rpartition(".")
        if last in predictor.NAMES and first in ("", "raw") and isinstance(document, dict):
            section = document.setdefault(first or "tables", {})
            predictor.need(isinstance(section, dict), f"its header has no mapping for the tensor {name}")
            section[last] = tensor.tolist()
    return document


def _newest(folder):
    """The file predictor.json or .safetensors of `folder`, else the predictor with the highest number in its name, or None."""
    found = [path for path in folder.glob("predictor*") if path.suffix in SUFFIXES and path.is_file()]

    def age(path):
        numbers = re.findall(r"\d+", path.stem)
        number = int(numbers[-1]) if numbers else -1
        return (path.stem == "predictor", number, path.stat().st_mtime_ns, path.suffix == ".json", path.name)

    return max(found, key=age, default=None)


def find(wanted, exps="exps"):
    """The predictor file that `wanted` names: a file, a folder of a run, or the number of an experiment below `exps`.

    In a folder export/predictor, else the highest number of export/predictor*, else the same beside export; with the endings of
    `SUFFIXES`. UserError.
    """
    wanted = str(wanted)
    path = Path(wanted)
    if not path.exists() and re.fullmatch(r"\d+", wanted):
        number = wanted.zfill(5)
        found = sorted(folder for folder in Path(exps).glob(f"{number}*") if folder.is_dir())
        found = [folder for folder in found if re.fullmatch(rf"{number}(\D.*)?", folder.name)]
        if len(found) != 1:
            names = ", ".join(folder.name for folder in found) or "none"
            raise UserError(
                f"--predictor_path {wanted}: of {number} there must be one folder in {exps}, there is {names}."
            )
        path = found[0]
    if path.is_dir():
        newest = _newest(path / "export") or _newest(path)
        if newest is None:
            pickles = "; convert its .pkl with scripts/convert_epd_predictor.py" if any(path.glob("*.pkl")) else ""
            hint = "; give the folder of the run, one above" if (path / MARKER).is_file() else pickles
            runs = sorted(folder.parent.name for folder in path.glob("*/export"))
            hint = f"; it holds runs that do: {', '.join(runs[:5])}" if runs else hint
            raise UserError(
                f"--predictor_path {wanted}: {path} holds no predictor*.json and no predictor*.safetensors{hint}."
            )
        return newest
    if not path.is_file():
        raise UserError(f"--predictor_path {wanted} is neither a file, nor a folder, nor the number of an experiment.")
    return path


def load(wanted, exps="exps"):
    """`read` of what `find` finds. UserError."""
    return read(find(wanted, exps))
