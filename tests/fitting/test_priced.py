"""Codebooks when a bit costs: against every partition, against ECVQ, and what a row is worth."""

import itertools

import numpy as np
import pytest
import torch
from draws import draw
from numpy.typing import NDArray

from torchclust import fit_codebook
from torchclust.fitting.codebook import Codebook
from torchclust.fitting.integer_codebook import IntegerCodebook, fit_integer_codebook
from torchclust.fitting.nearest import priced_midpoints

Array = NDArray[np.float64]


def cost(book: Codebook | IntegerCodebook, values: Array, rate: float, weights: Array) -> float:
    """Inertia plus the price of the indices' entropy, in squared units."""
    counts = np.bincount(book.indices.numpy().ravel())
    return book.inertia + price(values, rate, weights) * bits(counts[counts > 0])


def price(values: Array, rate: float, weights: Array) -> float:
    mean = np.average(values, weights=weights)
    return rate * float((weights * (values - mean) ** 2).sum()) / values.size


def bits(counts: NDArray[np.int64]) -> float:
    return float((counts * np.log2(counts.sum() / counts)).sum())


def least_cost(values: Array, k: int, rate: float, weights: Array, pinned: bool) -> float:
    """Of every partition of ascending values into at most k runs, written out."""
    starts = [i for i in range(1, len(values)) if values[i] > values[i - 1]]
    if pinned and not (values == 0).any():  # an empty run of zeros takes one of the k
        k -= 1
    of_bit, best = price(values, rate, weights), np.inf
    for cuts in itertools.chain(*(itertools.combinations(starts, n) for n in range(k))):
        edges = [0, *cuts, len(values)]
        counts = np.diff(edges)
        squares, may_be_zero = [], []
        for low, high in itertools.pairwise(edges):
            run, of_run = values[low:high], weights[low:high]
            squares.append(float((of_run * (run - np.average(run, weights=of_run)) ** 2).sum()))
            zero = (run[0] <= 0 <= run[-1]) or not (values == 0).any()
            may_be_zero.append(float((of_run * run**2).sum()) if zero else np.inf)
        total = sum(squares)
        if pinned:
            gain = min(z - s for z, s in zip(may_be_zero, squares, strict=True))
            signs = [
                np.sign(values[low]) == np.sign(values[high - 1])
                for low, high in itertools.pairwise(edges)
            ]
            total = total if not (values == 0).any() and all(signs) else total + gain
        best = min(best, total + of_bit * bits(counts))
    return best


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("weighted", [False, True])
def test_is_the_cheapest_of_all_partitions(seed: int, weighted: bool) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(np.round(rng.standard_normal(rng.integers(2, 11)), rng.integers(0, 3)))
    weights = rng.exponential(size=len(values)) if weighted else np.ones(len(values))
    rate, k = float(10 ** rng.uniform(-3, 0.3)), int(rng.integers(2, 6))
    book = fit_codebook(values, k, rate=rate, importance=weights)
    least = least_cost(values, k, rate, weights, pinned=False)
    assert cost(book, values, rate, weights) == pytest.approx(least, rel=1e-9)
    assert len(book.centroids) == len(book.indices.unique()) <= k


@pytest.mark.parametrize("seed", range(30))
def test_zeros_keep_their_centroid_and_their_price(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.sort(np.append(np.round(rng.standard_normal(8), 1), [0.0] * rng.integers(1, 4)))
    rate, k, ones = float(10 ** rng.uniform(-3, 0.3)), int(rng.integers(3, 6)), np.ones(len(values))
    book = fit_codebook(values, k, rate=rate, preserve_sparsity=True)
    least = least_cost(values, k, rate, ones, pinned=True)
    assert cost(book, values, rate, ones) == pytest.approx(least, rel=1e-9)
    assert (book.centroids[book.indices.int()][values == 0] == 0).all()


@pytest.mark.parametrize("kind", ["gauss", "laplace", "mixed", "pruned", "two modes", "tied"])
@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
def test_no_start_of_lloyds_steps_ends_lower(kind: str, rate: float) -> None:
    values = draw(kind, 5_000, seed=3)
    ones = np.ones(len(values))
    least = cost(fit_codebook(values, 12, rate=rate), values, rate, ones)
    for init, seed in [("linear", 0), ("density", 0), *(("random", s) for s in range(3))]:
        book = fit_codebook(values, 12, init=init, rate=rate, seed=seed)
        assert least <= cost(book, values, rate, ones) * (1 + 1e-5)


def test_a_higher_price_buys_fewer_bits_for_more_error() -> None:
    values = draw("laplace", 3_000)
    books = [fit_codebook(values, 16, rate=rate) for rate in (0.0, 0.01, 0.1, 1.0, 10.0)]
    entropies = [bits(b.indices.unique(return_counts=True)[1].numpy()) for b in books]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] == 0
    assert [b.inertia for b in books] == sorted(b.inertia for b in books)
    assert len(books[-1].centroids) == 1


def test_price_zero_is_plain_k_means() -> None:
    values = torch.from_numpy(draw("mixed", 2_000)).float()
    plain, priced = fit_codebook(values, 9), fit_codebook(values, 9, rate=0)
    assert torch.equal(plain.centroids, priced.centroids)
    assert torch.equal(plain.indices, priced.indices)
    assert plain.inertia == priced.inertia
    least = fit_codebook(values, 9, rate=1e-12)
    assert least.inertia == pytest.approx(plain.inertia, rel=1e-4)


def test_seeds_are_kept_without_steps() -> None:
    book = fit_codebook(torch.arange(11.0), 5, init="linear", max_iter=0, rate=0.1)
    assert book.centroids.tolist() == [0, 2.5, 5, 7.5, 10]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_centroids_that_round_to_one_value_are_one(dtype: torch.dtype) -> None:
    values = (1 + torch.randn(500, generator=torch.Generator().manual_seed(0)) / 300).to(dtype)
    book = fit_codebook(values, 16, rate=0.01)
    assert (book.centroids[1:] > book.centroids[:-1]).all()
    assert int(book.indices.max()) < len(book.centroids)


@pytest.mark.parametrize(("k", "rate"), [(9, 1e-3), (600, 1e-5)])
def test_many_distinct_values_and_many_clusters(k: int, rate: float) -> None:
    values = draw("gauss", 20_000)
    ones = np.ones(len(values))
    priced, plain = fit_codebook(values, k, rate=rate), fit_codebook(values, k)
    assert cost(priced, values, rate, ones) < cost(plain, values, rate, ones)


def test_cells_are_where_distance_and_price_say() -> None:
    """Every boundary against the argmin written out, dead centroids among them."""
    generator = torch.Generator().manual_seed(5)
    centroids = torch.randn(9, generator=generator).double().sort().values
    lengths = torch.rand(9, generator=generator).double() * 8
    values = torch.linspace(-4, 4, 2001).double()
    prices = torch.tensor([0.0, 0.01, 0.1, 1.0]).double()
    limits = priced_midpoints(centroids, lengths, prices)
    for bound, of_bit in zip(limits, prices, strict=True):
        costs = (values[:, None] - centroids) ** 2 + of_bit * lengths
        taken = (values[:, None] > bound).sum(1)
        paid = costs.gather(1, taken[:, None]).squeeze(1)
        assert torch.allclose(paid, costs.min(1).values, rtol=0, atol=1e-12)


def in_int8(weight: torch.Tensor, rate: float) -> tuple[IntegerCodebook, float]:
    book = fit_integer_codebook(weight, 15, rate=rate)
    values = weight.double().numpy()
    return book, cost(book, values, rate, np.ones_like(values))


@pytest.mark.parametrize("rate", [0.003, 0.03, 0.3])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_int8_codes_cost_less_than_unpriced_ones(rate: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(32, 200, generator=generator)
    weight *= (spread * torch.randn(32, 1, generator=generator)).exp()
    _, priced = in_int8(weight, rate)
    values = weight.double().numpy()
    plain = cost(fit_integer_codebook(weight, 15), values, rate, np.ones_like(values))
    assert priced < plain * (0.99 if rate > 0.01 else 1.0)


def test_int8_rows_of_noise_become_zeros() -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 300, generator=generator)
    weight[5:] *= 1e-9
    book, _ = in_int8(weight, 0.01)
    codes = book.codes[book.indices.int()]
    assert (codes[5:] == 0).all()
    assert (codes[:5] != 0).float().mean() > 0.8
    assert (fit_integer_codebook(weight, 15).indices[5:] != 7).any()  # without a price they cost


def test_int8_zero_is_zero_at_any_price() -> None:
    weight = torch.ones(4, 50)
    weight[:, ::25] = 0
    for rate in (0.01, 1.0, 100.0):
        book, _ = in_int8(weight, rate)
        assert (book.codes[book.indices.int()][:, ::25] == 0).all()


def test_int8_with_importance_and_seeds() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 100, generator=generator)
    importance = torch.rand(16, 100, generator=generator)
    for init in ("optimal", "linear"):
        book = fit_integer_codebook(weight, 15, init=init, importance=importance, rate=0.2)
        plain = fit_integer_codebook(weight, 15, init=init, importance=importance)
        counts, before = (b.indices.unique(return_counts=True)[1].numpy() for b in (book, plain))
        assert bits(counts) < 0.7 * bits(before)


@pytest.mark.parametrize("fit", [fit_codebook, fit_integer_codebook])
def test_refuses_what_is_no_price(fit: object) -> None:
    assert callable(fit)
    for rate in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rate must be finite and at least 0, got"):
            fit(torch.randn(4, 4), 3, rate=rate)
    for wrong in ("0.1", True, None):
        with pytest.raises(TypeError, match=r"rate must be a number, got"):
            fit(torch.randn(4, 4), 3, rate=wrong)


@pytest.mark.parametrize("init", ["optimal", "linear", "density", "kmeans++", "random"])
@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_zeros_stay_zeros_at_any_price(init: str, rate: float, weighted: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(2000)
    values[:20] = 0
    importance = torch.rand(2000) if weighted else None
    if importance is not None:
        importance[:10] = 0  # and are then not among the values that are fitted
    book = fit_codebook(
        values, 16, init=init, rate=rate, preserve_sparsity=True, importance=importance
    )
    assert not book.centroids[book.indices.long()][:20].any()
    assert book.centroids.unique().numel() == book.centroids.numel()


def test_a_zero_that_nothing_weighs_is_a_zero() -> None:
    book = fit_codebook([0.0, 1.0], 4, rate=0.1, preserve_sparsity=True, importance=[0.0, 1.0])
    assert book.centroids[book.indices.long()].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("init", ["linear", "density", "kmeans++", "random"])
def test_few_distinct_values_are_where_a_price_begins(init: str) -> None:
    book = fit_codebook([1.0, 1.0, 2.0, 2.0], 4, init=init, rate=0.1)
    assert book.centroids.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("fit", [fit_codebook, fit_integer_codebook])
@pytest.mark.parametrize("init", ["optimal", "linear"])
def test_a_price_counts_in_the_units_of_importance(fit: object, init: str) -> None:
    """Fisher information is tiny, second moments are anything: the rate means the same."""
    assert callable(fit)
    torch.manual_seed(0)
    weight = torch.randn(64, 32)
    importance = torch.rand(64, 32) + 0.1
    books = [
        fit(weight, 15, rate=0.05, init=init, importance=importance * unit)
        for unit in (1.0, 2**-20, 2**20)  # no rounding
    ]
    assert all(torch.equal(book.indices, books[0].indices) for book in books)
    assert 5 < books[0].indices.unique().numel() < 15
