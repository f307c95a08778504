"""Codebooks against independent references: exhaustive search, kmeans1d, Fractions, plain loops."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import kmeans1d
import numpy as np
import pytest
import torch
from draws import draw
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchclust.fitting import arguments
from torchclust.fitting.codebook import Codebook, fit_codebook
from torchclust.fitting.nearest import assign, count_below, count_below_in_units
from torchclust.fitting.threads import WORTHWHILE

INITS = ["optimal", "linear", "density", "random", "kmeans++"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- references --------------------------------------------------------------------------------


def reconstructed(book: Codebook) -> np.ndarray[Any, np.dtype[np.float64]]:
    return book.centroids.double().numpy()[book.indices.numpy()]


def error_of(book: Codebook, values: Any, importance: Any = 1.0) -> float:
    """The inertia by its definition, from centroids and indices alone."""
    return float(
        (importance * (np.asarray(values, dtype=np.float64) - reconstructed(book)) ** 2).sum()
    )


def kmeans1d_error(values: np.ndarray[Any, Any], k: int) -> float:
    found = kmeans1d.cluster(values, k)
    fitted = np.array(found.centroids)[np.array(found.clusters)]
    return float(((values - fitted) ** 2).sum())


def exact_least_error(values: list[float], weights: list[float], k: int) -> Fraction:
    """The least weighted error of any partition into at most k parts, in rational arithmetic."""
    pairs = sorted((Fraction(v), Fraction(w)) for v, w in zip(values, weights, strict=True))
    n = len(pairs)

    def error(part: list[tuple[Fraction, Fraction]]) -> Fraction:
        total = sum(w for _, w in part)
        if not total:
            return Fraction(0)
        mean = sum(v * w for v, w in part) / total
        return sum((w * (v - mean) ** 2 for v, w in part), Fraction(0))

    cuts = itertools.combinations(range(1, n), min(k, n) - 1)
    return min(
        sum((error(pairs[a:b]) for a, b in itertools.pairwise((0, *cut, n))), Fraction(0))
        for cut in cuts
    )


def quadratic_least_error(
    values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any], k: int
) -> float:
    """The textbook O(k n^2) dynamic programme, every cost by a second pass."""
    order = np.argsort(values)
    v, w = values[order], weights[order]
    n = len(v)
    cost = np.zeros((n + 1, n + 1))
    for a in range(n):
        for b in range(a + 1, n + 1):
            mean = np.average(v[a:b], weights=w[a:b])
            cost[a, b] = (w[a:b] * (v[a:b] - mean) ** 2).sum()
    best = cost[0].copy()
    for _ in range(k - 1):
        best = np.array([min(best[a] + cost[a, b] for a in range(b + 1)) for b in range(n + 1)])
    return float(best[n])


KINDS = [
    "gauss", "uniform", "laplace", "cauchy", "mixed",
    "pruned", "tied", "two modes", "far from 0", "one outlier",
]  # fmt: skip


# --- the optimum -------------------------------------------------------------------------------

halves = st.floats(width=16, allow_nan=False, allow_infinity=False)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(halves, min_size=1, max_size=8),
    k=st.integers(2, 5),
    exponent=st.integers(-900, 900),
    data=st.data(),
)
def test_optimal_is_the_least_error_of_all_partitions(
    values: list[float], k: int, exponent: int, data: st.DataObject
) -> None:
    weight = st.sampled_from([0.0, 1e-300, 1e-30, 0.5, 1.0, 3.0, 1e30, 1e300])
    weights = data.draw(st.lists(weight, min_size=len(values), max_size=len(values)))
    scaled = np.ldexp(np.array(values), exponent)
    book = fit_codebook(scaled, k, importance=np.array(weights))
    # Fractions: the error and its unit may both be far out of float64's range.
    fitted = [Fraction(c) for c in reconstructed(book)]
    error = sum(
        Fraction(w) * (Fraction(v) - c) ** 2
        for w, v, c in zip(weights, scaled, fitted, strict=True)
    )
    least = exact_least_error(list(scaled), weights, k)
    assert error <= least * (1 + Fraction(1, 10**9)) + sum(map(Fraction, weights)) * max(
        (Fraction(v) ** 2 for v in scaled), default=Fraction(0)
    ) * Fraction(1, 2**104)
    assert error == 0 or least > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [40, 257, 3000])
def test_optimal_equals_kmeans1d_up_to_thousands(kind: str, n: int) -> None:
    values = draw(kind, n)
    for k in (2, 3, 16, 33):
        error = error_of(fit_codebook(values, k), values)
        assert error <= kmeans1d_error(values, k) * (1 + 1e-9) + 1e-20


@pytest.mark.parametrize("kind", KINDS)
def test_optimal_is_within_a_ten_thousandth_beyond(kind: str) -> None:
    values = draw(kind, 30_000)
    for k in (2, 16, 40):
        assert error_of(fit_codebook(values, k), values) <= 1.0001 * kmeans1d_error(values, k)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["laplace", "mixed", "two modes"])
def test_optimal_is_within_a_ten_thousandth_at_many_clusters(kind: str) -> None:
    values = draw(kind, 8000)
    book = fit_codebook(values, 256)
    assert error_of(book, values) <= 1.0001 * kmeans1d_error(values, 256)


def test_optimal_counts_a_repeated_value_and_a_doubled_importance_alike() -> None:
    rng = np.random.default_rng(3)
    for n, k in ((60, 5), (2000, 16), (9000, 16)):
        values, counts = rng.laplace(size=n), rng.integers(1, 5, n)
        repeated = np.repeat(values, counts)
        weighted = error_of(fit_codebook(values, k, importance=counts), values, counts)
        assert weighted == pytest.approx(error_of(fit_codebook(repeated, k), repeated), rel=1e-9)
        assert weighted <= kmeans1d_error(repeated, k) * (1 + (1e-9 if n < 4000 else 1e-4))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_optimal_with_importance_equals_the_textbook(dtype: Any, spread: float) -> None:
    rng = np.random.default_rng(4)
    values = rng.standard_normal(70).astype(dtype)
    importance = np.exp(spread * rng.standard_normal(70)).astype(dtype)
    for k in (2, 5, 11):
        error = error_of(fit_codebook(values, k, importance=importance), values, importance)
        least = quadratic_least_error(values.astype(np.float64), importance.astype(np.float64), k)
        assert error <= least * (1 + (1e-9 if dtype == np.float64 else 1e-6))


def test_the_pairs_sort_agrees_with_argsort() -> None:
    """float32 pairs are sorted packed, anything else by argsort: the same codebook either way."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal(5000).astype(np.float32)
    values[:100], values[100:200] = 0.0, -0.0
    importance = rng.random(5000).astype(np.float32)
    packed = fit_codebook(values, 9, importance=importance)
    ordinary = fit_codebook(values, 9, importance=importance.astype(np.float64))
    assert torch.equal(packed.centroids, ordinary.centroids)
    assert packed.inertia == pytest.approx(ordinary.inertia, rel=1e-12)


# --- one contract for every init, dtype, size and option ----------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("preserve_sparsity", [False, True])
def test_contract(init: str, dtype: torch.dtype, preserve_sparsity: bool) -> None:
    for (shape, k), max_iter in itertools.product(
        [((), 3), ((1,), 3), ((5, 4), 3), ((30, 40), 16), ((50, 3, 5), 300)], [0, 1, 300]
    ):
        generator = torch.Generator().manual_seed(k)
        values = torch.randn(shape, generator=generator).to(dtype)
        values = values * (values.abs() > 0.3)
        before = values.clone()
        options: dict[str, Any] = {
            "init": init, "max_iter": max_iter, "preserve_sparsity": preserve_sparsity, "seed": 1,
        }  # fmt: skip
        book = fit_codebook(values, k, **options)
        assert torch.equal(values, before)
        assert book.centroids.dtype == dtype
        assert 1 <= len(book.centroids) <= k
        assert (book.centroids.double().diff() > 0).all()
        assert book.indices.shape == values.shape
        assert book.indices.dtype == (torch.uint8 if len(book.centroids) <= 256 else torch.int32)
        assert torch.equal(book.indices, assign(values, book.centroids))
        assert book.inertia == pytest.approx(error_of(book, values.double()), rel=1e-9, abs=1e-30)
        distinct = values.unique()
        if len(distinct) + preserve_sparsity < k:
            assert torch.equal(book.centroids[book.indices.long()], values)
        if preserve_sparsity:
            assert (book.centroids == 0).sum() == 1
            assert (book.centroids[book.indices.long()][values == 0] == 0).all()
        again = fit_codebook(values, k, **options)
        assert torch.equal(again.centroids, book.centroids)
        assert torch.equal(again.indices, book.indices)
        assert again.inertia == book.inertia


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
    k=st.integers(3, 12),
    init=st.sampled_from(INITS),
    preserve_sparsity=st.booleans(),
    max_iter=st.sampled_from([0, 1, 300]),
    weighted=st.booleans(),
)
@example([3.4e38, -3.4e38, 1e-45, 0.0, 1.0], 3, "linear", False, 300, False)
@example([1e-45, 2e-45, 3e-45, 4e-45], 3, "optimal", True, 0, True)
def test_any_finite_float32(
    values: list[float], k: int, init: str, preserve_sparsity: bool, max_iter: int, weighted: bool
) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    book = fit_codebook(
        tensor,
        k,
        init=init,
        max_iter=max_iter,
        preserve_sparsity=preserve_sparsity,
        importance=tensor.abs() if weighted else None,
    )
    assert len(book.centroids) <= k
    assert book.centroids.isfinite().all()
    assert (book.centroids.double().diff() > 0).all()
    assert np.isfinite(book.inertia)
    assert book.inertia >= 0
    away = (tensor.double()[:, None] - book.centroids.double()).abs()
    assert torch.equal(away.min(1).values, away.gather(1, book.indices.long()[:, None])[:, 0])
    if preserve_sparsity:
        assert (book.centroids[book.indices.long()][tensor == 0] == 0).all()


# --- the other inits ---------------------------------------------------------------------------


def test_linear_as_in_the_api() -> None:
    values = torch.arange(11.0)
    plain = fit_codebook(values, 5, init="linear", max_iter=0)
    assert plain.centroids.tolist() == [0, 2.5, 5, 7.5, 10]
    sparse = fit_codebook(values, 5, init="linear", max_iter=0, preserve_sparsity=True)
    assert sparse.centroids.tolist() == [0, 1, 4, 7, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_without_steps(kind: str) -> None:
    values = draw(kind, 500)

    def centroids(init: str, seed: int = 0) -> list[float]:
        return fit_codebook(values, 7, init=init, max_iter=0, seed=seed).centroids.tolist()

    assert centroids("linear") == pytest.approx(np.linspace(values.min(), values.max(), 7))
    quantiles = np.unique(np.quantile(values, np.linspace(0, 1, 7)))
    assert centroids("density") == pytest.approx(quantiles)
    for init in ("random", "kmeans++"):
        assert len(centroids(init)) == 7
        assert set(centroids(init)) <= set(values)
        assert centroids(init, seed=1) != centroids(init)


def test_density_weighs_by_importance() -> None:
    values, counts = np.array([0.0, 1.0, 2.0, 3.0, 4.0]), np.array([1, 1, 996, 1, 1])
    heavy = fit_codebook(values, 4, init="density", max_iter=0, importance=counts)
    assert heavy.centroids.tolist() == pytest.approx([0, 1 + 332 / 498.5, 2 + 166.5 / 498.5, 4])
    flat = fit_codebook(values, 4, init="density", max_iter=0, importance=np.full(5, 7.0))
    assert flat.centroids.tolist() == pytest.approx(np.quantile(values, [0, 1 / 3, 2 / 3, 1]))


def test_seeds_are_drawn_with_the_right_probability() -> None:
    values = np.array([0.0, 0.0, 1.0, 3.0])
    importance = np.array([1.0, 1.0, 4.0, 2.0])
    n = 800

    def share(expected: tuple[float, float], init: str, weights: Any) -> float:
        books = (
            fit_codebook(values, 2, init=init, max_iter=0, importance=weights, seed=seed)
            for seed in range(n)
        )
        return sum(tuple(book.centroids.tolist()) == expected for book in books) / n

    # Forgy: 0 (two of four) first, then 1 (one of the other two); or the other way round.
    assert share((0.0, 1.0), "random", None) == pytest.approx(1 / 4 + 1 / 4 * 2 / 3, abs=0.06)
    # k-means++: a first seed by weight, a second by weight times squared distance.
    first = {0.0: 2 / 8, 1.0: 4 / 8, 3.0: 2 / 8}
    zero_then_one = first[0.0] * 4 * 1 / (4 * 1 + 2 * 9)
    one_then_zero = first[1.0] * 2 * 1 / (2 * 1 + 2 * 4)
    expected = zero_then_one + one_then_zero
    assert share((0.0, 1.0), "kmeans++", importance) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("max_iter", [1, 2, 7, 300])
@pytest.mark.parametrize("weighted", [False, True])
def test_lloyd_steps_equal_a_distance_table(max_iter: int, weighted: bool) -> None:
    values = draw("laplace", 700)
    weights = draw("uniform", 700, seed=9) if weighted else np.ones(700)
    options: dict[str, Any] = {"init": "linear", "importance": weights if weighted else None}
    centroids = fit_codebook(values, 9, max_iter=0, **options).centroids.numpy().copy()
    for _ in range(max_iter):
        nearest = np.abs(values[:, None] - centroids).argmin(axis=1)
        for i in np.unique(nearest):
            mine = nearest == i
            centroids[i] = np.average(values[mine], weights=weights[mine])
    book = fit_codebook(values, 9, max_iter=max_iter, **options)
    assert book.centroids.numpy() == pytest.approx(centroids, rel=1e-9)


# --- sparsity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("negative", "positive", "k", "left", "right"),
    [
        (10, 30, 5, 1, 3),  # in proportion
        (10, 10, 4, 2, 1),  # 1.5 rounds to the even 2
        (50, 30, 5, 2, 2),  # 2.5 rounds to the even 2
        (0, 30, 5, 0, 4),
        (30, 0, 5, 4, 0),
        (1, 400, 5, 0, 4),  # too few to earn one
    ],
)
def test_sides_share_the_centroids_by_count(
    negative: int, positive: int, k: int, left: int, right: int
) -> None:
    values = np.concatenate([-1 - np.arange(negative), np.zeros(7), 1 + np.arange(positive)])
    for init in INITS:
        book = fit_codebook(values, k, init=init, max_iter=0, preserve_sparsity=True)
        assert ((book.centroids < 0).sum(), (book.centroids > 0).sum()) == (left, right)


def test_a_side_with_few_values_leaves_its_share_to_the_other() -> None:
    values = np.concatenate([np.full(900, -2.0), [0.0], 1 + np.arange(100.0)])
    book = fit_codebook(values, 9, preserve_sparsity=True)
    assert ((book.centroids < 0).sum(), (book.centroids > 0).sum()) == (1, 7)


def test_a_codebook_of_zero_alone() -> None:
    book = fit_codebook(torch.zeros(2, 3), 16, preserve_sparsity=True)
    assert book.centroids.tolist() == [0.0]
    assert book.inertia == 0


@pytest.mark.parametrize("kind", ["gauss", "pruned", "mixed", "laplace"])
@pytest.mark.parametrize("n", [60, 1500])
def test_sparsity_preserving_optimum(kind: str, n: int) -> None:
    """Each side is optimal beside a centroid fixed at 0: an independent O(k n^2) programme."""
    values = draw(kind, n, seed=2)
    book = fit_codebook(values, 7, preserve_sparsity=True)
    error = 0.0
    for sign in (-1, 1):
        side = np.sort(values[values * sign > 0] * sign)
        k = int((book.centroids * sign > 0).sum())
        sums = np.stack([np.append(0, np.cumsum(side**p)) for p in range(3)])
        best = sums[2].copy()  # all at 0
        for _ in range(k):
            mass, first, second = sums[:, None, :] - sums[:, :, None]
            cost = np.where(mass > 0, second - first**2 / np.where(mass > 0, mass, 1), np.inf)
            np.fill_diagonal(cost, 0)
            best = (best[:, None] + cost).min(axis=0)
        error += best[-1]
    assert book.inertia == pytest.approx(error, rel=1e-9)


def test_sparsity_preserving_multigrid_is_no_worse_than_without_the_zero_cluster() -> None:
    values = draw("gauss", 40_000)
    book = fit_codebook(values, 16, preserve_sparsity=True)
    sides = sum(
        kmeans1d_error(values[values * sign > 0], int((book.centroids * sign > 0).sum()))
        for sign in (-1, 1)
    )
    assert book.inertia < sides
    assert book.inertia == pytest.approx(error_of(book, values), rel=1e-9)


# --- numerics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "values", [[2.5], [0.0], [0.0] * 9, [2.5] * 9, [-1.0, 3.0] * 5, [-0.0, 0.0, 1.0]], ids=str
)
def test_few_distinct_values_are_kept_as_they_are(
    values: list[float], dtype: torch.dtype, init: str
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    for preserve_sparsity in (False, True):
        book = fit_codebook(tensor, 5, init=init, preserve_sparsity=preserve_sparsity)
        assert torch.equal(book.centroids[book.indices.long()], tensor)
        assert book.inertia == 0
        assert not (torch.signbit(book.centroids) & (book.centroids == 0)).any()


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [(torch.float32, (-140, 0, 118)), (torch.float64, (-1060, 0, 1000)), (torch.float16, (-10, 7))],
)
def test_a_power_of_two_changes_nothing_but_the_scale(
    dtype: torch.dtype, exponents: tuple[int, ...]
) -> None:
    whole = torch.tensor(np.rint(draw("gauss", 6000) * 100)).clamp(-500, 500)
    expected = fit_codebook(whole, 16).indices
    for exponent in exponents:
        values = torch.ldexp(whole, torch.tensor(exponent)).to(dtype)
        book = fit_codebook(values, 16)
        assert book.centroids.isfinite().all()
        assert (book.indices == expected).float().mean() > 0.98  # a centroid rounds to a denormal


def test_half_precision_is_fitted_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.tensor(draw("gauss", 50_000)).to(dtype)
        book = fit_codebook(values, 16)
        wide = fit_codebook(values.float(), 16)
        assert torch.equal(book.centroids, wide.centroids.to(dtype))
        assert book.inertia < 1.01 * wide.inertia


@pytest.mark.slow
def test_more_weights_than_float32_can_count() -> None:
    """Past 2^24 a float32 count stands still: a cluster would be lost, its mean drift to 0."""
    n = (1 << 24) + (1 << 22)
    values = torch.full((n,), 0.1)
    values[: n // 4] = 0.3
    values[-1000:] += torch.linspace(0, 1e-3, 1000)
    values[:1000] -= torch.linspace(0, 1e-3, 1000)
    book = fit_codebook(values, 2)
    assert book.centroids.tolist() == pytest.approx([0.1, 0.3], abs=1e-6)
    assert book.indices.sum() == n // 4


def test_importance_of_zero_and_of_any_size() -> None:
    values = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 50.0])
    book = fit_codebook(values, 2, importance=[1, 1, 1, 1, 1, 0])
    assert book.centroids.tolist() == [1.0, 10.5]
    assert book.indices.tolist() == [0, 0, 0, 1, 1, 1]
    for factor in (1e-300, 1e-30, 1e30, 1e300):
        scaled = fit_codebook(values, 2, importance=factor * np.array([1, 1, 1, 1, 1, 0]))
        assert scaled.centroids.tolist() == pytest.approx(book.centroids.tolist(), rel=1e-14)
        assert scaled.inertia == pytest.approx(factor * book.inertia)
    dead = fit_codebook(values, 2, importance=np.zeros(6))
    assert torch.equal(dead.centroids, fit_codebook(values, 2).centroids)
    assert dead.inertia == 0


def test_values_of_importance_zero_are_left_out_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arguments, "_BLOCK", 16)
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.standard_normal(101).astype(np.float32))
    weights = torch.from_numpy(rng.random(101).astype(np.float32))
    weights[torch.from_numpy(rng.random(101) < 0.6)] = 0
    before = values.clone(), weights.clone()
    alive = weights > 0
    ordered, kept = arguments.sort_values(values, weights)
    order = values[alive].argsort()
    assert kept is not None
    assert np.array_equal(ordered, values[alive][order].numpy())
    assert np.array_equal(kept, weights[alive][order].numpy())
    assert torch.equal(values, before[0])
    assert torch.equal(weights, before[1])


def test_very_uneven_importance_survives_prefix_sums() -> None:
    rng = np.random.default_rng(8)
    values = rng.standard_normal(9000)
    importance = np.where(rng.random(9000) < 0.01, 1.0, 1e-18)
    book = fit_codebook(values, 16, importance=importance)
    heavy = importance == 1.0
    least = kmeans1d_error(values[heavy], 16)
    assert error_of(book, values, importance) <= least * 1.0001


# --- what goes in, what comes out ---------------------------------------------------------------


def test_inputs_of_every_kind() -> None:
    values = draw("gauss", 60)
    expected = fit_codebook(values, 5)
    read_only = values.copy()
    read_only.flags.writeable = False
    tensor = torch.tensor(values)
    kinds: list[Any] = [
        list(values), read_only, values.astype(">f8"), values.astype(np.longdouble), tensor,
        tensor.clone().requires_grad_(), torch.nn.Parameter(tensor),
        torch.stack([tensor, tensor], dim=1)[:, 0],
    ]  # fmt: skip
    for kind in kinds:
        book = fit_codebook(kind, 5)
        assert torch.equal(book.centroids, expected.centroids)
        assert not book.centroids.requires_grad
        assert torch.equal(book.indices, expected.indices)
    whole = fit_codebook(torch.arange(11), 5, init="linear", max_iter=0)
    assert whole.centroids.tolist() == [0, 2.5, 5, 7.5, 10]
    assert fit_codebook(values.reshape(3, 4, 5)[:, ::-1], 5).indices.shape == (3, 4, 5)
    assert fit_codebook(values, np.int64(5)).inertia == expected.inertia


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_clusters": True}, TypeError, r"n_clusters must be an int, got True \(bool\)"),
        ({"n_clusters": 16.0}, TypeError, r"n_clusters must be an int, got 16\.0 \(float\)"),
        ({"n_clusters": "16"}, TypeError, r"n_clusters must be an int, got '16' \(str\)"),
        ({"n_clusters": None}, TypeError, r"n_clusters must be an int, got None"),
        ({"n_clusters": 1}, ValueError, r"n_clusters must be between 2 and 65536, got 1\."),
        ({"n_clusters": -4}, ValueError, r"n_clusters must be between 2 and 65536, got -4\."),
        ({"n_clusters": 65537}, ValueError, r"between 2 and 65536, got 65537\."),
        (
            {"n_clusters": 2, "preserve_sparsity": True},
            ValueError,
            r"n_clusters must be at least 3 with preserve_sparsity, got 2: one centroid is 0",
        ),
        ({"init": "forgy"}, ValueError, r"init must be one of 'optimal', .*, got 'forgy'"),
        ({"max_iter": -1}, ValueError, r"max_iter must be at least 0, got -1"),
        ({"max_iter": 2.5}, TypeError, r"max_iter must be an int, got 2\.5"),
        ({"values": []}, ValueError, r"values must not be empty, got shape \(0,\)"),
        ({"values": torch.ones(0, 3)}, ValueError, r"values must not be empty, got shape \(0, 3\)"),
        (
            {"values": [1.0, float("nan"), float("inf")]},
            ValueError,
            r"values must be finite, got 2 NaN or infinite of 3\. .*torch\.isfinite",
        ),
        ({"values": [1.0, -float("inf")]}, ValueError, r"got 1 NaN or infinite of 2"),
        ({"values": ["a", "b"]}, TypeError, r"values must hold real numbers, got an array of <U1"),
        ({"values": np.ones(3, complex)}, TypeError, r"values must hold real numbers"),
        ({"values": torch.ones(3, dtype=torch.complex64)}, TypeError, r"got torch\.complex64"),
        (
            {"values": torch.ones(3).to(torch.float8_e5m2)},
            TypeError,
            r"must be float16, bfloat16, float32 or float64, got torch\.float8_e5m2. Convert it",
        ),
        (
            {"importance": [1.0, 1.0]},
            ValueError,
            r"importance must have the shape of the values, \(3,\), got \(2,\)",
        ),
        ({"importance": [1, -1, 1]}, ValueError, r"importance must be finite and at least 0, .*-1"),
        ({"importance": [1, np.nan, 1]}, ValueError, r"importance must be finite and at least 0"),
        ({"importance": [1, np.inf, 1]}, ValueError, r"importance must be finite and at least 0"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_codebook(**{"values": [1.0, 2.0, 3.0], "n_clusters": 2, **arguments})


def test_the_most_clusters_there_can_be() -> None:
    values = draw("gauss", 70_000).astype(np.float32)
    book = fit_codebook(values, 65536)
    assert len(book.centroids) <= 65536
    assert book.indices.dtype == torch.int32
    assert book.inertia < 1e-3
    assert book.inertia == pytest.approx(error_of(book, values), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("pinned", [False, True])
def test_many_clusters_are_a_local_optimum(pinned: bool) -> None:
    values = draw("laplace", 20_000)
    book = fit_codebook(values, 600, preserve_sparsity=pinned)
    density = fit_codebook(values, 600, init="density", max_iter=100)
    assert 590 <= len(book.centroids) <= 600
    assert book.inertia < density.inertia


# --- the nearest centroid ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 16, 26, 256, 257])
@pytest.mark.parametrize("n", [50, 20_000])
def test_assign_finds_the_nearest_and_of_two_the_lower(dtype: torch.dtype, k: int, n: int) -> None:
    generator = torch.Generator().manual_seed(k)
    centroids = torch.randn(4 * k, generator=generator).to(dtype).unique()[:k].contiguous()
    scale = torch.logspace(-6, 2, n, dtype=torch.float64)
    values = (torch.randn(n, generator=generator, dtype=torch.float64) * scale).to(dtype)
    midway = (centroids[1:].double() + centroids[:-1].double()) / 2
    values = torch.cat([values, midway.to(dtype), centroids, -centroids * 0])
    indices = assign(values, centroids)
    assert indices.dtype == (torch.uint8 if len(centroids) <= 256 else torch.int32)
    away = (values.double()[:, None] - centroids.double()).abs()
    assert torch.equal(indices.long(), away.argmin(1))


def test_assign_separates_neighbouring_floats() -> None:
    for dtype, one_up in (
        (torch.float32, 2**-23),
        (torch.float64, 2**-52),
        (torch.bfloat16, 2**-7),
    ):
        pair = torch.tensor([1.0, 1.0 + one_up], dtype=dtype)
        assert assign(pair, pair).tolist() == [0, 1]
        assert assign(-pair.flip(0), -pair.flip(0)).tolist() == [0, 1]
        denormal = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype) * torch.finfo(dtype).smallest_normal
        assert assign(denormal, denormal).tolist() == [0, 1, 2]


def test_assign_shapes_and_transforms() -> None:
    centroids = torch.tensor([-1.0, 0.0, 2.0])
    values = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = assign(values, centroids)
    assert assign(values.T, centroids).equal(expected.T)
    assert assign(values[:, ::2], centroids).equal(expected[:, ::2])
    assert assign(values.requires_grad_(), centroids).equal(expected)
    assert assign(torch.tensor(1.5), centroids).shape == ()
    assert assign(torch.empty(0, 3), centroids).shape == (0, 3)
    by_row = torch.func.vmap(lambda row: assign(row, centroids))(values.detach())
    assert by_row.equal(expected)


@pytest.mark.parametrize("n", [100_003, WORTHWHILE + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [3, 40, 200])
def test_both_ways_to_count_agree(k: int, dtype: torch.dtype, n: int) -> None:
    """Blocks and threads of the CPU against torch.bucketize, which devices and compilers run."""
    generator = torch.Generator().manual_seed(k)
    values = torch.randn(n, generator=generator, dtype=dtype)
    limits = torch.cat([torch.randn(k - 3, generator=generator), torch.zeros(3)]).sort().values
    limits = limits.to(dtype)
    values[:6] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45])
    assert count_below(values, limits).equal(torch.bucketize(values, limits).to(torch.uint8))


def test_a_crowded_cell_is_still_resolved() -> None:
    """Hundreds of limits that agree in their leading 16 bits."""
    limits = torch.linspace(1.0, 1.003, 200)
    values = torch.linspace(0.999, 1.004, 50_000)
    assert count_below(values, limits).equal(torch.bucketize(values, limits).to(torch.uint8))


@pytest.mark.parametrize("shape", [(7, 5), (300, 3, 500), (3, 200_000), (21, 100_003)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_compared_in_their_own_units(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In parts as at once, whether a part is many rows or one."""
    generator = torch.Generator().manual_seed(0)
    rows = (20 * torch.randn(shape, generator=generator)).to(dtype)
    units = 0.1 + torch.rand(shape[0], generator=generator)
    limits = torch.tensor([-90.5, -3.0, 0.5, 17.5, 80.0])
    scaled = rows.float() / units.view(-1, *[1] * (len(shape) - 1))
    found = count_below_in_units(rows, units, limits)
    assert found.equal(torch.bucketize(scaled, limits).to(torch.uint8))


@pytest.mark.parametrize("sign", [1, -1])
def test_one_centroid_on_a_side_is_the_far_end(sign: int) -> None:
    """What TFMOT's linspace gives; API.md names these values."""
    values = sign * torch.tensor([-3, -2, -1, 0, 1.1, 2, 3, 4, 5, 6, 7, 8, 9])
    book = fit_codebook(values, 6, init="linear", max_iter=0, preserve_sparsity=True)
    expected = sign * torch.tensor([-3, 0, 1.1, 1.1 + 7.9 / 3, 1.1 + 15.8 / 3, 9])
    torch.testing.assert_close(book.centroids, expected.sort().values)


@pytest.mark.parametrize("sparse", [False, True])
def test_thousands_of_clusters_for_values_of_all_magnitudes(sparse: bool) -> None:
    values = torch.exp(6 * torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    book = fit_codebook(values, 4000, preserve_sparsity=sparse)
    assert 3000 < len(book.centroids) <= 4000
    error = (book.centroids[book.indices.long()] - values).square().sum()
    assert float(error) == pytest.approx(book.inertia, rel=1e-3)
