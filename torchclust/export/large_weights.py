"""Weights that the quantizer cannot take, set aside and put back.

ai-edge-quantizer 0.10 cuts tensors over 32 MiB into pieces, and reshapes the tensor for that but
not its scales: of more than two dimensions, an error follows. So such a weight leaves one value per
channel in its place, as many dimensions and the same scales, and its integers come in afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchclust.export.codes import rounded_codes
from torchclust.export.container import pack, unpack
from torchclust.export.graph import Array, Graph

_LARGEST_BYTES = 32 << 20


def set_aside(
    content: bytearray, graph: Graph, scales: Mapping[int, Array]
) -> tuple[bytes, dict[str, Array]]:
    """The float file without its large weights, and their integers by the tensors' names.

    Args:
        content, graph: the file and its parsed form.
        scales: ``(channels,)`` of each weight, by its tensor's index.
    """
    model, integers = None, {}
    for weight in graph.weights():
        tensor, scale = weight.tensor, scales.get(weight.tensor.index)
        values = tensor.data
        if scale is None or values is None or values.ndim < 3 or values.nbytes <= _LARGEST_BYTES:
            continue
        integers[tensor.name] = rounded_codes(values, weight.by_channel(scale))
        model = model or unpack(content)
        _put(model, tensor.name, weight.by_channel(np.zeros_like(scale)))
    return (bytes(content) if model is None else pack(model, len(content))), integers


def put_back(content: bytes, integers: Mapping[str, Array]) -> bytes:
    """The int8 file with these weights in it."""
    if not integers:
        return content
    model = unpack(content)
    for name, values in integers.items():
        _put(model, name, values)
    return pack(model, len(content) + sum(values.nbytes for values in integers.values()))


def _put(model: Any, name: str, values: Array) -> None:
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            if bytes(tensor.name or b"").decode() == name:
                tensor.shape = list(values.shape)
                model.buffers[tensor.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
