"""What a model computes of constants alone, computed once and for all.

Positions, masks and index tables are often made anew in every call. In the file they would be
operators that every inference repeats, in int8 and without a divisor that int8 cannot hold, and
most of them are none that an Ethos-U runs. What comes of a parameter stays an operator: there it
keeps the codes of its clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import Substitute, computed, is_constant, writes
from torchclust.export.rewrites.traced import Traced


def fold_constants(traced: Traced) -> None:
    """Put a constant in place of each such result that an operator on the model's inputs reads."""
    traced.folded = _read_constants(traced)
    for node, value in traced.folded.items():
        traced.substitutes[node] = _given(traced, value)


def _given(traced: Traced, value: Tensor) -> Substitute:
    constant = traced.constant(value)
    return lambda *_, **__: constant()


def _read_constants(traced: Traced) -> dict[fx.Node, Tensor]:
    """The results to replace, as they are when they are read.

    A trace may write into its tensors. So what is read twice with a write in between is left
    alone, and so is every view of a tensor into which something computed of inputs is written.
    """
    values: dict[fx.Node, Tensor] = {}
    read: dict[fx.Node, Tensor] = {}
    written: set[int] = set()
    for node in traced.nodes:
        if node.op == "placeholder":
            if traced.is_buffer(node) and (buffer := traced.value(node)) is not None:
                values[node] = buffer.clone()
        elif is_constant(node, values):
            made = computed(node, values)
            if made is not None:
                values[node] = made
        elif node.op == "call_function":
            for constant in [n for n in node.all_input_nodes if n in values]:
                before = read.setdefault(constant, values[constant].clone())
                if writes(node) or not torch.equal(before, values[constant]):
                    written.add(_storage(values[constant]))
    return {
        node: value
        for node, value in read.items()
        if node.op == "call_function" and _storage(values[node]) not in written
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
