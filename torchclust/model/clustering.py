"""What is clustered, seen live: `Clustering`, `named_clusterings`, `is_clustered`.

In: a model. Nothing is copied: every attribute reads the present parametrization of the tensor.
Out: codebooks, indices, scales and codes, as reports, packing and export read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchclust.fitting.nearest import in_rows
from torchclust.model.places import (
    clustered_places,
    clustered_weight,
    is_covered,
    parametrizations_of,
)
from torchclust.weight.clustered import ClusteredWeight
from torchclust.weight.config import ClusterConfig


@dataclass(frozen=True)
class Clustering:
    """One clustered tensor of a model, seen live: attributes read the present state.

    Attributes:
        module: the module that owns the tensor (the first, where it is tied).
        tensor_name: its attribute there, for example ``"weight"``.

    Example:
        >>> from torchclust import cluster_, named_clusterings
        >>> model = cluster_(torch.nn.Linear(64, 64), 4, codebook_dtype="int8")
        >>> ((name, clustering),) = named_clusterings(model)
        >>> name, clustering.n_clusters, clustering.indices.shape, clustering.scale.shape
        ('weight', 4, torch.Size([64, 64]), torch.Size([64]))
        >>> len(clustering.codes)  # -m, 0, m
        3
    """

    module: nn.Module
    tensor_name: str

    @property
    def config(self) -> ClusterConfig:
        """How the tensor is clustered."""
        return self._parametrization.config

    @property
    def n_clusters(self) -> int:
        """Most distinct values per codebook."""
        return self.config.n_clusters

    @property
    def centroids(self) -> Tensor:
        """The trained codebook: ``(k,)``, or ``(codebooks, k)`` by channel or group.

        For an int8 codebook the positive magnitudes in the weight's own units; `codes` has the
        integers.
        """
        return self._parametrization.trained(self._original)

    @property
    def indices(self) -> Tensor:
        """Which centroid each weight has, ``uint8``, the weight's shape.

        Positions in the codebook, for int8 in `codes`. With
        ``assignment="nearest"`` they are those of this moment, in ascending order of centroids.
        """
        return self._parametrization.indices_of(self._original)

    @property
    def scale(self) -> Tensor | None:
        """The positive scale per output channel of an int8 codebook; None for a float one."""
        scale = self._parametrization.scale()
        return None if scale is None else scale.detach()

    @property
    def codes(self) -> Tensor | None:
        """The int8 codebook, ascending ``int8``; None for a float one."""
        return self._parametrization.codes(self._original)

    @property
    def latent(self) -> Tensor | None:
        """The weight that trains behind a "nearest" lookup; None with "fixed"."""
        return self._original.detach() if self.config.assignment == "nearest" else None

    @property
    def value(self) -> Tensor:
        """The weight, detached; unlike the module's attribute it is not kept for the next time."""
        with torch.no_grad():
            if is_covered(self.module, self.tensor_name):
                read: Tensor = getattr(self.module, self.tensor_name)
                return read.detach()
            return self._parametrization.value(self._original)

    @property
    def fit_error(self) -> float:
        """``||weight - clustered|| / ||weight||`` when the codebook was fitted."""
        return float(self._parametrization.get_buffer("fit_error"))

    @property
    def channel_dim(self) -> int:
        """The weight's output-channel dimension: 1 for ConvTranspose, else 0."""
        return self._parametrization.channel_dim

    @property
    def _parametrization(self) -> ClusteredWeight:
        found = clustered_weight(self.module, self.tensor_name)
        assert found is not None, f"{self.tensor_name} was stripped"
        return found

    @property
    def _original(self) -> Tensor:
        original = parametrizations_of(self.module)[self.tensor_name].original
        assert isinstance(original, Tensor)
        return original


def named_clusterings(model: nn.Module) -> Iterator[tuple[str, Clustering]]:
    """Iterate over ``(parameter_name, Clustering)``; a tied tensor comes once, first name.

    Example:
        >>> from torchclust import cluster_, named_clusterings
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> [name for name, _ in named_clusterings(cluster_(model, {"1.weight": 4}))]
        ['1.weight']
    """
    seen: set[int] = set()
    for path, module, name in clustered_places(model):
        parametrization = clustered_weight(module, name)
        if id(parametrization) not in seen:
            seen.add(id(parametrization))
            yield path, Clustering(module, name)


def is_clustered(module: nn.Module, tensor_name: str | None = None) -> bool:
    """Whether a module's tensor is clustered; without a name, whether any tensor in it is.

    Example:
        >>> from torchclust import cluster_, is_clustered
        >>> layer = cluster_(torch.nn.Linear(8, 8), 4)
        >>> is_clustered(layer), is_clustered(layer, "weight"), is_clustered(layer, "bias")
        (True, True, False)
    """
    if tensor_name is None:
        return next(clustered_places(module), None) is not None
    return clustered_weight(module, tensor_name) is not None


def check_distinct(path: str, clustering: Clustering, value: Tensor) -> None:
    """Raise if a tensor holds more values than its codebooks may."""
    config = clustering.config
    if not value.isfinite().all():
        raise ValueError(
            f"{path!r} holds NaN or infinity: the training diverged. Lower the learning rate and "
            f"train again, or strip without the check:  strip_(model, validate=False)"
        )
    table_rows = in_rows(value.transpose(0, clustering.channel_dim))
    if config.granularity == "tensor" and config.codebook_dtype == "float32":
        table_rows = table_rows.reshape(1, -1)
    size = config.group_size or 1
    for start in range(0, len(table_rows), size):
        distinct = count_distinct(table_rows[start : start + size])
        if distinct > config.n_clusters:
            raise ValueError(
                f"{path!r} holds {distinct} distinct values, more than n_clusters="
                f"{config.n_clusters}: something changed it behind the lookup. "
                f"Find what writes to it, or strip without the check: "
                f"strip_(model, validate=False)"
            )


def count_distinct(tensor: Tensor) -> int:
    """Number of distinct values; one sort on the CPU."""
    ordered = tensor.detach().reshape(-1).cpu()
    ordered = ordered.float() if ordered.dtype in (torch.float16, torch.bfloat16) else ordered
    values = ordered.numpy().copy()
    values.sort()  # numpy's vectorised sort: about 12 times faster than torch's
    return int((values[1:] != values[:-1]).sum()) + min(1, len(values))
