"""How one tensor is clustered: `ClusterConfig`, immutable and valid once it exists."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from torchclust.fitting.arguments import check_rate

Init: TypeAlias = Literal["optimal", "linear", "density", "random", "kmeans++"]
CodebookDtype: TypeAlias = Literal["float32", "int8"]
Granularity: TypeAlias = Literal["tensor", "channel", "group"]
Assignment: TypeAlias = Literal["fixed", "nearest"]
Gradient: TypeAlias = Literal["sum", "mean"]
_CHOICES: dict[str, tuple[str, ...]] = {
    "codebook_dtype": get_args(CodebookDtype),
    "init": get_args(Init),
    "granularity": get_args(Granularity),
    "assignment": get_args(Assignment),
    "gradient": get_args(Gradient),
}


@dataclass(frozen=True)
class ClusterConfig:
    """How one tensor is clustered. Immutable, and valid once it exists.

    Args:
        n_clusters: most distinct values per codebook, 2..256 (indices then fit one byte). The
            default of 16 costs 4 bits per weight before entropy coding.
        codebook_dtype: ``"float32"`` for the paper's codebook in the weight's own dtype;
            ``"int8"`` for integers in [-127, 127], symmetric about 0 and containing 0, with one
            scale per output channel: the codes that the exported file will hold.
        init: where k-means starts; ``"optimal"`` needs no start, it is the global minimum.
        max_iter: Lloyd steps after the seeds; 0 keeps the seeds.
        granularity: what shares one codebook: the tensor, each output channel, or each
            ``group_size`` output channels. An int8 codebook is always one per tensor (Vela builds
            one palette per layer), its scales are per channel already.
        group_size: output channels per codebook with ``granularity="group"``, else None.
        assignment: ``"fixed"`` trains the centroids only (Deep Compression, section 3);
            ``"nearest"`` trains the weight as well, straight-through, and assigns it anew on every
            forward.
        gradient: how the members' gradients reach their centroid: ``"sum"`` is the paper's Eq. 3.
        preserve_sparsity: weights that are exactly zero stay exactly zero; one centroid is 0.
        rate: what a bit costs, at least 0: codebooks are fitted, weights assigned anew and, with
            ``"nearest"``, trained for fewer bits as well as for less error. In units of the
            weight's variance per bit and weight where weights are fitted and assigned
            (`torchclust.fit_codebook`), of the loss where they train (`torchclust.charge_`), and
            with ``cluster_(inputs=)`` of what the model's outputs vary by, for a bit in every
            weight (`torchclust.data_aware.bit_prices`). With ``"nearest"`` and the inits
            ``"optimal"`` and ``"linear"`` codebooks start evenly spaced, in the step that pays
            (`torchclust.fitting.even`), and stand still.

    Raises:
        TypeError, ValueError: naming the field, the value given and what is valid.

    Example:
        >>> ClusterConfig(n_clusters=4).codebook_dtype
        'float32'
        >>> ClusterConfig(n_clusters=1)
        Traceback (most recent call last):
        ...
        ValueError: n_clusters must be between 2 and 256, got 1
    """

    n_clusters: int = 16
    codebook_dtype: CodebookDtype = "float32"
    init: Init = "optimal"
    max_iter: int = 300
    granularity: Granularity = "tensor"
    group_size: int | None = None
    assignment: Assignment = "fixed"
    gradient: Gradient = "sum"
    preserve_sparsity: bool = False
    rate: float = 0.0

    def __post_init__(self) -> None:
        _require_int("n_clusters", self.n_clusters)
        if not 2 <= self.n_clusters <= 256:
            raise ValueError(f"n_clusters must be between 2 and 256, got {self.n_clusters}")
        for field, valid in _CHOICES.items():
            if getattr(self, field) not in valid:
                raise ValueError(
                    f"{field} must be one of {', '.join(map(repr, valid))}, "
                    f"got {getattr(self, field)!r}"
                )
        _require_int("max_iter", self.max_iter)
        if self.max_iter < 0:
            raise ValueError(f"max_iter must be at least 0, got {self.max_iter}")
        if not isinstance(self.preserve_sparsity, bool):
            raise TypeError(
                f"preserve_sparsity must be True or False, got {self.preserve_sparsity!r}"
            )
        check_rate(self.rate)
        if self.n_clusters < 3 and (self.preserve_sparsity or self.codebook_dtype == "int8"):
            why = "preserve_sparsity" if self.preserve_sparsity else "codebook_dtype='int8'"
            raise ValueError(
                f"n_clusters must be at least 3 with {why} (0 and one value on each side), "
                f"got {self.n_clusters}"
            )
        self._check_granularity()

    def _check_granularity(self) -> None:
        if self.codebook_dtype == "int8" and self.granularity != "tensor":
            raise ValueError(
                f"granularity must be 'tensor' with codebook_dtype='int8', got "
                f"{self.granularity!r}: the compiler builds one palette per layer, and an int8 "
                f"codebook has a scale per output channel already"
            )
        if self.granularity == "group":
            if self.group_size is None:
                raise ValueError("granularity='group' needs group_size, e.g. group_size=8")
            _require_int("group_size", self.group_size)
            if self.group_size < 1:
                raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        elif self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size!r} needs granularity='group', "
                f"got granularity={self.granularity!r}"
            )

    @property
    def half(self) -> int:
        """Centroids on either side of 0 in a codebook that is symmetric about it."""
        return min((self.n_clusters - 1) // 2, 127)

    @property
    def trains_at_a_price(self) -> bool:
        """Whether codebooks are spaced evenly, for weights that will train at a price of bits."""
        nearest = self.assignment == "nearest" and self.init in ("optimal", "linear")
        return nearest and self.rate > 0 and self.half > 0

    def to_json(self) -> str:
        """The fields as one line of JSON, as a clustered state dict carries them."""
        fields = dataclasses.asdict(self)
        if not self.rate:  # as state dicts had it before there was a price
            del fields["rate"]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ClusterConfig:
        """The reverse of `to_json`."""
        return cls(**json.loads(text))


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")


def config_from_bytes(encoded: Tensor) -> ClusterConfig:
    """The configuration that a clustered state dict carries (``...0.config_json``).

    Raises:
        ValueError: the bytes are no configuration.
    """
    try:
        return ClusterConfig.from_json(bytes(encoded.tolist()).decode("ascii"))
    except ValueError as error:
        raise ValueError(
            f"the state dict's config_json is damaged ({error}): the usual cause is an average of "
            f"state dicts that truncates integers, indices included. Average the floating-point "
            f"tensors only, and copy the others"
        ) from None


def config_as_bytes(config: ClusterConfig) -> Tensor:
    """Return a configuration as the uint8 tensor that state dicts hold."""
    encoded = list(config.to_json().encode("ascii"))
    return torch.tensor(encoded, dtype=torch.uint8, device="cpu")
