"""Normalizations by the data's own statistics, of means that accelerators have.

The converter averages five axes, or a map over all of it, and leaves both to the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.maps import average
from torchclust.export.rewrites.nodes import Substitute, arguments, shape, source
from torchclust.export.rewrites.traced import Traced


def group_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """Of a map: pixels first, then the channels of a group."""
    given = arguments(node)
    return _of_groups(traced, node, int(given["num_groups"]), float(given["eps"]))


def instance_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """Each channel by its own pixels; with running statistics it is a BatchNorm."""
    given = arguments(node)
    eps = float(given["eps"])
    if given["use_input_stats"]:
        return _of_groups(traced, node, shape(node)[1], eps)

    def norm(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, *_: object) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, False, 0.0, eps)

    return norm


def layer_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """Over a whole map; over the last axis the converter's own way is the best."""
    given, whole = arguments(node), shape(node)
    if len(whole) != 4 or len(given["normalized_shape"]) != 3:
        return None
    return _of_groups(traced, node, 1, float(given["eps"]), elementwise=True)


def rms_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """A product with the inverse root of the mean square over the last axis."""
    given, rank = arguments(node), len(shape(node))
    if len(given["normalized_shape"]) != 1:
        return None
    mean = average(traced, source(node), [rank - 1])
    eps = torch.finfo(torch.float32).eps if given["eps"] is None else float(given["eps"])

    def norm(x: Tensor, _: object, weight: Tensor | None = None, *__: object) -> Tensor:
        y = x * torch.rsqrt(mean(x * x) + eps)
        return y if weight is None else y * weight

    return norm


def _of_groups(
    traced: Traced, node: fx.Node, groups: int, eps: float, *, elementwise: bool = False
) -> Substitute | None:
    """A map less the mean of each group of channels, by the root of its variance.

    ``elementwise``: gains and shifts are as large as the map, not one per channel.
    """
    whole = shape(node)
    if len(whole) != 4:
        return None
    channels = whole[1]
    size = channels // groups
    outputs = 1 if groups == 1 else channels
    weight = traced.constant(torch.full((outputs, size, 1, 1), 1 / size))

    def mean(x: Tensor) -> Tensor:
        pixels = x.mean((2, 3), keepdim=True)
        return pixels if size == 1 else F.conv2d(pixels, weight(), groups=groups)

    def norm(x: Tensor, *given: object, **__: object) -> Tensor:
        distance = x - mean(x)
        y = distance * torch.rsqrt(mean(distance * distance) + eps)
        gain, shift = [
            g if elementwise else g.reshape(1, channels, 1, 1)
            for g in given
            if isinstance(g, Tensor)
        ] or (None, None)
        return y if gain is None or shift is None else y * gain + shift

    return norm
