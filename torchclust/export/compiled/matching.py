"""Which layer an operation computes, and that it computes it with the layer's own numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from torchclust.export.compiled.commands import Operation
from torchclust.export.compiled.errors import CompiledFileError, NotVerifiedError
from torchclust.export.compiled.hardware import Hardware
from torchclust.export.compiled.layers import ZERO, Layer
from torchclust.export.compiled.scale_stream import ScaleStream, decode_scales
from torchclust.export.compiled.streams import Decoded, cut, decode
from torchclust.export.graph import Array


@dataclass(frozen=True, eq=False)
class Match:
    """An operation that reads exactly the numbers of some output channels of a layer.

    Attributes:
        layer: which one, by its number.
        positions: of the weights in the layer's codes.
        decoded: what the operation reads.
    """

    layer: int
    positions: Array
    decoded: Decoded


@dataclass(frozen=True, eq=False)
class _Candidate:
    layer: int
    start: int
    positions: Array


def match(
    operations: Sequence[Operation], constants: bytes, device: Hardware, layers: Sequence[Layer]
) -> Iterator[Match]:
    """Find the layer of each operation, and compare weights and scales, value by value, in order.

    Kernels of ones that the compiler made for a mean or a pool belong to no layer, and to no match.

    Raises:
        CompiledFileError: a stream is damaged, or its numbers are not those of any layer that has
            its shape.
        NotVerifiedError: no layer has an operation's shape.
    """
    covered = [np.zeros(len(layer.codes), bool) for layer in layers]
    starts = [{0} for _ in layers]
    for operation in operations:
        candidates = list(_candidates(operation, layers, covered, starts))
        if not candidates and not operation.layout.depthwise:
            shape = "x".join(map(str, operation.layout.shape))
            raise NotVerifiedError(
                f"the compiled file has a convolution of shape {shape} (O, H, W, I) that no layer "
                f"of the original has"
            )
        decoded = decode(operation, constants, device)
        found = _compare(candidates, layers, decoded, constants, device)
        if found is None:
            continue
        covered[found.layer][found.positions] = True
        starts[found.layer].add(found.start + operation.layout.shape[0])
        yield Match(found.layer, found.positions[found.positions != ZERO], decoded)


def _candidates(
    operation: Operation,
    layers: Sequence[Layer],
    covered: Sequence[Array],
    starts: Sequence[set[int]],
) -> Iterator[_Candidate]:
    """Parts of layers that have the operation's shape, first those that no operation read yet.

    A part begins where another one ended: the compiler may cut a layer by its output channels.
    """
    outputs, height, width, inputs = operation.layout.shape
    again = []
    for number, layer in enumerate(layers):
        if operation.layout.depthwise and layer.weight.operator.name != "DEPTHWISE_CONV_2D":
            continue
        for view in layer.views(height, width):
            if view.shape[3] != inputs:
                continue
            for start in sorted(starts[number]):
                part = view[start : start + outputs].ravel()
                if start + outputs > len(view):
                    continue
                candidate = _Candidate(number, start, part)
                if covered[number][part[part != ZERO]].all():
                    again.append(candidate)
                else:
                    yield candidate
    yield from again


def _compare(
    candidates: Sequence[_Candidate],
    layers: Sequence[Layer],
    decoded: Decoded,
    constants: bytes,
    device: Hardware,
) -> _Candidate | None:
    """The candidate whose codes and scales the operation reads; None for a kernel of ones.

    Codes alone do not tell layers apart: gains that are one number each are 127 in every block.

    Raises:
        CompiledFileError: no candidate; the message speaks of the nearest.
    """
    values, order = decoded.values, decoded.order
    nearest, fewest = "the compiled file has a kernel that is in no layer", len(values) + 1
    for candidate in candidates:
        expected = layers[candidate.layer].codes[np.append(candidate.positions, ZERO)[order]]
        wrong = np.flatnonzero(expected != values)
        if not len(wrong):
            layer = layers[candidate.layer]
            if _has_scales(decoded.operation, constants, device, layer, candidate.start):
                return candidate
            if fewest:
                fewest, nearest = 0, f"the compiled file has other scales in {layer.name}"
        elif len(wrong) < fewest:
            fewest, first = len(wrong), wrong[0]
            nearest = (
                f"the compiled file has other weights in {layers[candidate.layer].name}: "
                f"{fewest:,} of {len(values):,} differ, the first is {values[first]} instead of "
                f"{expected[first]}"
            )
    if decoded.operation.layout.depthwise and np.array_equal(values, order != ZERO):
        return None
    raise CompiledFileError(nearest)


def _has_scales(
    operation: Operation, constants: bytes, device: Hardware, layer: Layer, start: int
) -> bool:
    """Whether each core's stream of biases, multipliers and shifts is the layer's own."""
    u85 = device.family == "ethos-u85"
    form = (6, 2) if operation.wide else (4, 4) if u85 else (5, 4)
    step = len(operation.scales)
    for core, span in enumerate(operation.scales if layer.scales else ()):
        channels = np.arange(start + core, start + operation.layout.shape[0], step)
        found = decode_scales(cut(constants, span), len(channels), *form)
        if not any(_same(found, expected, channels) for expected in layer.scales):
            return False
    return True


def _same(found: ScaleStream, expected: ScaleStream, channels: Array) -> bool:
    return (
        np.array_equal(found.biases, expected.biases[channels])
        and np.array_equal(found.multipliers, expected.multipliers[channels])
        and np.array_equal(found.shifts, expected.shifts[channels])
    )
