"""A factor and an addend per channel, as one depthwise 1x1 convolution.

As a broadcast multiplication an Ethos-U spends some seventeen times as many cycles on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from torchclust.export.rewrites.nodes import (
    Substitute,
    arguments,
    identity,
    operator,
    shape,
    source,
)
from torchclust.export.rewrites.traced import Traced, is_channels_last


@dataclass(frozen=True, eq=False)
class Affine:
    """``scale * source + shift`` per channel; ``wide`` if channels differ. ``steps``: operators."""

    source: fx.Node
    scale: Tensor
    shift: Tensor
    wide: bool
    steps: tuple[fx.Node, ...]


def depthwise(traced: Traced, scale: Tensor, shift: Tensor) -> Substitute:
    """A function of a map: a factor and an addend per channel."""
    weight, bias = traced.constant(scale.reshape(-1, 1, 1, 1)), traced.constant(shift)
    return lambda x, *_, **__: nn.functional.conv2d(x, weight(), bias(), groups=x.shape[1])


def merge_affine(traced: Traced) -> None:
    """Make each chain of normalizations by constants one convolution.

    What follows a 2-D convolution is left alone: the converter folds it into the weights.
    """
    found: dict[fx.Node, Affine] = {}
    for node in traced.nodes:
        step = None if node in traced.substitutes else _step(traced, node)
        if step is None:
            continue
        before = found.get(step.source)
        if before is not None and len(step.source.users) == 1:
            del found[step.source]
            step = Affine(
                before.source,
                before.scale * step.scale,
                before.shift * step.scale + step.shift,
                before.wide or step.wide,
                (*before.steps, node),
            )
        found[node] = step
    for affine in found.values():
        folds = "conv" in operator(affine.source) and len(affine.source.users) == 1
        if affine.wide and not folds:
            together = depthwise(traced, affine.scale.float(), affine.shift.float())
            functions = *[identity] * (len(affine.steps) - 1), together
            sources = affine.source, *affine.steps[:-1]
            for made, read, function in zip(affine.steps, sources, functions, strict=True):
                traced.substitutes[made] = _of_operand(function, made.args.index(read))


def _of_operand(function: Substitute, position: int) -> Substitute:
    """A function of one of an operator's operands: the constant may stand first."""
    return lambda *operands, **_: function(operands[position])


def _step(traced: Traced, node: fx.Node) -> Affine | None:
    """One operator as a factor and an addend per channel of a map, or None."""
    if len(shape(node)) != 4:
        return None
    if operator(node) == "batch_norm":
        return _batch_norm(traced, node)
    if operator(node).rstrip("_") not in ("add", "sub", "mul", "div"):
        return None
    given = arguments(node)
    left, right = given["self"], given["other"]
    if given.get("alpha", 1) != 1 or given.get("rounding_mode"):
        return None
    constant, kind = _per_channel(traced, right, shape(node)), operator(node).rstrip("_")
    if constant is None and kind in ("add", "mul"):
        left, constant = right, _per_channel(traced, left, shape(node))
    if constant is None or not isinstance(left, fx.Node) or shape(left) != shape(node):
        return None
    if not is_channels_last(traced, left):
        return None  # the scores of attention heads, say: a convolution would transpose them
    one, zero = torch.ones_like(constant), torch.zeros_like(constant)
    scale, shift = {
        "add": (one, constant),
        "sub": (one, -constant),
        "mul": (constant, zero),
        "div": (1 / constant, zero),
    }[kind]
    wide = bool((constant != constant[0]).any()) or isinstance(right, fx.Node)
    return Affine(left, scale, shift, wide and len(constant) > 1, (node,))


def _batch_norm(traced: Traced, node: fx.Node) -> Affine | None:
    given = arguments(node)
    mean, variance = traced.value(given["running_mean"]), traced.value(given["running_var"])
    before = source(node)
    if mean is None or variance is None or before is None or given["training"]:
        return None
    weight, bias = traced.value(given["weight"]), traced.value(given["bias"])
    scale = torch.rsqrt(variance.double() + given["eps"])
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    return Affine(before, scale, shift, True, (node,))


def _per_channel(traced: Traced, value: object, whole: tuple[int, ...]) -> Tensor | None:
    """A constant operand as one number per channel, if it is that, in float64."""
    channels = whole[1]
    if isinstance(value, (int, float)):
        return torch.full((channels,), float(value), dtype=torch.float64)
    tensor = traced.value(value)
    if tensor is None or not tensor.is_floating_point():
        return None
    if tensor.numel() == 1:
        return tensor.double().reshape(1).expand(channels)
    wide = (1,) * (4 - tensor.ndim) + tuple(tensor.shape)
    return tensor.double().reshape(-1) if wide == (1, channels, 1, 1) else None
