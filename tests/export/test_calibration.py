"""Calibration data in every form, and the ranges that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from torchclust.export.calibration import Histogram, samples
from torchclust.progress import track

X = torch.arange(4 * 2 * 3, dtype=torch.float32).view(4, 2, 3)
V = torch.arange(20, dtype=torch.float32).view(4, 5)
LABELS = torch.arange(4)
EXAMPLE = X[:1]


class Items(Dataset[Any]):
    """Map-style: it has a length, and would give items for ever."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index % len(X)], LABELS[index % len(X)]


class Stream(IterableDataset[Any]):
    """A DataLoader of it has a length that raises TypeError."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, LABELS, strict=True))


def cut(calibration: Iterable[Any], *example: Tensor, keys: Any = None) -> list[tuple[Tensor, ...]]:
    return list(samples(track(calibration, ""), example or (EXAMPLE,), keys))


@pytest.mark.parametrize(
    "calibration",
    [
        [X],
        [X[:3], X[3:]],
        list(X),
        [x.numpy() for x in X],
        [X.double()],
        [(X, LABELS)],
        [[X, LABELS, None]],
        DataLoader(TensorDataset(X, LABELS), batch_size=3),
        TensorDataset(X, LABELS),
        Items(),
        Stream(),
        DataLoader(Stream(), batch_size=3),
        (x for x in X),
        [((X, V), LABELS)],
    ],
    ids=lambda c: type(c).__name__,
)
def test_one_input_comes_out_sample_by_sample(calibration: Iterable[Any]) -> None:
    found = cut(calibration)
    assert len(found) == 4
    assert all(x.shape == EXAMPLE.shape and x.dtype == EXAMPLE.dtype for (x,) in found)
    torch.testing.assert_close(torch.cat([x for (x,) in found]), X)


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        ((X, V), None),
        ((X, V, LABELS), None),
        (((X, V), LABELS), None),
        ({"v": V, "x": X, "label": LABELS}, ("x", "v")),
        (({"v": V, "x": X}, LABELS), ("x", "v")),
    ],
)
def test_several_inputs_by_place_and_by_name(batch: Any, keys: tuple[str, ...] | None) -> None:
    found = cut([batch], EXAMPLE, V[:1], keys=keys)
    torch.testing.assert_close(torch.cat([x for x, _ in found]), X)
    torch.testing.assert_close(torch.cat([v for _, v in found]), V)


@pytest.mark.parametrize(
    ("calibration", "error", "match"),
    [
        ([X, X * float("nan")], ValueError, r"batch 1, input 0 holds NaN or infinity"),
        ([X / 0], ValueError, r"batch 0, input 0 holds NaN or infinity"),
        ([torch.ones(2, 2, 4)], ValueError, r"shape \(2, 2, 4\), the example input \(1, 2, 3\)"),
        ([torch.ones(7)], ValueError, r"shape \(7,\), the example input \(1, 2, 3\)"),
        (["x"], TypeError, r"batch 0, input 0: expected a tensor or an array, got str"),
        ([{"x": X}], ValueError, r"dict with 'x'; give example_inputs as a dict too"),
    ],
)
def test_what_does_not_fit_is_refused(
    calibration: list[Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        cut(calibration)


@pytest.mark.parametrize(
    ("batch", "keys", "match"),
    [
        (X, None, r"batch 0 is one Tensor, the model has 2 inputs"),
        ((X,), None, r"batch 0 has 1 items, the model has 2 inputs"),
        ({"x": X}, ("x", "v"), r"dict with 'x'; the model also takes 'v'"),
        ((X, V[:2]), None, r"batch 0: inputs have different batch sizes \[2, 4\]"),
    ],
)
def test_missing_inputs_are_refused(batch: Any, keys: tuple[str, ...] | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cut([batch], EXAMPLE, V[:1], keys=keys)


def filled(*tensors: np.ndarray[Any, Any]) -> Histogram:
    histogram = Histogram()
    for values in tensors:
        histogram.add(values.astype(np.float32))
    return histogram


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("order", [1, -1])
def test_minmax_and_percentile(scale: float, order: int) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=20_000) * s * scale for s in (0.01, 1, 3)][::order]
    everything = np.concatenate(parts)
    histogram = filled(*parts)
    assert histogram.counts.sum() == everything.size
    np.testing.assert_allclose(
        histogram.range("minmax"), (everything.min(), everything.max()), rtol=1e-6
    )
    width = 2 * histogram.limit / len(histogram.counts)
    expected = np.quantile(everything, [1e-4, 1 - 1e-4])
    np.testing.assert_allclose(histogram.range("percentile"), expected, atol=2 * width)


def test_a_histogram_that_grew_equals_one_made_at_once() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=5_000).astype(np.float32) * s for s in (0.01, 0.7, 40)]
    grown = filled(*parts)
    edges = np.linspace(-grown.limit, grown.limit, len(grown.counts) + 1)
    at_once, _ = np.histogram(np.concatenate(parts), edges)
    np.testing.assert_array_equal(grown.counts, at_once)


def quantization_error(values: np.ndarray[Any, Any], low: float, high: float) -> float:
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / 255
    back = np.clip(np.rint((values - low) / step), 0, 255) * step + low
    return float(((values - back) ** 2).mean())


@pytest.mark.parametrize("one_sided", [False, True])
def test_mse_clips_where_int8_loses_least(one_sided: bool) -> None:
    rng = np.random.default_rng(0)
    values = rng.laplace(size=1_000_000).astype(np.float32)
    values = np.abs(values) if one_sided else values
    values[0] = 60  # an outlier that would cost everybody else resolution
    low, high = filled(values).range("mse")
    assert values.min() <= low < high < 60
    chosen = quantization_error(values, low, high)
    grid = [
        quantization_error(values, bottom, top)
        for bottom in ([0.0] if one_sided else np.linspace(values.min(), -4, 8))
        for top in np.linspace(5, 60, 12)
    ]
    assert chosen < 1.02 * min(grid)
    assert chosen < 0.8 * quantization_error(values, float(values.min()), 60)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_a_constant_zero_has_a_range(method: Any) -> None:
    assert filled(np.zeros(9)).range(method) == (0, 0)


def test_an_infinite_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made an activation infinite or NaN"):
        filled(np.array([1.0, np.inf]))
