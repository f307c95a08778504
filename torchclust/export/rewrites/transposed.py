"""Transposed convolutions with paddings, cut out of one without."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.rewrites.traced import Substitute, Traced, arguments, shape


def conv_transpose(traced: Traced, node: fx.Node) -> Substitute | None:
    """The whole transposed convolution, of which the wanted stretch is kept.

    Output padding reads a pixel of zeros more at the end; a dilated kernel is written out; a 1-D
    one is one of maps of a single row.
    """
    given, after = arguments(node), shape(node)[2:]
    axes = len(after)
    if axes not in (1, 2) or given["groups"] != 1 or node in traced.substitutes:
        return None
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, more, dilation = (_numbers(given[name], axes) for name in names)
    weight = traced.value(given["weight"])
    simple = not any(more) and set(dilation) == {1}
    if weight is None or (simple and axes == 2):
        return None
    kernel = traced.constant(_dilated(weight, dilation))
    step = (1, *stride) if axes == 1 else tuple(stride)

    def convolution(x: Tensor, _: Tensor, bias: Tensor | None = None, *__: Any) -> Tensor:
        longer = [n for k in reversed(more) for n in (0, 1 if k else 0)]
        x = F.pad(x, longer) if any(longer) else x
        maps, filters = (x, kernel()) if axes == 2 else (x.unsqueeze(2), kernel().unsqueeze(2))
        y = F.conv_transpose2d(maps, filters, bias, step)
        y = y if axes == 2 else y.squeeze(2)
        for axis, (begin, size) in enumerate(zip(padding, after, strict=True), 2):
            y = y.narrow(axis, begin, size)
        return y

    return convolution


def _numbers(value: Any, axes: int) -> list[int]:
    numbers = [value] if isinstance(value, int) else list(value)
    return [int(n) for n in (numbers * axes if len(numbers) == 1 else numbers)]


def _dilated(weight: Tensor, dilation: list[int]) -> Tensor:
    """The kernel with the zeros between its elements written out."""
    for axis, step in enumerate(dilation, 2):
        if step > 1:
            size = list(weight.shape)
            size[axis] = (size[axis] - 1) * step + 1
            wide = weight.new_zeros(size)
            wide.index_copy_(axis, torch.arange(0, size[axis], step), weight)
            weight = wide
    return weight
