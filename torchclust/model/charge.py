"""`charge_`: trained weights feel what their bits cost, in the gradient of one optimizer step.

In: a model whose gradients are those of the loss. Each weight that is assigned anew and has a
`rate` gets the gradient of its expected bits added to its own, as ``loss + price * bits`` would
have it; its running counts of members are brought up to date. Out: the same model.

That is how networks got a hundred times smaller (Oktay et al., "Scalable model compression by
entropy-penalized reparameterization", 2020), with the codebook's own counts as the density. The
price must begin at nothing: charged in full at once it kills weights before they can move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from torchclust.model.cluster import ModuleT
from torchclust.model.places import clustered_places, clustered_weight, parametrizations_of
from torchclust.weight.clustered import ClusteredWeight

_LOSS_PER_VARIANCE = 4.0
"""What an error as large as the weights themselves adds to the loss, of the order of one guess."""


def charge_(
    model: ModuleT, share: float = 1.0, *, parameters: Collection[Tensor] | None = None
) -> ModuleT:
    """Charge the model's weights for their bits, between ``backward()`` and ``optimizer.step()``.

    Does something where ``rate`` is above 0 and ``assignment="nearest"``: the average bits per
    weight, times ``4 * rate``, are added to the loss as far as gradients can tell, and until the
    next call weights are assigned with the same share of the price. The Lightning callback calls
    it by itself, with a share that grows over the first half of the run.

    Args:
        model: clustered, with gradients: unscaled ones, if a gradient scaler is used.
        share: of the price, from 0 to 1. Let it grow from 0.
        parameters: charge only for weights among these; None for all.

    Returns:
        The same object.

    Raises:
        ValueError: `share` is not between 0 and 1.

    Example:
        >>> import torch
        >>> from torchclust import charge_, cluster_
        >>> net = cluster_(torch.nn.Linear(64, 64), 9, assignment="nearest", rate=0.1)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> for step in range(20):
        ...     optimizer.zero_grad()
        ...     net(torch.randn(8, 64)).square().mean().backward()
        ...     _ = charge_(net, min(1.0, step / 10))
        ...     optimizer.step()
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}: it is of the whole price")
    for priced in priced_weights(model, parameters):
        priced.charge_(share, _LOSS_PER_VARIANCE)
    return model


def is_priced(model: nn.Module) -> bool:
    """Whether `charge_` does anything for the model."""
    return next(_priced(model), None) is not None


class PricedWeight(NamedTuple):
    """A weight that pays for its bits.

    Attributes:
        weight: assigns it anew.
        latent: what trains.
        price: of a bit, such that a bit in every priced weight of the model costs the `rate`.
    """

    weight: ClusteredWeight
    latent: Tensor
    price: float

    def charge_(self, share: float, unit: float = 1.0) -> None:
        """Add the bits' gradient to the latent weight's, if it has one; prices in these units."""
        if self.latent.grad is not None:
            self.weight.charge_(self.latent, share, unit * self.price)


def priced_weights(
    model: nn.Module, parameters: Collection[Tensor] | None = None
) -> list[PricedWeight]:
    """Return those whose latent weights are among the parameters; all of them for None."""
    priced = dict(_priced(model))
    total = sum(latent.numel() for latent in priced.values())
    chosen = None if parameters is None else {id(parameter) for parameter in parameters}
    return [
        PricedWeight(weight, latent, weight.config.rate / total)
        for weight, latent in priced.items()
        if chosen is None or id(latent) in chosen
    ]


def _priced(model: nn.Module) -> Iterator[tuple[ClusteredWeight, Tensor]]:
    for _, module, name in clustered_places(model):
        weight = clustered_weight(module, name)
        if weight is not None and weight.is_priced:
            latent = parametrizations_of(module)[name].original
            assert isinstance(latent, Tensor)
            yield weight, latent
