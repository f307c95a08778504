"""What a bit costs in each layer, so that it costs the same in what its error does to the outputs.

In: layers with a ``rate``, and how much the model's outputs mind the error of each
(`torchclust.data_aware.curvature`). Out: the price of a bit in the units in which a layer's error
is counted. A model pays ``rate`` for a bit in all its weights, in units of what its outputs vary
by. The optimum at that price errs by ``rate / (2 ln 2)`` of it (rate-distortion theory of Gaussian
weights: Cover and Thomas, "Elements of information theory", 2006, section 10.3), however many
layers share it and whatever each is worth.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call
from torchclust.data_aware.compensation import Target
from torchclust.data_aware.curvature import curvatures
from torchclust.data_aware.input_moments import InputMoments
from torchclust.data_aware.layers import Layer

_HIGHEST = 0.25  # rate in one layer: beyond, its error is too large for a derivative to tell
_LEAST = 1e-9  # as good as nothing, but what has a rate is fitted as priced


@dataclass(frozen=True, eq=False)
class BitPrice:
    """Of one layer.

    Attributes:
        bit: in units of what the model's outputs vary by.
        curvature: `(channels,)` how much they mind the error of the layer's output.
    """

    bit: float
    curvature: Tensor

    def in_units_of(self, moments: InputMoments, *, centred: bool) -> float:
        """The price in units of the errors that `InputMoments.targets` count."""
        return self.bit / (float(self.curvature.mean()) * moments.scale(centred=centred))


def bit_prices(
    model: nn.Module, layers: Sequence[Layer], batches: Sequence[Call], centred: Collection[str]
) -> dict[str, BitPrice]:
    """Price the layers that have a rate by what their errors do to the outputs.

    Those of which the outputs tell nothing get their bits for nothing, as what they do may not be
    small. Where that is so for all there is no price.

    Args:
        model: float.
        layers: to fit.
        batches: what the model is called with.
        centred: names of layers behind which something takes the mean error away.
    """
    priced = {y.name: y for y in layers if y.compensates and y.config.rate}
    if not priced:
        return {}
    modules = {name: model.get_submodule(y.path) for name, y in priced.items()}
    known = {n: c for n, c in curvatures(model, modules, batches, centred).items() if c.any()}
    if not known:
        return {}
    total = sum(y.weight.numel() for y in priced.values())
    return {
        name: BitPrice(y.config.rate / total, known[name])
        if name in known
        else BitPrice(0.0, torch.ones(len(y.weight), dtype=torch.float64))
        for name, y in priced.items()
    }


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
    return min(max(rate, _LEAST), max(_HIGHEST, layer.config.rate))


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
