"""What a bit costs in each layer, so that it costs the same in what its error does to the outputs.

In: layers with a ``rate``, and how much the model's outputs mind the error of each
(`torchclust.data_aware.curvature`). Out: the price of a bit in the units in which a layer's error
is counted. The average bits of weights that are coded at one price depend on the geometric mean of
what their variances are worth (reverse water-filling: Cover and Thomas, "Elements of information
theory", 2006, section 10.3.3), so that is the unit in which a rate counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call
from torchclust.data_aware.compensation import Target
from torchclust.data_aware.curvature import Curvature, curvatures
from torchclust.data_aware.input_moments import InputMoments
from torchclust.data_aware.layers import Layer

_HIGHEST = 0.25  # rate in one layer: beyond, its error is too large for a derivative to tell


@dataclass(frozen=True, eq=False)
class BitPrice:
    """Of one layer.

    Attributes:
        bit: in units of the squared error of the model's outputs.
        curvature: how much these mind the error of the layer's output.
    """

    bit: float
    curvature: Curvature

    def in_units_of(self, moments: InputMoments, *, centred: bool) -> float:
        """The price in units of the errors that `InputMoments.targets` count."""
        return self.bit / (float(self.curvature.squares.mean()) * moments.scale(centred=centred))


def bit_prices(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Call]
) -> dict[str, BitPrice]:
    """Price the layers that have a rate, as far as the outputs tell what their errors do."""
    priced = {y.name: y for y in layers if y.compensates and y.config.rate}
    if not priced:
        return {}
    modules = {name: model.get_submodule(y.path) for name, y in priced.items()}
    found = {n: c for n, c in curvatures(model, modules, batches).items() if c.power > 0}
    unit = unit_of_price(found, {name: y.weight.numel() for name, y in priced.items()})
    return {name: BitPrice(priced[name].config.rate * unit, c) for name, c in found.items()}


def effective_rate(
    layer: Layer,
    price: BitPrice | None,
    variance: float,
    moments: InputMoments,
    *,
    centred: bool,
) -> float:
    """The rate at which the layer alone pays that price, in units of its own output's variance.

    Without a price it is the configuration's. It is limited: an error that is no longer small
    beside the output does more harm than derivatives tell.
    """
    if price is None or variance <= 0:
        return layer.config.rate
    rate = price.in_units_of(moments, centred=centred) / variance
    return min(rate, max(_HIGHEST, layer.config.rate))


def variance_per_weight(targets: Sequence[Target], weight: Tensor) -> float:
    """What a layer's output varies by with its weight, if inputs were independent, per weight."""
    power, start = 0.0, 0
    rows = weight.detach().float().flatten(1)
    for target in targets:
        part = rows[start : start + len(target.row_weight)]
        by_row = part.square() @ target.hessian.diagonal()
        power += float((by_row * target.row_weight).sum(dtype=torch.float64))
        start += len(part)
    return power / rows.numel()


def unit_of_price(found: Mapping[str, Curvature], sizes: Mapping[str, int]) -> float:
    """What a weight's variance is worth: the geometric mean over all weights of these layers.

    Args:
        found: curvatures by layer.
        sizes: how many weights each layer has.
    """
    worth = [(sizes[name], c.power / sizes[name]) for name, c in found.items() if c.power > 0]
    total = sum(size for size, _ in worth)
    return math.exp(sum(size * math.log(each) for size, each in worth) / total) if worth else 0.0
