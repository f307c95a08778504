"""The trained codes against those that the compiler was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchclust.export.backends import ExportError
from torchclust.export.clustered import Placed, WeightT
from torchclust.export.codes import Array, most_codes
from torchclust.export.executorch.tosa import TosaWeight
from torchclust.export.verify import TensorRow


def check_codes(
    weights: Sequence[TosaWeight], placed: Sequence[Placed[WeightT]]
) -> tuple[TensorRow, ...]:
    """Compare every clustered tensor with the weights of the TOSA files that Vela was given.

    Raises:
        ExportError: a tensor is not on the NPU, or has other codes than were trained.
    """
    return tuple(_check(p, weights) for p in placed)


def _check(placed: Placed[WeightT], weights: Sequence[TosaWeight]) -> TensorRow:
    matched, trained = placed.matched, placed.matched.trained
    pieces = _pieces(matched.codes, weights)
    alike = [w for w in weights if w.matrix.shape == matched.codes.shape]
    if not pieces and alike:
        raise ExportError(
            f"{trained.name!r} has {most_codes(alike[0].matrix, matched.groups)} codes in the TOSA "
            f"file for {trained.n_clusters} clusters, and other ones than were trained: the "
            f"backend did not keep the scales it was given. Please report this with the model"
        )
    if not pieces:
        raise ExportError(
            f"{trained.name!r} {trained.weight.shape} is in no part that runs on the NPU: its "
            f"layer is left to the CPU.\n"
            f'Leave it out:  cluster_(model, {{"*": {trained.n_clusters}, "{trained.name}": None}})'
        )
    return TensorRow(
        trained.name,
        ";".join(dict.fromkeys(piece.name for piece in pieces)),
        pieces[0].shape,
        trained.n_clusters,
        most_codes(matched.codes, matched.groups),
        True,
    )


def _pieces(codes: Array, weights: Sequence[TosaWeight]) -> list[TosaWeight]:
    """The weights that hold these codes: one, or one per group of a grouped convolution."""
    sizes = {len(w.matrix) for w in weights if w.matrix.shape[1] == codes.shape[1]}
    for rows in sorted(sizes, reverse=True):
        blocks = np.split(codes, len(codes) // rows) if len(codes) % rows == 0 else []
        found = [[w for w in weights if np.array_equal(w.matrix, block)] for block in blocks]
        if found and all(found):
            return [same[0] for same in found]
    return []
