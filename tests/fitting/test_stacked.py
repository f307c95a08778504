"""Many small fits in one pass give what each gives alone, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchclust.fitting import stacked
from torchclust.fitting.codebook import fit_codebook
from torchclust.fitting.stacked import fit_stacked

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rows(length: int, dtype: torch.dtype) -> Tensor:
    """Normal ones; one with ties, one of zeros, one tiny, one with an outlier, one huge."""
    drawn = torch.Generator().manual_seed(length)
    found = torch.randn(9, length, dtype=torch.float64, generator=drawn)
    found[1] = (found[1] * 3).round() / 3
    found[2] = 0
    found[3] *= 1e-4
    found[4, 0] = 1e4
    found[5] = found[5].exp()
    if dtype in (torch.float32, torch.float64):
        found[6] *= 1e30
        found[7] *= 1e-38
    return found.to(dtype)


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 9, 40, 257, 500])
def test_every_row_is_fitted_as_if_alone(length: int, dtype: torch.dtype, k: int) -> None:
    compare(rows(length, dtype), k)


@pytest.mark.parametrize(("length", "k"), [(256, 33), (4096, 7), (4100, 7)])
def test_where_methods_change(length: int, k: int) -> None:
    compare(rows(length, torch.float32)[:4], k)


def compare(given: Tensor, k: int) -> None:
    centroids, indices = fit_stacked(given, k)
    assert (centroids.dtype, indices.dtype) == (given.dtype, torch.uint8)
    assert indices.shape == given.shape
    for row, own, taken in zip(given, centroids, indices, strict=True):
        alone = fit_codebook(row, k)
        count = len(alone.centroids)
        assert torch.equal(own[:count], alone.centroids)
        assert bool((own[count:] == own[count - 1]).all())
        assert torch.equal(taken, alone.indices)


def test_most_rows_are_fitted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[Tensor] = []

    def counted(values: Tensor, k: int) -> object:
        alone.append(values)
        return fit_codebook(values, k)

    monkeypatch.setattr(stacked, "fit_codebook", counted)
    fit_stacked(rows(300, torch.float32), 16)
    assert len(alone) == 2  # ties, and zeros


def test_blocks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(64, 300)
    before = fit_stacked(given, 16)
    monkeypatch.setattr(stacked, "_AT_ONCE", 700)
    monkeypatch.setattr("torchclust.fitting.threads.WORTHWHILE", 10_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        after = fit_stacked(given, 16)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
