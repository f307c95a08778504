"""What is in a file of weights: a checkpoint, a packed model, or a .tflite file."""

from __future__ import annotations

import dataclasses
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.model.restore import restore_
from torchclust.model.summary import summary
from torchclust.packing.sections import MAGIC
from torchclust.packing.size import packed_size

_CONFIG = ".0.config_json"
_PARAMETRIZED = re.compile(
    r"(?P<list>(?P<owner>(.+\.)?)parametrizations\.(?P<name>[^.]+))\.(?P<part>.+)"
)
_OURS = re.compile(r"original|0\..+")


@dataclass(frozen=True)
class FileReport:
    """A file's tensors as a table to print and as plain values for JSON."""

    text: str
    content: dict[str, Any]


def describe(path: Path) -> FileReport:
    """Read a file and describe its weight tensors, by what it is and not by its name.

    Raises:
        OSError, ValueError: it can not be read, or is none of the kinds.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if head[4:8] == b"TFL3":
        return _describe_tflite(path)
    if head == MAGIC:
        packed = packed_size(path)
        return FileReport(f"{path}\n{packed}", {"file": str(path), **packed.to_dict()})
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            "it is no .tflite file, and no checkpoint that loads without running code; write one "
            "with torch.save(model.state_dict(), FILE)"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    named = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not named:
        raise ValueError("the checkpoint holds no tensors; save model.state_dict()")
    tensors = _of_others_renamed(named)
    try:
        table = summary(restore_(skeleton(tensors), tensors))
    except (RuntimeError, KeyError) as error:
        lines = " ".join(str(error).split())
        raise ValueError(
            f"parts of a clustered tensor are missing or do not fit: {lines}"
        ) from error
    return FileReport(f"{path}\n{table}", {"file": str(path), **table.to_dict()})


def _of_others_renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name what other parametrizations keep (weight_norm, spectral_norm) after what they compute.

    ``parametrizations.weight.original0`` becomes ``weight.original0``, a tensor like any other.
    """
    ours = {key.removesuffix(_CONFIG) for key in state if key.endswith(_CONFIG)}

    def name(key: str) -> str:
        found = _PARAMETRIZED.fullmatch(key)
        if found is None or (found["list"] in ours and _OURS.fullmatch(found["part"])):
            return key
        plain = f"{found['owner']}{found['name']}.{found['part']}"
        return key if plain in state else plain

    return {name(key): value for key, value in state.items()}


def skeleton(state: dict[str, Tensor]) -> nn.Module:
    """Return bare modules that hold the parameters which a state dict, clustered or not, names.

    Enough for `restore_` and `summary`; it computes nothing.
    """
    shapes = {}
    for name, value in state.items():
        found = _PARAMETRIZED.fullmatch(name)
        if found is None:
            shapes[name] = value
            continue
        weight, part = found["owner"] + found["name"], found["part"]
        # The codebook trains in place of a "fixed" weight, whose shape is then its indices'.
        if part == "0.indices" or (part == "original" and weight not in shapes):
            shapes[weight] = torch.empty(value.shape)
    root = nn.Module()
    for name, value in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            module = _child(module, part)
        if _is_weight(last, value):
            module._parameters[last] = nn.Parameter(torch.empty_like(value), False)
        else:
            module._buffers[last] = torch.empty_like(value)
    return root


def _child(module: nn.Module, name: str) -> nn.Module:
    """The child of that name, made if need be; `add_module` refuses ``double`` and the like."""
    child = module._modules.get(name)
    if child is None:
        child = module._modules[name] = nn.Module()
    return child


def _is_weight(name: str, value: Tensor) -> bool:
    """Whether a module could have it as a parameter, and a row tell of it."""
    if name in ("running_mean", "running_var") or hasattr(nn.Module(), name):
        return False
    dense = value.layout == torch.strided and value.element_size() > 1  # not sparse, not float8
    return value.is_floating_point() and dense


def _describe_tflite(path: Path) -> FileReport:
    from torchclust.export.compiled.verification import (
        inspect_compiled,
        is_compiled,
        verify_compiled,
    )
    from torchclust.export.graph import read_graph
    from torchclust.export.inspect import inspect_tflite

    if is_compiled(read_graph(path.read_bytes())):
        original = _original(path)
        compiled = verify_compiled(path, original) if original else inspect_compiled(path)
        return FileReport(str(compiled), compiled.to_dict())
    found = inspect_tflite(path)
    rows = [
        {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name != "scale_values"}
        for row in found
    ]
    content = {
        "file": str(path),
        "bytes": found.size_bytes,
        "tensors": rows,
        "operators": found.operators,
        "inputs": [dataclasses.asdict(port) for port in found.inputs],
        "outputs": [dataclasses.asdict(port) for port in found.outputs],
    }
    return FileReport(str(found), content)


def _original(compiled: Path) -> Path | None:
    """What Vela read, if it is there: Vela names its output after its input.

    `vela` writes beside the input, a run of a recipe into a folder of its own.
    """
    name = compiled.name.replace("_vela.tflite", ".tflite")
    if name == compiled.name:
        return None
    found = (compiled.with_name(name), compiled.absolute().parent.parent / name)
    return next((file for file in found if file.is_file()), None)
