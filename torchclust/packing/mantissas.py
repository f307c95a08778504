"""`round_mantissas_`: what is not clustered, at the precision that the result needs.

A small network's biases and norms are a third of its packed file, as float32 of which 24 bits tell
apart what 8 would. Rounded, they pack into half of their bytes and less, still bit for bit.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from torchclust.packing.tensors import tensors_of

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_WIDE = (torch.float32, torch.float64)


@torch.no_grad()
def round_mantissas_(model: ModuleT, bits: int = 8) -> ModuleT:
    """Round biases, norms and scales, whatever has one dimension and is not clustered, in place.

    Every float32 or float64 value keeps ``bits`` significant bits, so it changes by at most
    ``2 ** -bits`` of itself, and BatchNorm's variances stay positive. Dtypes stay. Do it after
    training and before `torchclust.save_packed`, and measure the model once more.

    Args:
        model: any module.
        bits: significant bits, 2 to 24; 8 are bfloat16's.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: ``bits`` is no whole number, or out of range.

    Example:
        >>> import torch, torchclust
        >>> layer = torch.nn.Linear(2, 2)
        >>> _ = layer.bias.data.copy_(torch.tensor([1.3, -0.0101]))
        >>> torchclust.round_mantissas_(layer, bits=3).bias.tolist()
        [1.25, -0.009765625]
    """
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits must be a whole number, got {bits!r}")
    if not 2 <= bits <= 24:
        raise ValueError(f"bits must be between 2 and 24, got {bits!r}")
    for tensor in tensors_of(model):
        plain = tensor.clustering is None and tensor.pruned is None
        if plain and tensor.stored.dim() == 1 and tensor.stored.dtype in _WIDE:
            tensor.stored.detach().copy_(_rounded(tensor.stored.detach(), bits))
    return model


def _rounded(values: Tensor, bits: int) -> Tensor:
    """To the nearest of so many significant bits, ties to even; NaN and infinity as they are."""
    mantissa, exponent = torch.frexp(values)
    rounded = torch.ldexp((mantissa * 2**bits).round(), exponent - bits)
    return torch.where(torch.isfinite(rounded), rounded, values)
