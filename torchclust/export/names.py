"""Names of a file's inputs and outputs: those of the model's own arguments and results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree

from torchclust.export.container import pack, unpack
from torchclust.export.rewrites.nodes import is_tensor, returned


def input_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The arguments' names, in the order of the trace."""
    return tuple(str(name) for name in program.graph_signature.user_inputs)


def output_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """For each tensor that the model returns, the keys and places that lead to it.

    A single tensor is ``output``, the items of a tuple ``output_0`` and so on; those of a dict have
    its keys. Where two would be the same, the later has a number.
    """
    tree = _pytree.tree_unflatten(list(returned(program)), program.call_spec.out_spec)
    paths, _ = _pytree.tree_flatten_with_path(tree)
    names: list[str] = []
    for name in (_name(path) for path, node in paths if is_tensor(node)):
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        names.append(next(n for n in itertools.chain([name], numbered) if n not in names))
    return tuple(names)


def with_names(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """The same file with these names, in its tensors and in its signature.

    A tensor that is an input and an output, or two outputs, has the first of its names.
    """
    model = unpack(content)
    main = model.subgraphs[0]
    first: dict[int, str] = {}
    for index, name in zip((*main.inputs, *main.outputs), (*inputs, *outputs), strict=True):
        first.setdefault(int(index), name)
    for index, name in first.items():
        taken = {bytes(t.name or b"") for t in main.tensors}
        if name.encode() not in taken:
            main.tensors[index].name = name.encode()
    for signature in model.signatureDefs or ():
        _rename(signature.inputs, main.inputs, inputs)
        _rename(signature.outputs, main.outputs, outputs)
    return pack(model, len(content))


def _rename(entries: Any, indices: Any, names: Sequence[str]) -> None:
    """One tensor may be several outputs, whose entries follow each other."""
    left = list(zip(map(int, indices), names, strict=True))
    for entry in entries or ():
        place = next((pair for pair in left if pair[0] == int(entry.tensorIndex)), None)
        if place is not None:
            left.remove(place)
            entry.name = place[1].encode()


def _name(path: Sequence[Any]) -> str:
    keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
    if keys and not keys[0].isdigit():
        return "_".join(keys)
    return "_".join(["output", *keys])
