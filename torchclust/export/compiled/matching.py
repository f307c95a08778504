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
    channels: range
    positions: Array


def match(
    operations: Sequence[Operation], constants: bytes, device: Hardware, layers: Sequence[Layer]
) -> Iterator[Match]:
    """Find the layer of each operation, and compare weights and scales, value by value, in order.

    Kernels that the compiler made, for a mean, a sum or a resizing, belong to no layer, and to no
    match.

    Raises:
        CompiledFileError: a stream is damaged, or its numbers are not those of any layer that has
            its shape.
        NotVerifiedError: no layer has an operation's shape.
    """
    covered = [np.zeros(len(layer.codes), bool) for layer in layers]
    starts = [set(layer.starts) for layer in layers]
    for operation in operations:
        decoded = decode(operation, constants, device)
        parts = _parts(operation, layers, starts)
        candidates = sorted(parts, key=lambda part: _is_covered(part, covered))  # the unread first
        found = _compare(candidates, layers, decoded, constants, device)
        while found is not None:
            covered[found.layer][found.positions] = True
            starts[found.layer].add(found.channels.stop)
            yield Match(found.layer, found.positions[found.positions != ZERO], decoded)
            # Equal layers, or groups of one, share a stream, and their operations are the same.
            parts = _parts(operation, layers, starts)
            unread = (part for part in parts if not _is_covered(part, covered))
            found = next((p for p in unread if _reads(p, layers, decoded, constants, device)), None)


def _is_covered(part: _Candidate, covered: Sequence[Array]) -> bool:
    return bool(covered[part.layer][part.positions[part.positions != ZERO]].all())


def _parts(
    operation: Operation, layers: Sequence[Layer], starts: Sequence[set[int]]
) -> Iterator[_Candidate]:
    """Parts of layers that have the operation's shape: groups of channels, or what is left of one.

    The compiler may cut a layer by its output channels; a part begins where another one ended. A
    depthwise operation makes one output channel of each input channel: where the layer makes
    several there are as many operations, and each has one channel in so many.
    """
    outputs, height, width, inputs = operation.layout.shape
    for number, layer in enumerate(layers):
        if operation.layout.depthwise and layer.weight.operator.name != "DEPTHWISE_CONV_2D":
            continue
        step = len(layer.starts) if operation.layout.depthwise else 1
        for view in layer.views(height, width):
            if view.shape[3] != inputs:
                continue
            for start in sorted(starts[number]):
                channels = range(start, start + outputs * step, step)
                if channels[-1] < len(view):
                    yield _Candidate(number, channels, view[channels].ravel())


def _compare(
    candidates: Sequence[_Candidate],
    layers: Sequence[Layer],
    decoded: Decoded,
    constants: bytes,
    device: Hardware,
) -> _Candidate | None:
    """The candidate whose codes and scales the operation reads; None for the compiler's own kernel.

    Codes alone do not tell layers apart: gains that are one number each are 127 in every block.

    Raises:
        CompiledFileError: no candidate; the message speaks of the nearest.
        NotVerifiedError: there is none of that shape.
    """
    values, order = decoded.values, decoded.order
    nearest, fewest = "", len(values) + 1
    for candidate in candidates:
        expected = layers[candidate.layer].codes[np.append(candidate.positions, ZERO)[order]]
        wrong = np.flatnonzero(expected != values)
        if not len(wrong):
            layer = layers[candidate.layer]
            if _has_scales(decoded.operation, constants, device, layer, candidate.channels):
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
    if _is_compilers_own(decoded):
        return None
    if not candidates:
        layout = decoded.operation.layout
        kind = "depthwise convolution" if layout.depthwise else "convolution"
        raise NotVerifiedError(
            f"the compiled file has a {kind} of shape {'x'.join(map(str, layout.shape))} "
            f"(O, H, W, I) that no layer of the original has"
        )
    raise CompiledFileError(nearest)


def _is_compilers_own(decoded: Decoded) -> bool:
    """Whether a kernel is one that Vela makes: ones that add, or a bilinear resizing's.

    That doubles a map in four convolutions, one for each phase, of weights 1, 3, 3 and 9. A layer
    that was overwritten by such numbers is not taken for one: its own are missed in the end.
    """
    values, order, layout = decoded.values, decoded.order, decoded.operation.layout
    if np.array_equal(values, order != ZERO):
        return True
    if not layout.depthwise or layout.shape[1:3] != (2, 2):
        return False
    kernels = np.zeros(layout.shape[0] * 4, np.int64)
    kernels[order[order != ZERO]] = values[order != ZERO]
    first = sorted(kernels[:4]) == [1, 3, 3, 9] and kernels[0] * kernels[3] == 9
    return bool(first and (kernels.reshape(-1, 4) == kernels[:4]).all())


def _reads(
    part: _Candidate,
    layers: Sequence[Layer],
    decoded: Decoded,
    constants: bytes,
    device: Hardware,
) -> bool:
    """Whether an operation reads just the codes and scales of a part of a layer."""
    layer = layers[part.layer]
    expected = layer.codes[np.append(part.positions, ZERO)[decoded.order]]
    return np.array_equal(expected, decoded.values) and _has_scales(
        decoded.operation, constants, device, layer, part.channels
    )


def _has_scales(
    operation: Operation, constants: bytes, device: Hardware, layer: Layer, channels: range
) -> bool:
    """Whether each core's stream of biases, multipliers and shifts is the layer's own."""
    u85 = device.family == "ethos-u85"
    form = (6, 2) if operation.wide else (4, 4) if u85 else (5, 4)
    cores = len(operation.scales)
    for core, span in enumerate(operation.scales if layer.scales else ()):
        share = channels[core::cores]
        found = decode_scales(cut(constants, span), len(share), *form)
        if not any(_same(found, expected, share) for expected in layer.scales):
            return False
    return True


def _same(found: ScaleStream, expected: ScaleStream, channels: range) -> bool:
    at = np.array(channels, int)
    return (
        np.array_equal(found.biases, expected.biases[at])
        and np.array_equal(found.multipliers, expected.multipliers[at])
        and np.array_equal(found.shifts, expected.shifts[at])
    )
