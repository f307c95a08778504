"""The proof that a compiled file computes with the codes and scales of the file it came from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torchclust.export.compiled.commands import Operation, read_payload
from torchclust.export.compiled.errors import CompiledFileError, NotVerifiedError
from torchclust.export.compiled.hardware import Hardware
from torchclust.export.compiled.layers import Layer, read_layers
from torchclust.export.compiled.matching import Match, match
from torchclust.export.compiled.rows import (
    CompiledInspection,
    CompiledRow,
    encoded_row,
    plain_row,
)
from torchclust.export.compiled.streams import decode
from torchclust.export.graph import Graph, read_graph
from torchclust.export.resolver import ETHOS_U


def verify_compiled(
    compiled: str | os.PathLike[str], original: str | os.PathLike[str]
) -> CompiledInspection:
    """Show that a Vela-compiled file holds the weights and scales of the file it was made from.

    Walks the accelerator's command stream, decodes every weight and scale stream that it names, and
    compares them with the original value by value, in the order in which the hardware reads them.
    What Vela left to the CPU is compared as it stands.

    Args:
        compiled: Vela's output, for any Ethos-U55, U65 or U85.
        original: the .tflite file that Vela compiled.

    Returns:
        A `CompiledInspection`, which iterates over one `CompiledRow` per weight tensor.

    Raises:
        CompiledFileError: a weight, bias, multiplier or shift is another, a stream is damaged, or a
            weight is missing.
        NotVerifiedError: the compiler rearranged a layer in a way that is not followed here.
        ValueError: not a TFLite file.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from torchclust import cluster_
        >>> from torchclust.export import to_tflite, vela, verify_compiled
        >>> model = cluster_(torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3)).eval(), 8,
        ...                  codebook_dtype="int8")
        >>> path, images = pathlib.Path(tempfile.mkdtemp()) / "model.tflite", torch.rand(4, 8, 8, 8)
        >>> _ = to_tflite(model, images, path, calibration=[images])
        >>> report = vela(path)
        >>> rows = verify_compiled(report.path, path)
        >>> rows.accelerator, [(row.weights, row.format, row.palette) for row in rows]
        ('ethos-u55-128', [(1152, 'slow', 7)])
    """
    compiled, original = Path(compiled), Path(original)
    try:
        layers = read_layers(read_graph(original.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{original}: {error}") from None
    try:
        graph = read_graph(compiled.read_bytes())
        names, found = set(), list[Match]()
        for device, operations, constants in _programs(graph):
            names.add(device.name)
            found += match(operations, constants, device, layers)
        rows = tuple(
            _row(layer, [each for each in found if each.layer == number], graph)
            for number, layer in enumerate(layers)
        )
    except ValueError as error:
        raise type(error)(f"{compiled}: {error}") from None
    return CompiledInspection(compiled, original, ", ".join(names), rows)


def inspect_compiled(compiled: str | os.PathLike[str]) -> CompiledInspection:
    """Decode a Vela-compiled file whose original is not at hand: a row per operation.

    Raises:
        CompiledFileError: a stream is damaged.
        ValueError: not a TFLite file.
    """
    path, names, rows = Path(compiled), set(), list[CompiledRow]()
    try:
        for device, operations, constants in _programs(read_graph(path.read_bytes())):
            names.add(device.name)
            for operation in operations:
                part = decode(operation, constants, device)
                kind = "depthwise" if operation.layout.depthwise else "convolution"
                rows.append(encoded_row("", kind, part.weights, [part]))
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None
    return CompiledInspection(path, None, ", ".join(names), tuple(rows))


def is_compiled(graph: Graph) -> bool:
    """Whether Vela made the file, and something of it runs on the accelerator."""
    return any(operator.name == ETHOS_U for operator in graph.operators)


def _programs(graph: Graph) -> Iterator[tuple[Hardware, tuple[Operation, ...], bytes]]:
    """Of each operator for the accelerator: which one, what it runs, and the constants."""
    for operator in graph.operators:
        if operator.name != ETHOS_U:
            continue
        payload, constants = (graph.tensors[i].data for i in operator.inputs[:2])
        device, operations = read_payload(b"" if payload is None else payload.tobytes())
        yield device, operations, b"" if constants is None else constants.tobytes()


def _row(layer: Layer, found: list[Match], graph: Graph) -> CompiledRow:
    """A layer's row, once all its weights are found, in streams or as they are."""
    tensor, operator = layer.weight.tensor, layer.weight.operator.name
    assert tensor.data is not None
    if not found:
        if any(tensor.same(other) for other in graph.tensors):
            return plain_row(tensor.name, operator, tensor.data)
        raise NotVerifiedError(f"{layer.name} is in no weight stream")
    covered = np.zeros(tensor.data.size, bool)
    for each in found:
        covered[each.positions] = True
    if not covered.all():
        missing = int((~covered).sum())
        raise CompiledFileError(f"the compiled file misses {missing:,} weights of {layer.name}")
    parts = list({each.decoded.operation: each.decoded for each in found}.values())
    return encoded_row(tensor.name, operator, tensor.data.size, parts)
