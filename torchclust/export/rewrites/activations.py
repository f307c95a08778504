"""Activation functions that the quantizer leaves in float, by those that it takes."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from torchclust.export.rewrites.affine import depthwise
from torchclust.export.rewrites.nodes import Substitute, arguments, shape, source
from torchclust.export.rewrites.traced import Traced, is_channels_last

_LOGARITHM = (1.0178, 0.3126, 0.8448)  # of t, t^2 and t^3, for -log(1 - t), t up to one half


def leaky_relu(traced: Traced, node: fx.Node) -> Substitute | None:
    """The larger of ``x`` and ``slope * x``."""
    slope = float(arguments(node)["negative_slope"])
    return None if slope > 1 else _leaky(slope)


def _leaky(slope: float) -> Substitute:
    return lambda x, *_, **__: torch.maximum(x, x * slope)


def rrelu(traced: Traced, node: fx.Node) -> Substitute | None:
    """A leaky ReLU whose slope is the middle of those that training draws."""
    given = arguments(node)
    slope = (float(given["lower"]) + float(given["upper"])) / 2
    return None if slope > 1 else _leaky(slope)


def prelu(traced: Traced, node: fx.Node) -> Substitute | None:
    """The larger of a map and the map times a slope per channel, a depthwise 1x1 convolution."""
    slopes = traced.value(arguments(node)["weight"])
    if slopes is None or bool((slopes > 1).any()):
        return None
    if slopes.numel() == 1:
        return _leaky(float(slopes))
    if len(shape(node)) != 4:
        return None
    scaled = depthwise(traced, slopes, torch.zeros_like(slopes))
    return lambda x, *_, **__: torch.maximum(x, scaled(x))


def clamp(traced: Traced, node: fx.Node) -> Substitute | None:
    """``high - relu(high - x)`` for the upper end: the quantizer knows no MINIMUM.

    The converter gets two differences with the constant in front wrong, hence the factors.
    """
    given = arguments(node)
    low = given.get("min_val", given.get("min"))
    high = given.get("max_val", given.get("max"))
    numbers = all(isinstance(v, (int, float, type(None))) for v in (low, high))
    if not numbers or (low, high) in ((0, 6), (-1, 1)):  # ReLU6 and its kin fuse
        return None

    def clamp(x: Tensor, *_: object, **__: object) -> Tensor:
        if low is not None:
            x = torch.relu(x) if low == 0 else torch.maximum(x, x.new_full((1,), low))
        return x if high is None else torch.relu(x * -1.0 + high) * -1.0 + high

    return clamp


def elu(traced: Traced, node: fx.Node) -> Substitute | None:
    """``relu(x) + alpha * (exp(min(x, 0)) - 1)``."""
    given = arguments(node)
    if (given["scale"], given["input_scale"]) != (1, 1):
        return None
    return _exponential(float(given["alpha"]), 1.0)


def celu(traced: Traced, node: fx.Node) -> Substitute:
    """``alpha * elu(x / alpha)``."""
    alpha = float(arguments(node)["alpha"])
    elu = _exponential(1.0, 1.0)
    return elu if alpha == 1 else lambda x, *_, **__: elu(x * (1 / alpha)) * alpha


def softshrink(traced: Traced, node: fx.Node) -> Substitute:
    """What exceeds lambda on either side."""
    edge = float(arguments(node)["lambd"])
    return lambda x, *_, **__: torch.relu(x - edge) - torch.relu(x * -1.0 - edge)


def selu(traced: Traced, node: fx.Node) -> Substitute:
    """ELU with the two constants that make a network normalize itself."""
    return _exponential(1.6732632423543772, 1.0507009873554805)


def _exponential(alpha: float, scale: float) -> Substitute:
    def elu(x: Tensor, *_: object, **__: object) -> Tensor:
        above = torch.relu(x)
        below = torch.exp(x - above) - 1.0
        below = below if alpha * scale == 1 else below * (alpha * scale)
        return (above if scale == 1 else above * scale) + below

    return elu


def absolute(traced: Traced, node: fx.Node) -> Substitute:
    """The larger of ``x`` and ``-x``."""
    return lambda x, *_, **__: torch.maximum(x, x * -1.0)


def minimum(traced: Traced, node: fx.Node) -> Substitute:
    """The largest of the negatives: the quantizer knows no MINIMUM."""
    return lambda x, y, **_: torch.maximum(x * -1.0, y * -1.0) * -1.0


def reversed_difference(traced: Traced, node: fx.Node) -> Substitute | None:
    """``c - x`` as ``-1 * x + c``: the converter gets two of the former in a row wrong."""
    given = arguments(node)
    if not isinstance(given["other"], (int, float)):
        return None
    factor, addend = -float(given["alpha"]), float(given["other"])
    return lambda x, *_, **__: x * factor + addend


def softmax(traced: Traced, node: fx.Node) -> Substitute | None:
    """Over another axis than a map's channels or the last one, with that axis last."""
    axis, rank = int(arguments(node)["dim"]), len(shape(node))
    if rank < 2:
        return None
    last = 1 if rank == 4 and is_channels_last(traced, source(node)) else rank - 1
    if axis % rank == last:
        return None
    return lambda x, *_, **__: x.transpose(axis, -1).softmax(-1).transpose(axis, -1).contiguous()


def softplus(traced: Traced, node: fx.Node) -> Substitute:
    """``relu(x) + log(1 + exp(-|x|))``, the logarithm as a polynomial of ``sigmoid(-|x|)``.

    No int8 kernel of an NPU has a logarithm. With t for that sigmoid, 0 to one half, it is
    ``-log(1 - t)``, and a cubic is within 5e-4 of it.
    """
    beta = float(arguments(node)["beta"])

    def softplus(x: Tensor, *_: object, **__: object) -> Tensor:
        return _softplus(x) if beta == 1 else _softplus(x * beta) * (1 / beta)

    return softplus


def log_sigmoid(traced: Traced, node: fx.Node) -> Substitute:
    """``-softplus(-x)``."""
    return lambda x, *_, **__: _softplus(x * -1.0) * -1.0


def _softplus(x: Tensor) -> Tensor:
    line, square, cube = _LOGARITHM
    above = torch.relu(x)
    share = torch.sigmoid(x - above * 2.0)
    return above + share * (share * (share * cube + square) + line)


def mish(traced: Traced, node: fx.Node) -> Substitute:
    """``x * tanh(softplus(x))`` as SiLU times a factor of 1 to 1.21: what int8 holds finely.

    With s for the sigmoid of x and u for that of -x the factor is ``1 + s u / (1 + u^2)``.
    """

    def mish(x: Tensor, *_: object, **__: object) -> Tensor:
        s, u = torch.sigmoid(x), torch.sigmoid(x * -1.0)
        root = torch.rsqrt(u * u + 1.0)
        return x * s * (s * u * (root * root) + 1.0)

    return mish
