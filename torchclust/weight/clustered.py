"""What every clustered weight has in common: what is stored, what trains, when it is looked up.

Contract: see `torchclust.weight.parametrization`, which says what a codebook is.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.fitting.nearest import priced_midpoints
from torchclust.fitting.threads import must_be_traceable
from torchclust.fitting.worth import without_dead_channels
from torchclust.weight.bits import RECENT, price_tensors, slopes_between
from torchclust.weight.codebooks import fit_rows, relative_error
from torchclust.weight.config import ClusterConfig, config_as_bytes
from torchclust.weight.evaluation_cache import EvaluationCache
from torchclust.weight.located import Located, locate
from torchclust.weight.lookup import Memory, grouped_sum, lookup, with_gradient_times
from torchclust.weight.stored import Stored

PARAMETERS = ("centroids", "relative_scale")


class ClusteredWeight(Stored):
    """A weight as codebook and indices; subclasses say what a codebook is.

    Args:
        config: how the weight is clustered.
        tensors: ``original`` and the other tensors of its state dict, as `fit_as` makes them.
        channel_dim: the weight's output-channel dimension: 1 for ConvTranspose, else 0.
        requires_grad: whether the codebook trains.
    """

    def __init__(
        self,
        config: ClusterConfig,
        tensors: Mapping[str, Tensor],
        *,
        channel_dim: int = 0,
        requires_grad: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.channel_dim = channel_dim
        self.shape = tensors["indices" if config.assignment == "fixed" else "original"].shape
        self.first_original: Tensor | None = tensors["original"]
        self._cached: EvaluationCache | None = None
        self._memory = Memory()
        self._located: Located | None = None  # by the last priced forward pass, for `charge_`
        for name, tensor in tensors.items():
            if name in PARAMETERS:
                # At a price weights move through the codebook. An optimizer's steps, as wide for it
                # as for a weight, would carry centroids through each other and through 0.
                still = name == "centroids" and "members" in tensors
                self.register_parameter(name, nn.Parameter(tensor, requires_grad and not still))
            elif name not in ("original", "config_json"):
                self.register_buffer(name, tensor)
        self.register_buffer("config_json", config_as_bytes(config).to(tensors["original"].device))
        self.seal_()

    def forward(self, original: Tensor) -> Tensor:
        """The weight. Without gradients the last result is returned while nothing has changed."""
        self.mend_()
        if torch.is_grad_enabled() or must_be_traceable(original):
            if self._cached is not None:  # assigning to a module's attribute takes its time
                self._cached = None
            return self._evaluate(original, self._memory)
        sources = [original, *self._parameters.values(), *self._buffers.values()]
        tensors = [tensor for tensor in sources if tensor is not None]
        cached = self._cached  # read once: another thread that trains takes it away
        if cached is None or not cached.holds(tensors):
            self._cached = cached = None  # not two values at a time, nor the last step's
            self._memory = Memory()
            self._cached = cached = EvaluationCache(self.value(original), tensors)
        return cached.value

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Assigning to ``module.weight`` fits anew; registering keeps the first fit."""
        if self.first_original is not None:
            return self.first_original
        fitted = fit_as(type(self), weight, self.config, channel_dim=self.channel_dim)
        for name, tensor in fitted.items():
            if name != "original":
                getattr(self, name).data = tensor
        self.seal_()
        return fitted["original"]

    def trained(self, original: Tensor) -> Tensor:
        """The tensor that trains the codebook, given the registered ``original``."""
        return original if self.config.assignment == "fixed" else self._tensor("centroids")

    def indices_of(self, original: Tensor) -> Tensor:
        """Indices in the weight's shape, ``uint8``: as stored, or of the nearest centroids."""
        self.mend_()
        with torch.no_grad():
            return self._rows(self._indices(original, self._codebook(self.trained(original))))

    def codes(self, original: Tensor) -> Tensor | None:
        """The int8 codebook, ascending; None for a float codebook."""
        return None

    def scale(self) -> Tensor | None:
        """The positive scale of every output channel; None for a float codebook."""
        return None

    def value(self, original: Tensor) -> Tensor:
        """The weight in memory of its own, of which nothing is kept here."""
        return self._evaluate(original, None)

    def _evaluate(self, original: Tensor, memory: Memory | None) -> Tensor:
        codebook = self._codebook(self.trained(original))
        indices = self._indices(original.detach(), codebook.detach())
        if self.config.gradient == "mean":
            members = self._fold(self._counts(indices, self._table(codebook.detach())))
            members = members.to(original.dtype)
            codebook = with_gradient_times(codebook, members.clamp_min(1).reciprocal())
        table = self._table(codebook)
        if self.config.assignment == "fixed":
            return self._rows(lookup(table, indices, None, memory))
        table = table + _zero_if_finite(original.detach(), codebook.detach()).to(table.dtype)
        return self._rows(lookup(table, indices, self._rows(original), memory))

    def _indices(self, original: Tensor, codebook: Tensor) -> Tensor:
        """Indices with output channels first, as `lookup` wants them beside a table of rows."""
        if self.config.assignment == "fixed":
            return self._rows(self._tensor("indices"))
        rows = self._rows(original)
        if not self.is_priced:
            return self._zeros_kept(self._nearest(rows, codebook), codebook)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            limits = self._priced_limits(self._places(codebook))
            return self._zeros_kept(self._count_below(rows, limits), codebook)
        self._located = found = self._locate(rows, codebook)
        return found.indices

    def _zeros_kept(self, indices: Tensor, codebook: Tensor) -> Tensor:
        if not self.config.preserve_sparsity:
            return indices
        zero = self._index_of_zero(codebook)
        return torch.where(self._rows(self._tensor("sparsity_mask")), zero, indices)

    def _priced_limits(self, places: Tensor) -> Tensor:
        """Cells of the least squared distance plus price of their bits: midpoints that moved."""
        price = self._tensor("bit_price") * self._tensor("price_share")
        return priced_midpoints(places, self.bits(), price)

    @torch.no_grad()
    def _locate(self, rows: Tensor, codebook: Tensor) -> Located:
        places = self._places(codebook)
        count_below = functools.partial(self._count_below, rows)
        found = locate(self._priced_limits(places), places[..., 1:-1], count_below)
        return replace(found, indices=self._zeros_kept(found.indices, codebook))

    @property
    def is_priced(self) -> bool:
        """Whether weights are assigned anew, by the price of their bits too."""
        return "members" in self._buffers

    @torch.no_grad()
    def charge_(self, latent: Tensor, share: float, price: float) -> None:
        """Add the gradient of the expected bits to the latent weight's; count members anew.

        Args:
            latent: ``original``, with a gradient.
            share: of the price, from now on.
            price: of a bit, whole, in units of the loss.
        """
        assert latent.grad is not None
        codebook = self._codebook(self.trained(latent))
        found = self._located or self._locate(self._rows(latent), codebook)
        self._located = None
        places = self._places(codebook)
        if places.shape[-1] > 1:
            slopes = slopes_between(places, self.bits()).take_along_dim(found.gaps, -1)
            pull = self._in_units_of_weight(lookup(slopes, found.steps))
            latent.grad.add_(self._rows(pull), alpha=share * price)
        self._tensor("price_share").fill_(share)
        counts = self.members_of(found.indices, codebook)
        members = self._tensor("members")
        members.lerp_(counts.to(members.dtype), RECENT)

    @torch.no_grad()
    def spent_bits(self, latent: Tensor) -> float:
        """What all indices cost at present, by how often each comes up now, not of late."""
        codebook = self._codebook(self.trained(latent))
        indices = self._indices(latent, codebook)
        bits = self._bits_by(self.members_of(indices, codebook))
        return float((self._counts(indices, self._places(codebook)) * bits).double().sum())

    def bits(self) -> Tensor:
        """What an index costs by the running counts, in the shape of the places."""
        return self._bits_by(self._tensor("members"))

    def _bits_by(self, members: Tensor) -> Tensor:
        raise NotImplementedError

    def _places(self, codebook: Tensor) -> Tensor:
        """The centroids in units of which prices are squares: ``(k,)``, or one row a channel."""
        raise NotImplementedError

    def _count_below(self, rows: Tensor, limits: Tensor) -> Tensor:
        """How many of the limits, in those units and that shape, lie below each weight."""
        raise NotImplementedError

    def _in_units_of_weight(self, pull: Tensor) -> Tensor:
        """Slopes in those units as slopes of the weight, output channels first."""
        return pull

    def price_unit(self) -> Tensor:
        """Those units, in units of the weight."""
        return torch.ones(())

    def members_of(self, indices: Tensor, codebook: Tensor) -> Tensor:
        """How many weights take each centroid, as the running counts have them."""
        raise NotImplementedError

    def _rows(self, tensor: Tensor) -> Tensor:
        """Output channels first, and back again: the same exchange of two dimensions."""
        return tensor if self.channel_dim == 0 else tensor.transpose(0, self.channel_dim)

    @staticmethod
    def _counts(indices: Tensor, table: Tensor) -> Tensor:
        if table.dim() == 1 and not must_be_traceable():
            return torch.bincount(indices.reshape(-1), minlength=len(table)).float()
        ones = torch.ones((), device=indices.device)
        return grouped_sum(ones.expand(indices.shape), indices, table.shape)

    def _tensor(self, name: str) -> Tensor:
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_cached": None, "_located": None}

    def _codebook(self, trained: Tensor) -> Tensor:
        """What the trained tensor stands for; ascending where assignments are sought in it."""
        raise NotImplementedError

    def _table(self, codebook: Tensor) -> Tensor:
        """The values that `lookup` reads: ``(k,)``, or one row for every output channel."""
        raise NotImplementedError

    def _nearest(self, rows: Tensor, codebook: Tensor) -> Tensor:
        """Indices of the nearest values, by binary search over midpoints: O(n log k) time."""
        raise NotImplementedError

    def _index_of_zero(self, codebook: Tensor) -> Tensor:
        raise NotImplementedError

    def _fold(self, counts: Tensor) -> Tensor:
        """Members per table entry, summed to members per codebook entry."""
        raise NotImplementedError


def fit_as(
    kind: type[ClusteredWeight],
    weight: Tensor,
    config: ClusterConfig,
    *,
    channel_dim: int = 0,
    importance: Tensor | None = None,
    seed: int = 0,
    book: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Fit a weight's codebooks for one kind of parametrization; pure.

    Args:
        kind: the parametrization.
        weight: the values.
        config: how they are clustered.
        channel_dim: the weight's output-channel dimension.
        importance: of the squared errors, or None.
        seed: of inits that draw.
        book: centroids and indices, output channels first, where they are fitted already.

    Returns:
        The tensors of a `ClusteredWeight` by name. ``original`` is what the parametrization
        registers: the codebook with ``"fixed"``, the weight itself with ``"nearest"``.
        ``fit_error`` is ``||weight - clustered|| / ||weight||`` as fitted, a float32 scalar.
    """
    rows = weight.detach().transpose(0, channel_dim)
    if config.codebook_dtype == "int8":  # whose scales would make codes of a dead channel's noise
        rows = without_dead_channels(rows)
    weights = None if importance is None else importance.detach().transpose(0, channel_dim)
    trained, indices, tensors = (
        fit_rows(rows, config, weights, seed) if book is None else (*book, {})
    )
    if config.assignment == "fixed":
        tensors |= {"original": trained, "indices": indices.transpose(0, channel_dim).contiguous()}
    else:
        latent = rows.transpose(0, channel_dim)
        tensors |= {"original": latent.clone(), "centroids": trained}
        if config.rate:
            tensors |= _prices(kind, rows, config, trained, indices, tensors)
        if config.preserve_sparsity:
            tensors["sparsity_mask"] = weight.detach() == 0
    with torch.no_grad():
        fitted = kind(config, tensors, channel_dim=channel_dim)
        clustered = fitted.value(tensors["original"])
    return tensors | {"fit_error": relative_error(weight.detach(), clustered)}


def _prices(
    kind: type[ClusteredWeight],
    rows: Tensor,
    config: ClusterConfig,
    trained: Tensor,
    indices: Tensor,
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What the bits of a weight just fitted cost, by the members that its centroids got."""
    fixed = kind(
        replace(config, assignment="fixed"), {**tensors, "original": trained, "indices": indices}
    )
    with torch.no_grad():
        members = fixed.members_of(indices, fixed._codebook(trained))
    return price_tensors(rows, config.rate, members, fixed.price_unit())


def _zero_if_finite(*tensors: Tensor) -> Tensor:
    """0, or NaN if any value is NaN or infinite: a nearest centroid would hide those."""
    ends = [end for tensor in tensors for end in tensor.aminmax()]
    return torch.stack(ends).mul(0).sum()
