"""Learned activation ranges: from a quantization-aware model to the tensors of its float file.

The converter renames, fuses and transposes, so tensors are not sought by name. One sample runs
through the float file and through the stripped model, and a tensor of the file has the range of the
value that holds the same numbers, in whatever order. What the converter computes in other steps
than torch (the halves of a SiLU) is found nowhere; its range is that of the calibration data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchclust.activations.quantized import groups_of, quantized_modules, ranges_of
from torchclust.activations.record import record
from torchclust.activations.rounding import Range
from torchclust.export.calibration import activations
from torchclust.export.graph import Array, Graph
from torchclust.export.layout import Prepared, call
from torchclust.export.runner import Runner

_TOLERANCE = 1e-4  # of the largest magnitude: two float implementations of one network
# Operators whose output has its input's scale, or one that the kernel prescribes.
_DERIVED = (
    *("LOGISTIC", "SOFTMAX", "TANH", "PAD", "RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE"),
    *("MAX_POOL_2D", "AVERAGE_POOL_2D", "EXPAND_DIMS", "SQUEEZE", "SPLIT", "UNPACK"),
)


@dataclass(frozen=True)
class Learned:
    """Attributes: ``ranges`` by tensor name; ``missed``: the tensors that have none."""

    ranges: dict[str, Range]
    missed: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LearnedValue:
    """A value that training rounds, sorted, with its range."""

    sorted: Array
    range: Range


def find_learned(
    model: nn.Module, prepared: Prepared, content: bytes, graph: Graph, sample: Sequence[Tensor]
) -> Learned | None:
    """Find the tensors of a float file that a quantization-aware model has ranges for.

    Args:
        model: the model as given; None is returned if it rounds no activations.
        prepared: its plain copy.
        content, graph: the float file and its parsed form.
        sample: one calibration sample, in the model's layout.
    """
    values = learned_values(model, prepared, sample)
    if not values:
        return None
    run = Runner(content, keep_all=True, reference=False)
    run(prepared.to_file_layout(sample))
    made_by = {i: operator.name for operator in graph.operators for i in operator.outputs}
    tensors = ((graph.tensors[i].name, run.tensor(i), i) for i in activations(graph))
    return match_learned(
        values, ((name, value, made_by.get(i) in _DERIVED) for name, value, i in tensors)
    )


def match_learned(
    values: Sequence[LearnedValue], tensors: Iterable[tuple[str, Array, bool]]
) -> Learned:
    """Give each tensor the range of the value that holds the same numbers.

    Args:
        values: what training rounds, computed on one sample.
        tensors: names of a graph's tensors, their values on the same sample, and whether a missing
            range needs no mention, as the operator's output follows from its input's.
    """
    ranges, missed, claimed = {}, [], set[int]()
    for name, tensor, derived in tensors:
        found = [v for v in values if _same(v.sorted, np.sort(tensor, axis=None))]
        # Of equal ones (two branches that both give zeros) each is taken in its turn.
        value = next((v for v in found if id(v) not in claimed), found[0] if found else None)
        if value is not None:
            claimed.add(id(value))
            ranges[name] = value.range
        elif not derived:
            missed.append(name)
    return Learned(ranges, tuple(missed))


def learned_values(
    model: nn.Module, prepared: Prepared, sample: Sequence[Tensor]
) -> list[LearnedValue]:
    """What the model rounds in training, computed in float on a sample; empty if nothing is."""
    return list(_values(model, prepared, sample))


def _values(
    model: nn.Module, prepared: Prepared, sample: Sequence[Tensor]
) -> Iterator[LearnedValue]:
    """Everything that the model's quantized modules round or carry on, computed in float."""
    for path, root in quantized_modules(model):
        plain = prepared.original.get_submodule(path)
        for args, kwargs in _calls(plain, prepared, sample):
            values = record(plain, args, kwargs, Tensor.clone).values
            for group, range_ in zip(groups_of(root), ranges_of(root), strict=True):
                for key in (*group.quantized, *group.carried):
                    if key in values:
                        yield LearnedValue(np.sort(values[key].numpy(), axis=None), range_)


def _calls(
    module: nn.Module, prepared: Prepared, sample: Sequence[Tensor]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a module of the plain copy is called with when the copy runs on a sample."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(tree_map_only(Tensor, Tensor.clone, (args, kwargs))),
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            call(prepared.original, prepared.module.keys, sample)
    finally:
        handle.remove()
    return found


def _same(left: Array, right: Array) -> bool:
    if left.size != right.size or left.size == 0:
        return False
    peak = max(abs(float(left[0])), abs(float(left[-1])))
    return bool(np.abs(left - right).max() <= _TOLERANCE * peak)
