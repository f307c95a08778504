"""What is in a file of weights: a checkpoint, a packed model, or a .tflite file."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.model.restore import restore_
from torchclust.model.summary import summary
from torchclust.packing.sections import MAGIC
from torchclust.packing.size import packed_size


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
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError("the checkpoint holds no tensors; save model.state_dict()")
    table = summary(restore_(skeleton(tensors), tensors))
    return FileReport(f"{path}\n{table}", {"file": str(path), **table.to_dict()})


def skeleton(state: dict[str, Tensor]) -> nn.Module:
    """Return bare modules that hold the parameters which a state dict, clustered or not, names.

    Enough for `restore_` and `summary`; it computes nothing.
    """
    shapes = {}
    for name, value in state.items():
        owner, mark, rest = name.rpartition("parametrizations.")
        if not mark:
            shapes[name] = value
            continue
        parameter, _, part = rest.partition(".")
        # The codebook trains in place of a "fixed" weight, whose shape is then its indices'.
        if part == "0.indices" or (part == "original" and owner + parameter not in shapes):
            shapes[owner + parameter] = torch.empty(value.shape)
    root = nn.Module()
    for name, value in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if value.is_floating_point() and last not in ("running_mean", "running_var"):
            module.register_parameter(last, nn.Parameter(torch.empty_like(value), False))
        else:
            module.register_buffer(last, torch.empty_like(value))
    return root


def _describe_tflite(path: Path) -> FileReport:
    from torchclust.export.compiled.verification import (
        inspect_compiled,
        is_compiled,
        verify_compiled,
    )
    from torchclust.export.graph import read_graph
    from torchclust.export.inspect import inspect_tflite

    if is_compiled(read_graph(path.read_bytes())):
        # Vela names its output after its input; `vela` writes it beside that, unless told where.
        original = path.with_name(path.name.replace("_vela.tflite", ".tflite"))
        beside = original != path and original.is_file()
        compiled = verify_compiled(path, original) if beside else inspect_compiled(path)
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
