"""Which weights of a file become lookup tables, and in how many parts, for a given arena."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from torchclust.export.backends import ExportError
from torchclust.export.graph import Graph, Weight, read_graph
from torchclust.export.lookup_tables import OVERHEAD, Encoded, encode, with_tables
from torchclust.export.micro_interpreter import least_arena
from torchclust.export.parts import DIVISIBLE, in_parts

_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_MOST_PARTS = 8  # tflite-micro concatenates at most ten tensors
_SMALLEST_PART = 2048  # bytes; what surrounds a smaller one takes more than its table saves


@dataclass(frozen=True)
class TableRow:
    """One weight tensor.

    Attributes:
        name: in the file.
        operator: what reads it.
        shape: in the file's layout.
        codes: distinct values.
        index_bits: of each weight in flash; 8 where it was left.
        bytes_before, bytes_after: of flash.
        left: why it stays as it is, or None.
    """

    name: str
    operator: str
    shape: tuple[int, ...]
    codes: int
    index_bits: int
    bytes_before: int
    bytes_after: int
    left: str | None


@dataclass(frozen=True)
class Plan:
    """A file with lookup tables, the least arena for it, and a row for each weight or part."""

    content: bytes
    arena: int
    rows: tuple[TableRow, ...]


def plan(content: bytes, max_arena: int | None) -> Plan:
    """Turn every weight that becomes smaller into a table, as far as the arena allows.

    While the arena is too large, the largest decoded weight is cut into twice as many parts, but no
    more than it has rows; one that cannot be cut any more is left as it is.

    Raises:
        ExportError: no weight is left.
    """
    counts: dict[int, int] = {}
    left: set[int] = set()
    rows = {w.tensor.index: w.tensor.shape[0] for w in read_graph(content).weights()}
    while True:
        cut, origins = in_parts(content, counts)
        graph = read_graph(cut)
        found = {w.tensor.index: _considered(w, graph, left) for w in graph.weights()}
        chosen = {i: way for i, way in found.items() if isinstance(way, Encoded)}
        rewritten = with_tables(cut, chosen)
        arena = least_arena(rewritten)
        if not chosen and max_arena is not None and left:
            raise ExportError(_no_arena(arena, max_arena))
        if max_arena is None or arena <= max_arena or not chosen:
            return Plan(rewritten, arena, tuple(_row(w, found) for w in graph.weights()))
        largest = max(chosen, key=lambda i: math.prod(graph.tensors[i].shape))
        origin = origins.get(largest, largest)
        count = min(2 * counts.get(origin, 1), rows[origin], _MOST_PARTS)
        if count > counts.get(origin, 1) and _can_be_cut(largest, graph):
            counts[origin] = count
        else:
            left.add(origin)
            counts.pop(origin, None)


def _can_be_cut(index: int, graph: Graph) -> bool:
    tensor = graph.tensors[index]
    users = graph.users(tensor)
    size, rows = math.prod(tensor.shape), tensor.shape[0]
    # A kernel counts groups by channels: with fewer outputs they would read other inputs.
    divisible = (
        len(users) == 1 and users[0].name in DIVISIBLE and graph.groups(users[0], tensor) == 1
    )
    return divisible and rows > 1 and size >= 2 * _SMALLEST_PART


def _considered(weight: Weight, graph: Graph, left: set[int]) -> Encoded | str:
    """The weight as a lookup table, or why it stays as it is."""
    tensor = weight.tensor
    if tensor.index in left:
        return "its decoding exceeds max_arena"
    readers = {operator.name for operator in graph.users(tensor)}
    if not readers <= set(_OPERATORS):
        return f"read by {', '.join(sorted(readers - set(_OPERATORS)))}"
    if tensor.dtype != "int8" or tensor.data is None:
        return f"it is {tensor.dtype}"
    if any(t.buffer == tensor.buffer for t in graph.tensors if t.index != tensor.index):
        return "another tensor shares its data"
    found = encode(tensor.data, weight.channel_axis, len(tensor.scales))
    if found is None:
        return "more than 128 codes"
    uses = len(graph.users(tensor))
    return found if found.n_bytes + uses * OVERHEAD < tensor.data.size else "it would grow"


def _no_arena(least: int, max_arena: int) -> str:
    if least > max_arena:
        return (
            f"max_arena={max_arena:,} is too small: the file without lookup tables already needs "
            f"{least:,} bytes"
        )
    return (
        f"max_arena={max_arena:,} leaves no weight to decode: without lookup tables the file needs "
        f"{least:,} bytes, and the smallest decoded weight comes on top"
    )


def _row(weight: Weight, found: Mapping[int, Encoded | str]) -> TableRow:
    tensor = weight.tensor
    assert tensor.data is not None
    way = found[tensor.index]
    return TableRow(
        name=tensor.name,
        operator=weight.operator.name,
        shape=tensor.shape,
        codes=len(np.unique(tensor.data)),
        index_bits=way.bits if isinstance(way, Encoded) else 8 * tensor.data.itemsize,
        bytes_before=tensor.data.nbytes,
        bytes_after=way.n_bytes if isinstance(way, Encoded) else tensor.data.nbytes,
        left=None if isinstance(way, Encoded) else way,
    )
