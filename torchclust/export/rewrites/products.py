"""Matrix products with a constant in front, as linear layers."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.maps import average
from torchclust.export.rewrites.nodes import Substitute, shape
from torchclust.export.rewrites.traced import Traced


def product(traced: Traced, node: fx.Node) -> Substitute | None:
    """``A @ x`` as ``(x^T @ A^T)^T``: an int8 product's weights are its second factor.

    Of those in front no kernel reads more than the first scale, and no Ethos-U runs it. A product
    with a vector would become a sum of products, which saturates.
    """
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    whole, size = shape(left), shape(node)
    if len(whole) < 2:
        return None
    if not traced.is_constant(left) or traced.is_constant(right):
        return _with_vector(traced, left, shape(right), size)

    def product(a: Tensor, x: Tensor, **_: object) -> Tensor:
        turned = x[None] if x.ndim == 1 else x.transpose(-1, -2)
        if math.prod(whole[:-2]) > 1:
            return (turned @ a.transpose(-1, -2)).transpose(-1, -2).contiguous().reshape(size)
        y = F.linear(turned, a.reshape(whole[-2:]))
        return y.transpose(-1, -2).contiguous().reshape(size)

    return product


def _with_vector(
    traced: Traced, left: fx.Node, right: tuple[int, ...], size: tuple[int, ...]
) -> Substitute | None:
    """A vector, or columns as a mean of products: the converter fails on their reshaping."""
    if len(right) == 1:
        return lambda a, x, **_: F.linear(a, x[None]).reshape(size)
    whole = shape(left)
    if len(right) < 3 or right[-1] != 1 or right[:-2] != whole[:-2] or whole[-2] == 1:
        return None
    mean = average(traced, left, [len(whole) - 1])
    return lambda a, x, **_: mean(a * x.transpose(-1, -2)) * float(whole[-1])
