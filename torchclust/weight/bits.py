"""What an index costs while a weight trains: a running count of members, and the price of a bit.

With ``rate`` a `ClusteredWeight` that assigns anew holds, as buffers in the state dict:

- ``members``: how many weights each centroid (int8: each magnitude, 0 first) has had of late;
- ``bit_price``: the rate in squared units of the weight, or of its codes;
- ``price_share``: how much of the price is charged at present, from 0 to 1.

A centroid's bits are those that an adaptive coder pays, half a member more than it has
(Krichevsky and Trofimov 1981): a centroid without members is dear, not impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHARGED = ("members", "price_share")  # the buffers that charging changes
RECENT = 0.1  # the share of the present counts in the running ones


def price_tensors(rows: Tensor, rate: float, members: Tensor, unit: Tensor) -> dict[str, Tensor]:
    """The buffers of a weight just fitted, prices in squares of a unit; all of it is charged."""
    variance = rows.double().var(correction=0) / unit.double().square().mean()
    return {
        "members": members.float(),
        "bit_price": (rate * variance).float(),
        "price_share": torch.ones((), device=rows.device),
    }


def bits_of(members: Tensor) -> Tensor:
    """`(..., k)` bits of an index of each centroid."""
    total = members.sum(-1, keepdim=True) + members.shape[-1] / 2
    return (total / (members + 0.5)).log2()


def falling_to_the_cheapest(table: Tensor, bits: Tensor) -> Tensor:
    """The bits of a density with one peak: nowhere dearer than further away from the cheapest.

    What lies between two centroids that comply gets the bits in between. Otherwise a centroid that
    has lost its members would be a wall, which weights further out could not pass to the cheaper.

    Args:
        table: `(..., k)` ascending centroids.
        bits: `(..., k)` of their indices.

    >>> falling_to_the_cheapest(torch.tensor([-2.0, -1.0, 0.0, 1.0]), torch.tensor([5.0, 9, 1, 3]))
    tensor([5., 3., 1., 3.])
    """
    place = torch.arange(bits.shape[-1], device=bits.device).expand(bits.shape)
    cheapest = bits.argmin(-1, keepdim=True)
    outside_left, outside_right = bits.cummin(-1).values, bits.flip(-1).cummin(-1).values.flip(-1)
    complies = bits == torch.where(place < cheapest, outside_left, outside_right)
    low = place.where(complies, 0).cummax(-1).values
    high = place.where(complies, bits.shape[-1] - 1).flip(-1).cummin(-1).values.flip(-1)
    table = table.expand(bits.shape)
    left, right = table.gather(-1, low), table.gather(-1, high)
    share = (table - left) / (right - left).clamp_min(torch.finfo(table.dtype).tiny)
    return torch.lerp(bits.gather(-1, low), bits.gather(-1, high), share.to(bits.dtype))


def slopes_between(table: Tensor, bits: Tensor) -> Tensor:
    """By how many bits a weight's expected cost grows when the weight does, between two centroids.

    Under dither as wide as a cell the expected bits of a weight between two centroids are those of
    the two, interpolated; so this is the gradient of the expected bits under a smooth density.

    Args:
        table: `(..., k)` ascending centroids.
        bits: `(..., k)` of their indices.

    Returns:
        `(..., k - 1)`, in bits per unit of the table.
    """
    gap = table.diff(dim=-1).clamp_min(64 * torch.finfo(table.dtype).tiny)
    return falling_to_the_cheapest(table, bits).diff(dim=-1) / gap
