"""Convolutions of wide strides, whose padding the compiler must not take for a part of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from torchclust.export.accelerators import MOST_STRIDE
from torchclust.export.rewrites.nodes import Substitute, arguments, numbers, operator, shape, source
from torchclust.export.rewrites.traced import Traced


def convolution(traced: Traced, node: fx.Node) -> Substitute | None:
    """Pad first, and copy before the convolution reads.

    Vela makes a padding a part of the convolution behind it, and finds afterwards that the stride
    is too wide for that: it stops, or leaves the convolution to the processor. A pooling of single
    pixels in between, which it keeps, costs one pass over the input.
    """
    given, rank = arguments(node), len(shape(node)) - 2
    stride, padding = numbers(given["stride"], rank), given["padding"]
    padding = [0] if padding == "valid" else numbers(padding, rank)  # "same" has no wide strides
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
