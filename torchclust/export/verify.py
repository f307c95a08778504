"""Checking a written file: its codes against the trained ones, its outputs against the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from torchclust.export.backends import ExportError
from torchclust.export.calibration import Sample
from torchclust.export.clustered import Placed
from torchclust.export.codes import most_codes
from torchclust.export.graph import Array, Graph, Weight
from torchclust.export.layout import Prepared

# Float inputs in the file's layout to float outputs, one sample at a time.
Answering: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Array]]

# Reference kernels are slow (some 0.1 G multiplications a second), and a few dozen samples tell.
_MOST_SAMPLES = 64
_MOST_MACS = 2e9
_EVERY = 8  # a sample out of so many is kept from calibration, to be honest about the file's noise


@dataclass(frozen=True)
class TensorRow:
    """One clustered parameter in the file.

    Attributes:
        parameter: its name in the model.
        name: the tensor's name in the file.
        shape: in the file's layout.
        n_clusters: most codes per codebook.
        int8_codes: distinct codes in the file; with one codebook per channel or group, those of
            the codebook that has most. None in a float file.
        codes_match: every code equals the trained one, up to a channel's sign. None in a float
            file.
    """

    parameter: str
    name: str
    shape: tuple[int, ...]
    n_clusters: int
    int8_codes: int | None
    codes_match: bool | None


@dataclass(frozen=True)
class Agreement:
    """How a file's outputs compare with the float model's, see `TFLiteExport`."""

    sqnr_db: float | None
    top1: float | None
    samples: int


def check_codes(graph: Graph, placed: Sequence[Placed[Weight]]) -> tuple[TensorRow, ...]:
    """Count the codes of every clustered tensor of an int8 file, and compare them.

    Raises:
        ExportError: a tensor has more codes than clusters, other codes than were trained, or was
            left in float.
    """
    by_name = {weight.tensor.name: weight for weight in graph.weights()}
    return tuple(_check(p, by_name.get(p.weight.tensor.name)) for p in placed)


def _check(placed: Placed[Weight], weight: Weight | None) -> TensorRow:
    matched, trained = placed.matched, placed.matched.trained
    if weight is None or weight.tensor.dtype != "int8":
        raise ExportError(
            f"{trained.name!r} ({placed.weight.operator.name}) is not int8 in the file: the "
            f"quantizer leaves this operator in float.\n"
            f'Leave it out:  cluster_(model, {{"*": {trained.n_clusters}, "{trained.name}": None}})'
        )
    codes = most_codes(weight.matrix, matched.groups)
    same = bool(np.array_equal(weight.matrix, matched.codes))
    if codes > trained.n_clusters or not same:
        raise ExportError(
            f"{trained.name!r} has {codes} codes in the written file for {trained.n_clusters} "
            f"clusters{'' if same else ', and other ones than were trained'}: the quantizer did "
            f"not keep the scales it was given. Please report this with the model"
        )
    return TensorRow(
        trained.name, weight.tensor.name, weight.tensor.shape, trained.n_clusters, codes, same
    )


def most_samples(macs: float) -> int:
    """How many samples of so many multiplications reference kernels run in a bearable time."""
    return int(np.clip(_MOST_MACS / max(1, macs), 2, _MOST_SAMPLES))


class Comparison:
    """The float model's answers to samples that calibration does not see, and a file's."""

    def __init__(self, prepared: Prepared, most: int) -> None:
        self._prepared = prepared
        self._first: list[Sample] = []
        self._held_out: list[Sample] = []
        self._most = most

    def collect(self, samples: Iterable[Sample]) -> Iterator[tuple[Tensor, ...]]:
        """Pass samples on in the file's layout, but for every eighth, which is held out."""
        for number, sample in enumerate(samples, 1):
            if number % _EVERY == 0 and len(self._held_out) < self._most:
                self._held_out.append(sample)
                continue
            if len(self._first) < self._most:
                self._first.append(sample)
            yield self._prepared.to_file_layout(sample)

    def keep(self, most: int) -> None:
        """Of the samples that came, compare no more than this."""
        del self.samples[most:]

    @property
    def first(self) -> Sample:
        """The first sample that came, in the model's layout."""
        return self._first[0]

    @property
    def samples(self) -> list[Sample]:
        """Those to compare on: held out, or the first ones where all are too few."""
        return self._held_out or self._first

    def run(self, ready: Callable[[], Answering]) -> Agreement:
        """Compare with what computes as the file does, made ready if there are samples at all."""
        kept = self.samples
        if not kept:
            return Agreement(None, None, 0)
        runner = ready()
        pairs = [
            (
                [y.numpy() for y in self._prepared.reference(s)],
                runner(self._prepared.to_file_layout(s)),
            )
            for s in kept
        ]
        outputs = range(len(pairs[0][0]))
        noise = [sqnr([(want[i], got[i]) for want, got in pairs]) for i in outputs]
        top1 = None
        if pairs[0][0][0].ndim == 2 and pairs[0][0][0].shape[1] > 1:
            top1 = float(np.mean([want[0].argmax() == got[0].argmax() for want, got in pairs]))
        return Agreement(min(noise), top1, len(pairs))


def sqnr(pairs: Sequence[tuple[Array, Array]]) -> float:
    """Signal to noise of pairs (wanted, got), in decibels; infinities that agree count for none."""
    signal = noise = 0.0
    for want, got in pairs:
        unlike = want != got
        noise += float(np.square(want[unlike].astype(np.float64) - got[unlike]).sum())
        signal += float(np.square(want[np.isfinite(want)], dtype=np.float64).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def multiplications(graph: Graph) -> float:
    """Multiplications of one run, as far as weights tell: elements of output x inputs of each."""
    total = 0.0
    for weight in graph.weights():
        for operator in graph.users(weight.tensor):
            rows, columns = weight.matrix.shape
            total += math.prod(graph.tensors[operator.outputs[0]].shape) / rows * rows * columns
    return total
