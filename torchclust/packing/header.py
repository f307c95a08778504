"""What a record of a packed file says of its tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchclust.packing.coding import Codebooks, Codes, Coding, Layout, Sparse
from torchclust.packing.contexts import Contexts
from torchclust.packing.dtypes import DTYPES, Dtype
from torchclust.packing.planes import deflated, split

KINDS = ("raw", "codebook", "codes", "sparse")


@dataclass(frozen=True)
class Header:
    """What a record says of its tensor.

    Attributes:
        names: under which the tensor stands in the state dict; several where it is tied.
        dtype: its element type.
        layout: its shape and channel dimension.
        coding: how it is coded; None for raw.
        contexts: how often its symbols occur; None for raw.
        entropy_bits: of its symbols, per element; for reports only, as `zeros` is.
        zeros: elements that are zero.
        squeezed: whether a raw tensor is stored plane by plane (`torchclust.packing.planes`).
    """

    names: tuple[str, ...]
    dtype: Dtype
    layout: Layout
    coding: Coding | None = None
    contexts: Contexts | None = None
    entropy_bits: float = 0.0
    zeros: int = 0
    squeezed: bool = False

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        kinds = {Codebooks: "codebook", Codes: "codes", Sparse: "sparse"}
        return "raw" if self.coding is None else kinds[type(self.coding)]

    @property
    def n_symbols(self) -> int | None:
        """Entries of a codebook; None for raw."""
        return None if self.coding is None else self.coding.n_symbols

    @property
    def side_bytes(self) -> int:
        """Codebooks, codes and scales; of a sparse tensor its literals."""
        match self.coding:
            case Codebooks(books=books):
                return books.nbytes
            case Codes(codes=codes, scales=scales):
                return codes.nbytes + scales.nbytes
            case Sparse(n_literals=n):
                return n * self.dtype.unit
            case None:
                return 0

    @property
    def saved_bytes(self) -> int:
        """What codebooks and scales take less in the file than their elements have bytes."""
        match self.coding:
            case Codebooks(books=elements) | Codes(scales=elements) if self.dtype.unit > 1:
                top = split(elements)[0]
                return max(0, len(top) - len(deflated(top)))
            case _:
                return 0


def require(condition: bool, what: str) -> None:
    """Raise ``ValueError("invalid ...")`` if a header says what can not be."""
    if not condition:
        raise ValueError(f"invalid {what}")


def described(
    kind: int, last_kind: int, number: int, shape: tuple[int, ...], axis: int, names: Sequence[str]
) -> tuple[Layout, Dtype]:
    """Layout and element type of a tensor of these numbers.

    Raises:
        ValueError: saying what no tensor has.
    """
    require(kind <= last_kind, f"kind {kind}")
    require(number < len(DTYPES), f"element type {number}")
    require(axis < max(1, len(shape)), f"channel dimension {axis} of {len(shape)}")
    require(0 < len(names) == len(set(names)), "names")
    return Layout(shape, axis), DTYPES[number]


def check_coded(layout: Layout, dtype: Dtype, entropy_bits: float, zeros: int) -> None:
    """Refuse what no coded tensor can be.

    Raises:
        ValueError: saying what.
    """
    plausible = layout.n_elements > 0 and dtype.units == 1
    require(plausible, "a coded tensor of no or complex elements")
    possible = 0 <= entropy_bits <= 8 * dtype.size and zeros <= layout.n_elements
    require(possible, "statistics")


def checked(coding: Coding, layout: Layout, dtype: Dtype) -> Coding:
    """The coding, if there can be such a one.

    Raises:
        ValueError: saying what can not be.
    """
    match coding:
        case Codes(codes=codes):
            require(dtype.is_scalable and len(set(codes.tolist())) == len(codes), "codes")
            require(-128 not in codes, "code -128")
        case Sparse(meanings=meanings, n_literals=n_literals):
            found = set(meanings.tolist())
            require(found <= {-1, 0, 1} and len(found) == len(meanings), "meanings")
            require(n_literals <= layout.n_elements and dtype.is_scalable, "literals")
        case _:
            pass
    return coding
