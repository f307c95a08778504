"""Activation ranges: what the int8 graph needs to know of the data.

The float file runs over the calibration inputs one by one, and each tensor's values go into a
histogram that widens as they come, so one pass over any iterable is enough and nothing is stored.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchclust.export.graph import Graph
from torchclust.export.runner import Runner
from torchclust.progress import track

Array: TypeAlias = npt.NDArray[Any]
Sample: TypeAlias = tuple[Tensor, ...]
Range: TypeAlias = tuple[float, float]
Ranges: TypeAlias = Literal["minmax", "percentile", "mse"]

RANGES = ("minmax", "percentile", "mse")
_BINS = 2048
_LEAST_RANGE = 1e-9  # what the quantizer itself takes for none
_LEAST_BOUNDED = 1e-6  # below it the end of a ReLU6 is more than 2^31 steps away
_OUTLIERS = 1e-4  # "percentile" leaves out this share of the values, on each side
_CLIPPINGS = 64  # how many clipping points "mse" tries on each side


def check(calibration: object, call: str) -> None:
    """Refuse what is no calibration data; ``call`` is the line that the user meant to type."""
    if calibration is None:
        raise ValueError(f"an int8 file needs calibration data, got None:  {call}")
    if isinstance(calibration, Mapping) or not isinstance(calibration, Iterable | Sized):
        raise TypeError(
            "calibration must be an iterable of batches, such as a list or a DataLoader, got "
            f"{type(calibration).__name__}. A single batch goes into a list:  calibration=[batch]"
        )


def draw(
    calibration: Iterable[Any], example: Sequence[Tensor], keys: tuple[str, ...] | None
) -> Iterable[Sample]:
    """`samples` with a progress bar; the first is drawn at once, before any long work."""
    drawn = samples(track(calibration, "Calibrating"), example, keys)
    first = next(drawn, None)
    if first is None:
        raise ValueError(
            "calibration is empty. An iterator that was read before gives nothing any more; pass "
            "a list or a DataLoader"
        )
    return itertools.chain([first], drawn)


def samples(
    calibration: Iterable[Any], example: Sequence[Tensor], keys: tuple[str, ...] | None
) -> Iterator[Sample]:
    """Cut calibration data into single samples shaped like the example inputs.

    Args:
        calibration: any iterable of batches: tensors or arrays, tuples or lists (as many leading
            items as the model has inputs are taken, so the labels of a DataLoader's batches are
            left out), or dicts. A batch may also be one sample without its batch dimension.
        example: the model's inputs, batch 1.
        keys: the inputs' names, if the model takes them by name.

    Raises:
        ValueError, TypeError: NaN or infinity, a shape or a structure that does not fit; the
            message says which batch.
    """
    for number, batch in enumerate(calibration):
        inputs = [
            _like(x, reference, f"calibration batch {number}, input {position}")
            for position, (x, reference) in enumerate(
                zip(_leading(batch, len(example), keys, number), example, strict=True)
            )
        ]
        sizes = {len(x) for x in inputs}
        if len(sizes) > 1:
            raise ValueError(
                f"calibration batch {number}: inputs have different batch sizes {sorted(sizes)}"
            )
        for i in range(sizes.pop()):
            yield tuple(x[i : i + 1] for x in inputs)


def observe(
    content: bytes, graph: Graph, inputs: Iterable[Sequence[Tensor]], method: Ranges
) -> dict[str, Range]:
    """Run the float file and choose every activation's range, ``{tensor name: (min, max)}``.

    Args:
        content, graph: the float file and its parsed form.
        inputs: samples in the file's layout.
        method: ``"minmax"`` covers everything seen; ``"percentile"`` leaves out the outermost
            0.01 % on each side; ``"mse"`` clips where the int8 error is smallest.
    """
    run = Runner(content, keep_all=True, reference=False)
    histograms = {i: Histogram() for i in activations(graph)}
    for sample in inputs:
        run(sample)
        for index, histogram in histograms.items():
            histogram.add(run.tensor(index), count=method != "minmax")
    return {graph.tensors[i].name: h.range(method) for i, h in histograms.items()}


def widen_dead(
    observed: Mapping[str, Range], graph: Graph, inputs: Sequence[str]
) -> dict[str, Range]:
    """Ranges in which a tensor that was always zero has a usable one, [-1, 1].

    A warning names the first of them: an input as the model does, by ``inputs``.

    A recurrent state that starts at zero and a dead ReLU have none of their own; the quantizer
    would give them a step of 4e-12, and every bias behind them would saturate. Of what ends in a
    ReLU6 no kernel takes a step of less than 6 / 2^31.
    """
    bounded = {graph.tensors[i].name for op in graph.operators if op.bounded for i in op.outputs}
    dead = [
        name
        for name, range_ in observed.items()
        if max(map(abs, range_)) < (_LEAST_BOUNDED if name in bounded else _LEAST_RANGE)
    ]
    if dead:
        pairs = zip(inputs, graph.inputs, strict=True)
        which = next((f"input {n!r}" for n, tensor in pairs if tensor.name in dead), repr(dead[0]))
        warnings.warn(
            f"{len(dead)} of the model's tensors are zero for all calibration data, {which} the "
            f"first; they get the range [-1, 1]. Calibrate on data that fill them, such as the "
            f"states of a recurrent network after some steps, or remove a dead branch",
            stacklevel=3,
        )
    return {**observed, **dict.fromkeys(dead, (-1.0, 1.0))}


def limit_roots(observed: Mapping[str, Range], graph: Graph) -> dict[str, Range]:
    """Ranges in which an inverse root ends where its argument's smallest step puts it.

    A vector of zeros in the data has an inverse length of 1e12, which int8 cannot hold beside that
    of any other; what is less than a step is a zero there, whose root is the largest code.
    """
    limited = dict(observed)
    for operator in graph.operators:
        if operator.name == "RSQRT":
            step = max(observed[graph.tensors[operator.inputs[0]].name]) / 255
            name = graph.tensors[operator.outputs[0]].name
            low, high = observed[name]
            limited[name] = low, min(high, step**-0.5) if step > 0 else high
    return limited


def activations(graph: Graph) -> list[int]:
    """Indices of the float tensors that a run computes or is given, in order."""
    return [t.index for t in graph.computed if t.dtype == "float32" and t.data is None]


class Counted:
    """An iterable that counts what it has passed on."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self.count += 1
            yield item


@dataclass
class Histogram:
    """Counts of values in equal bins over [-limit, limit], the limit doubling when needed."""

    low: float = math.inf
    high: float = -math.inf
    limit: float = 0.0
    counts: Array = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def add(self, values: Array, *, count: bool = True) -> None:
        """Take in one tensor's values; without ``count`` only their least and largest."""
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        peak = max(-self.low, self.high)
        if not math.isfinite(peak):
            raise ValueError(
                "calibration made an activation infinite or NaN in the float model. The usual "
                "causes are weights that diverged and masks of infinity: look at "
                "torch.isfinite(model(x)), and mask with a finite number"
            )
        if not count:
            return
        if peak > 0 and self.limit == 0:
            self.limit = 2.0 ** math.ceil(math.log2(peak))
        while self.limit < peak:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(merged, _BINS // 4)
            self.limit *= 2
        if self.limit > 0:
            scaled = (values.reshape(-1) / self.limit + 1) * (_BINS / 2)
            bins = np.clip(scaled.astype(np.int64), 0, _BINS - 1)
            self.counts += np.bincount(bins, minlength=_BINS)

    def range(self, method: Ranges) -> Range:
        """The range to quantize, by the given method."""
        if method == "minmax" or self.limit == 0:
            return self.low, self.high
        low, high = self._percentile() if method == "percentile" else self._least_squares()
        return max(low, self.low), min(high, self.high)

    @property
    def _edges(self) -> Array:
        return np.linspace(-self.limit, self.limit, _BINS + 1)

    def _percentile(self) -> Range:
        share = np.cumsum(self.counts) / self.counts.sum()
        first = int(np.searchsorted(share, _OUTLIERS, side="right"))
        last = int(np.searchsorted(share, 1 - _OUTLIERS))
        return float(self._edges[first]), float(self._edges[last + 1])

    def _least_squares(self) -> Range:
        """Clip each side in turn where rounding plus clipping costs least, other side fixed."""
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        steps = np.linspace(1 / _CLIPPINGS, 1, _CLIPPINGS)
        for _ in range(2):
            high = min((high * s for s in steps), key=lambda h: self._error(low, h))
            low = min((low * s for s in steps), key=lambda v: self._error(v, high))
        return low, high

    def _error(self, low: float, high: float) -> float:
        if high <= low:
            return math.inf
        centres = (self._edges[1:] + self._edges[:-1]) / 2
        step = (high - low) / 255
        beyond = centres - np.clip(centres, low, high)
        return float(self.counts @ (beyond**2 + np.where(beyond == 0, step**2 / 12, 0)))


def _leading(batch: Any, count: int, keys: tuple[str, ...] | None, number: int) -> Sequence[Any]:
    """The model's inputs out of a batch: by name, or the leading items, labels left out."""
    if isinstance(batch, Mapping):
        missing = [k for k in keys or () if k not in batch]
        if keys is None or missing:
            raise ValueError(
                f"calibration batch {number} is a dict with {', '.join(map(repr, batch))}; "
                + (
                    f"the model also takes {', '.join(map(repr, missing))}"
                    if missing
                    else "give example_inputs as a dict too, so that names are known"
                )
            )
        return [batch[k] for k in keys]
    if isinstance(batch, (list, tuple)):
        if batch and isinstance(batch[0], (list, tuple, Mapping)):  # ((x1, x2), y)
            return _leading(batch[0], count, keys, number)
        if len(batch) < count:
            raise ValueError(
                f"calibration batch {number} has {len(batch)} items, the model has {count} inputs"
            )
        return batch[:count]
    if count != 1:
        raise ValueError(
            f"calibration batch {number} is one {type(batch).__name__}, "
            f"the model has {count} inputs"
        )
    return [batch]


def _like(value: Any, reference: Tensor, where: str) -> Tensor:
    """A calibration input as a CPU tensor of the reference's dtype and rank, batch first."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise TypeError(f"{where}: expected a tensor or an array, got {type(value).__name__}")
    given = torch.as_tensor(value).detach()
    if given.is_floating_point() and not reference.is_floating_point():
        raise TypeError(
            f"{where} holds {given.dtype}, the example input {reference.dtype}; calibrate on what "
            f"the model takes"
        )
    x = given.to("cpu", reference.dtype)
    if x.ndim == reference.ndim - 1:
        x = x.unsqueeze(0)
    if x.ndim != reference.ndim or x.shape[1:] != reference.shape[1:]:
        raise ValueError(
            f"{where} has shape {tuple(x.shape)}, the example input {tuple(reference.shape)}; "
            f"all but the batch dimension must agree"
        )
    if x.is_floating_point() and not torch.isfinite(x).all():
        raise ValueError(f"{where} holds NaN or infinity; calibrate on clean inputs")
    return x
