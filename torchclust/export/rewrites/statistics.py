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
    return _of_groups(traced, node, int(arguments(node)["num_groups"]))


def instance_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """Each channel by its own pixels; with running statistics it is a BatchNorm."""
    given = arguments(node)
    if given["use_input_stats"]:
        return _of_groups(traced, node, shape(node)[1], first=0)
    eps = float(given["eps"])

    def norm(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, *_: object) -> Tensor:
        return F.batch_norm(x, mean, var, w, b, False, 0.0, eps)

    return norm


def layer_norm(traced: Traced, node: fx.Node) -> Substitute | None:
    """Over a whole map, or the last axis of a sequence; in a map that is the converter's to do.

    Of a sequence the converter's own way takes twice the cycles, and folds the gain into the
    columns of a linear layer behind it, whose shared values are then none.
    """
    given, whole = arguments(node), shape(node)
    if len(whole) == 4 and len(given["normalized_shape"]) == 3:
        return _of_groups(traced, node, 1, shared=False)
    if len(whole) > 3 or len(given["normalized_shape"]) != 1:
        return None
    mean, eps = average(traced, source(node), [len(whole) - 1]), float(given["eps"])

    def norm(
        x: Tensor, _: object, weight: Tensor | None = None, bias: Tensor | None = None, *__: object
    ) -> Tensor:
        distance = x - mean(x)
        y = distance * torch.rsqrt(mean(distance * distance) + eps)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    return norm


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
    traced: Traced, node: fx.Node, groups: int, *, first: int = 1, shared: bool = True
) -> Substitute | None:
    """A map less the mean of each group of channels, by the root of its variance.

    ``first``: where gain and shift stand behind the map; ``shared``: by all pixels of a channel.
    """
    whole = shape(node)
    if len(whole) != 4:
        return None
    channels, eps = whole[1], float(arguments(node)["eps"])
    size = channels // groups
    outputs = 1 if groups == 1 else channels
    weight = traced.constant(torch.full((outputs, size, 1, 1), 1 / size))

    def mean(x: Tensor) -> Tensor:
        pixels = x.mean((2, 3), keepdim=True)
        return pixels if size == 1 else F.conv2d(pixels, weight(), groups=groups)

    gains = [1, channels, 1, 1] if shared else whole[1:]

    def norm(x: Tensor, *given: object, **__: object) -> Tensor:
        distance = x - mean(x)
        y = distance * torch.rsqrt(mean(distance * distance) + eps)
        gain, shift = (*given, None, None)[first : first + 2]
        if isinstance(gain, Tensor):
            y = y * gain.reshape(gains)
        return y + shift.reshape(gains) if isinstance(shift, Tensor) else y

    return norm
