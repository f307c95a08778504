"""Transposed convolutions with paddings or groups, cut out of, or put together from, plain ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.nodes import Substitute, arguments, numbers, shape
from torchclust.export.rewrites.traced import Traced


def conv_transpose(
    traced: Traced, node: fx.Node, folded: tuple[Tensor, Tensor] | None = None
) -> Substitute | None:
    """The whole transposed convolution, of which the wanted stretch is kept.

    Output padding reads pixels of zeros more at the end; a dilated kernel is written out; a 1-D
    one is one of maps of a single row; each group is a convolution of its own channels.

    Args:
        traced: holds the kernels.
        node: the convolution.
        folded: weight and bias in the place of its own.
    """
    given, after = arguments(node), shape(node)[2:]
    axes, groups = len(after), given["groups"]
    names = ("stride", "padding", "output_padding", "dilation")
    weight = traced.value(given["weight"]) if folded is None else folded[0]
    if axes not in (1, 2) or weight is None:
        return None
    stride, padding, more, dilation = (numbers(given[name], axes) for name in names)
    if axes == 2 and groups == 1 and not any(more) and set(dilation) == {1}:
        return None
    name = traced.name(given["weight"])
    if name is not None and set(dilation) != {1}:
        traced.dilations[name] = tuple(dilation)
    written = spread(weight, dilation)
    written = written if axes == 2 else written.unsqueeze(2)
    kernels = [traced.constant(group) for group in written.chunk(groups)]
    shift = traced.constant(folded[1]) if folded else None
    step = (1, *stride)[-2:]
    pixels = [math.ceil(k / s) for k, s in zip(more, stride, strict=True)]

    def convolution(x: Tensor, _: Tensor, bias: Tensor | None = None, *__: Any) -> Tensor:
        longer = [n for k in reversed(pixels) for n in (0, k)]
        x = F.pad(x, longer) if any(longer) else x
        y = _by_group(x if axes == 2 else x.unsqueeze(2), kernels, shift() if shift else bias, step)
        y = y if axes == 2 else y.squeeze(2)
        for axis, (begin, size) in enumerate(zip(padding, after, strict=True), 2):
            y = y.narrow(axis, begin, size)
        return y

    return convolution


def _by_group(x: Tensor, kernels: list[Any], bias: Tensor | None, step: tuple[int, ...]) -> Tensor:
    if len(kernels) == 1:
        return F.conv_transpose2d(x, kernels[0](), bias, step)
    count = len(kernels)
    biases = [None] * count if bias is None else bias.chunk(count)
    parts = zip(x.chunk(count, 1), kernels, biases, strict=True)
    return torch.cat([F.conv_transpose2d(part, k(), b, step) for part, k, b in parts], 1)


def spread(weight: Tensor, dilation: Sequence[int]) -> Tensor:
    """A kernel with the zeros between its elements written out.

    >>> spread(torch.tensor([[[1, 2, 3]]]), [2])
    tensor([[[1, 0, 2, 0, 3]]])
    """
    sizes = [(n - 1) * step + 1 for n, step in zip(weight.shape[2:], dilation, strict=True)]
    wide = weight.new_zeros(*weight.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in dilation))
    wide[places] = weight
    return wide
