"""How many bytes a weight tensor takes once it is encoded: by its entropy, or by Vela's codec."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from torchclust.model.clustering import Clustering, named_clusterings
from torchclust.model.slots import decisions
from torchclust.packing.entropy import entropy

Measure: TypeAlias = Callable[[Tensor, Clustering | None], int]
"""Bytes of a weight, clustered so or (None) not at all."""

_GRID = 127
_BLOCKS = 1.0125


def encoded_bytes(model: nn.Module, measure: Measure, names: Collection[str]) -> dict[str, int]:
    """Return the encoded bytes of these parameters, clustered or not."""
    clusterings = dict(named_clusterings(model))
    return {
        name: measure(value, clusterings.get(name))
        for name, value, _ in decisions(model)
        if name in names
    }


def entropy_bytes(weight: Tensor, clustering: Clustering | None) -> int:
    """Return the bytes of a packed file: the indices' entropy and the codebook, else every value.

    What entropy coding adds to it is below 2 % (`torchclust.packing.pack`). Biases take less, for
    the highest bytes of floats deflate, and so do weights whose rows or columns hold little.
    """
    if clustering is None:
        return weight.numel() * weight.element_size()
    counts = torch.bincount(clustering.indices.reshape(-1).long()).cpu().numpy()
    codes, scale, width = clustering.codes, clustering.scale, weight.element_size()
    book = clustering.centroids.numel() * width
    if codes is not None and scale is not None:
        book = codes.numel() + scale.numel() * width
    return math.ceil(weight.numel() * entropy(counts.astype(np.int64)) / 8) + book


def vela_bytes(weight: Tensor, clustering: Clustering | None) -> int:
    """Return the bytes that Vela's weight encoder makes of the tensor's int8 codes.

    The compiler cuts the tensor into blocks, which added 0.4 to 1.2 % where it was measured; that
    is counted in, so that a budget holds for the compiler's own figure too.

    Raises:
        ImportError: without Vela, naming the install command.
    """
    try:
        codec = importlib.import_module("ethosu.mlw_codec")
    except ImportError as error:
        raise ImportError(
            "a budget for Vela is measured with its encoder:  pip install torchclust[export]"
        ) from error
    encoded = codec.encode(int8_codes(weight, clustering).reshape(-1).tolist())
    return math.ceil(_BLOCKS * len(encoded))


def int8_codes(weight: Tensor, clustering: Clustering | None) -> Tensor:
    """Return what the int8 file holds: the codes, or the values rounded to a grid.

    A float codebook of the whole tensor has one scale, everything else one per output channel.
    """
    channel = 0 if clustering is None else clustering.channel_dim
    others = [d for d in range(weight.dim()) if d != channel]
    if clustering is not None and clustering.scale is not None:
        # Not codes[indices]: training may bring two codes together, and `codes` then lists one.
        shape = [1 if dim in others else -1 for dim in range(weight.dim())]
        return (weight / clustering.scale.view(shape)).round().int()
    whole = clustering is not None and clustering.config.granularity == "tensor"
    peak = weight.abs().max() if whole else weight.abs().amax(others, keepdim=True)
    return (weight * (_GRID / peak.clamp(min=torch.finfo(weight.dtype).tiny))).round().int()
