"""Convolutions whose padding the converter or the compiler does not take as torch writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.accelerators import MOST_STRIDE
from torchclust.export.rewrites.nodes import Substitute, arguments, numbers, operator, shape, source
from torchclust.export.rewrites.traced import Traced

_KERNEL = 2  # the first of a weight's axes that are a kernel's


def same(traced: Traced, node: fx.Node) -> Substitute | None:
    """A 1-D convolution of "same" padding with its padding in numbers: the converter has no other.

    Where it is uneven torch puts the odd one behind.
    """
    given = arguments(node)
    if given["padding"] != "same" or len(shape(node)) != 3:
        return None
    (dilation,), groups = numbers(given["dilation"], 1), given["groups"]
    total = dilation * (shape(given["weight"])[_KERNEL] - 1)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: object) -> Tensor:
        padded = F.pad(x, (0, 1)) if total % 2 else x
        return torch.conv1d(padded, weight, bias, 1, total // 2, dilation, groups)

    return convolve


def wide(traced: Traced, node: fx.Node) -> Substitute | None:
    """Pad first, and copy before a convolution of wide stride reads.

    Vela makes a padding a part of the convolution behind it, and finds afterwards that the stride
    is too wide for that: it stops, or leaves the convolution to the processor. A pooling of single
    pixels in between, which it keeps, costs one pass over the input.
    """
    given, rank = arguments(node), len(shape(node)) - 2
    named = isinstance(given["padding"], str)  # "same" has no wide strides, "valid" no padding
    padding = numbers(0 if named else given["padding"], rank)
    stride = numbers(given["stride"], rank)
    is_padded = any(padding) or operator(source(node)) in ("pad", "constant_pad_nd")
    if rank not in (1, 2) or max(stride) <= MOST_STRIDE or not is_padded:
        return None
    edges = [n for width in reversed(padding) for n in (width, width)]
    dilation, groups = given["dilation"], given["groups"]
    convolve = torch.conv1d if rank == 1 else torch.conv2d

    def apart(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: object) -> Tensor:
        padded = F.pad(x, edges) if any(padding) else x
        copied = F.max_pool1d(padded, 1) if rank == 1 else F.max_pool2d(padded, 1)
        return convolve(copied, weight, bias, stride, 0, dilation, groups)

    return apart


def same_or_wide(traced: Traced, node: fx.Node) -> Substitute | None:
    """Either, for a file that is compiled."""
    return same(traced, node) or wide(traced, node)
