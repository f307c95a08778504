"""Int8 codebooks: the grid's optimum by exhaustion, and what must hold for every weight."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchclust.fitting.channels import Channels
from torchclust.fitting.codebook import fit_codebook
from torchclust.fitting.integer_codebook import (
    IntegerCodebook,
    best_magnitudes,
    fit_integer_codebook,
)

INITS = ["optimal", "linear", "density", "random", "kmeans++"]


def reconstructed(book: IntegerCodebook, weight: Tensor) -> Tensor:
    scale = book.scale.double().reshape(-1, *[1] * (weight.dim() - 1))
    return scale * book.codes.double()[book.indices.long()]


def error_of(book: IntegerCodebook, weight: Tensor, importance: Any = 1.0) -> float:
    return float((importance * (weight.double() - reconstructed(book, weight)) ** 2).sum())


def weights(kind: str, *shape: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    by_channel = rng.uniform(0.2, 1.5, (shape[0], *[1] * (len(shape) - 1)))
    drawn = rng.standard_normal(shape) if kind != "laplace" else rng.laplace(size=shape)
    if kind == "pruned":
        drawn = drawn * (rng.random(shape) < 0.2)
    return torch.tensor(drawn * by_channel, dtype=torch.float32)


def check(book: IntegerCodebook, weight: Tensor, n_clusters: int) -> None:
    """What must hold for every fit."""
    codes = book.codes.tolist()
    assert book.codes.dtype == torch.int8
    assert codes == sorted(set(codes))
    assert codes == [-code for code in reversed(codes)]
    assert 0 in codes
    assert len(codes) <= n_clusters
    assert book.scale.dtype == torch.float32
    assert book.scale.shape == (len(weight),)
    assert (book.scale > 0).all()
    assert book.scale.isfinite().all()
    assert book.indices.dtype == torch.uint8
    assert book.indices.shape == weight.shape
    assert (book.codes[book.indices.int()][weight == 0] == 0).all()
    members = torch.bincount(book.indices.flatten(), minlength=len(codes))
    assert ((members + members.flip(0) > 0) | (book.codes == 0)).all()
    in_codes = weight.float() / book.scale.reshape(-1, *[1] * (weight.dim() - 1))
    away = (in_codes[..., None].double() - book.codes.double()).abs()
    chosen = away.gather(-1, book.indices.long()[..., None])[..., 0]
    assert torch.equal(chosen, away.min(-1).values)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("shape", [(6, 50), (8, 4, 3, 3), (5, 7, 2), (4,), (1, 30)], ids=str)
def test_contract(init: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = weights("pruned", *shape).to(dtype)
    before = weight.clone()
    for k, max_iter, preserve_sparsity in ((3, 0, True), (16, 300, False), (256, 1, True)):
        book = fit_integer_codebook(
            weight,
            k,
            init=init,
            max_iter=max_iter,
            preserve_sparsity=preserve_sparsity,
            seed=3,
        )
        check(book, weight, k)
        assert torch.equal(weight, before)
        # A fit that is all but perfect leaves rounding, of the order of 1e-7 of the weights.
        rounding = 1e-13 * float(weight.double().square().sum())
        assert book.inertia == pytest.approx(error_of(book, weight), rel=1e-9, abs=rounding)
        again = fit_integer_codebook(weight, k, init=init, max_iter=max_iter, seed=3)
        assert torch.equal(again.codes, book.codes)
        assert torch.equal(again.scale, book.scale)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.floats(width=32, allow_nan=False, allow_infinity=False),
                min_size=width,
                max_size=width,
            ),
            min_size=1,
            max_size=4,
        )
    ),
    k=st.integers(3, 20),
    init=st.sampled_from(INITS),
    weighted=st.booleans(),
)
@example([[1e-45, 3e38], [0.0, 0.0]], 3, "optimal", False)
@example([[1e-45, 2e-45, 3e-45]], 5, "kmeans++", True)
@example([[-0.0, 0.0]], 3, "random", True)
def test_any_finite_float32(rows: list[list[float]], k: int, init: str, weighted: bool) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    book = fit_integer_codebook(weight, k, init=init, importance=weight.abs() if weighted else None)
    check(book, weight, k)
    assert book.inertia >= 0


def test_extremes_by_name() -> None:
    zero = fit_integer_codebook(torch.zeros(3, 4), 16)
    assert (zero.codes.tolist(), zero.scale.tolist()) == ([0], [1.0, 1.0, 1.0])
    constant = torch.tensor([[0.3] * 5, [-2.0] * 5, [1e-30] * 5])
    book = fit_integer_codebook(constant, 16)
    assert len(book.codes) == 3
    assert torch.allclose(reconstructed(book, constant), constant.double(), rtol=1e-6, atol=0)
    some = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    some[2] = 0
    book = fit_integer_codebook(some, 7)
    assert (book.codes[book.indices.int()][2] == 0).all()
    others = book.scale[[0, 1, 3, 4]]
    assert others.min() <= book.scale[2] <= others.max()
    assert (
        fit_integer_codebook(torch.full((2, 3), 1e300, dtype=torch.float64), 3)
        .scale.isfinite()
        .all()
    )


# --- how good ----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_codes_are_the_best_of_all_on_the_grid(half: int, seed: int) -> None:
    """Given the scales: every set of magnitudes tried, each weight at its nearest code."""
    weight = weights("laplace", 4, 25, seed=seed).numpy()
    importance = np.random.default_rng(seed).random(weight.shape)
    channels = Channels(weight, importance)
    ratio = np.array([1.0, 0.8, 0.6, 1.3]) / 127
    scale = (ratio * channels.peak)[:, None]

    def error(magnitudes: tuple[int, ...]) -> float:
        codes = np.array([0, *magnitudes])
        away = np.abs(np.abs(weight / scale)[..., None] - codes).min(axis=-1)
        return float((importance * (away * scale) ** 2).sum())

    found = tuple(best_magnitudes(channels.histogram(ratio), half).tolist())
    tried = itertools.combinations(range(1, 128), half)
    assert error(found) <= min(map(error, tried)) * (1 + 1e-9)


def test_errors_by_channel_equal_a_loop() -> None:
    weight = weights("gauss", 5, 31).numpy()
    importance = np.random.default_rng(1).random(weight.shape)
    channels = Channels(weight, importance)
    codes, ratio = np.array([3, 20, 90]), np.array([0.5, 0.8, 1.0, 1.4, 3.0]) / 127
    error, better = channels.errors(codes, ratio)
    for channel, (row, mass) in enumerate(zip(weight, importance, strict=True)):
        scale = ratio[channel] * np.abs(row).max()
        every = np.concatenate([-codes[::-1], [0], codes])
        code = every[np.abs(row[:, None] / scale - every).argmin(axis=1)]
        wanted = (mass * (row - scale * code) ** 2).sum() / np.abs(weight).max() ** 2
        assert error[channel] == pytest.approx(wanted)
        closed = (mass * row * code).sum() / (mass * code * code).sum()
        assert better[channel] * np.abs(row).max() == pytest.approx(closed)


def test_a_planted_codebook_is_found() -> None:
    rng = np.random.default_rng(0)
    codes = np.array([-127, -80, -31, 0, 31, 80, 127])
    scale = rng.uniform(0.001, 0.01, (20, 1))
    planted = torch.tensor(scale * codes[rng.integers(0, 7, (20, 60))])
    book = fit_integer_codebook(planted, 7)
    assert book.codes.tolist() == codes.tolist()
    assert book.scale.tolist() == pytest.approx(scale[:, 0].tolist(), rel=1e-6)
    assert book.inertia < 1e-12 * float(planted.square().sum())


@pytest.mark.parametrize("kind", ["gauss", "laplace", "pruned"])
@pytest.mark.parametrize("k", [3, 7, 15, 31])
def test_optimal_beats_the_seeded_fits_and_one_codebook_without_scales(kind: str, k: int) -> None:
    weight = weights(kind, 32, 12, 3, 3)
    book = fit_integer_codebook(weight, k)
    seeded = [fit_integer_codebook(weight, k, init=init).inertia for init in INITS[1:]]
    assert book.inertia < min(seeded) * 1.001
    assert book.inertia < fit_codebook(weight, k).inertia  # channels differ 7-fold in magnitude
    if k > 3:
        assert book.codes[-1] > 63  # the finest half of the grid


def test_optimal_is_near_the_best_of_many_random_starts() -> None:
    weight = weights("gauss", 32, 144, seed=2)
    rng = np.random.default_rng(0)
    for k in (7, 15):
        error = fit_integer_codebook(weight, k).inertia
        # A random gauge on every channel is a random start: it moves the peaks that starts rest on.
        others = []
        for _ in range(6):
            outlier = weight.clone()
            outlier[:, 0] *= torch.tensor(rng.uniform(1.0, 4.0, 32), dtype=torch.float32)
            start = fit_integer_codebook(outlier, k)
            others.append(polished(weight, start))
        assert error < min(others) * 1.005


def polished(weight: Tensor, book: IntegerCodebook) -> float:
    """The closed-form alternation in scales alone, from another fit's codes and scales."""
    rows, codes = weight.double().flatten(1), book.codes.double()
    scale = book.scale.double()[:, None]
    for _ in range(50):
        code = codes[(rows[..., None] / scale[..., None] - codes).abs().argmin(-1)]
        scale = (rows * code).sum(1, keepdim=True) / (code * code).sum(1, keepdim=True)
    return float(((rows - scale * code) ** 2).sum())


def test_importance_moves_codes_and_scales() -> None:
    weight = weights("gauss", 16, 100)
    importance = torch.ones_like(weight)
    importance[:, :30] = 1000.0
    plain, weighted = (
        fit_integer_codebook(weight, 7),
        fit_integer_codebook(weight, 7, importance=importance),
    )
    assert weighted.inertia == pytest.approx(error_of(weighted, weight, importance), rel=1e-9)
    assert weighted.inertia < 0.9 * error_of(plain, weight, importance)
    equal = fit_integer_codebook(weight, 7, importance=torch.full_like(weight, 5.0))
    assert torch.equal(equal.codes, plain.codes)
    assert equal.inertia == pytest.approx(5 * plain.inertia, rel=1e-6)
    dead = fit_integer_codebook(weight, 7, importance=torch.zeros_like(weight))
    assert torch.equal(dead.codes, plain.codes)
    assert dead.inertia == 0


def test_negative_channels_mirror_their_codes() -> None:
    """What folding a BatchNorm of either sign does: the file holds the codes that were trained."""
    weight = weights("gauss", 12, 80)
    gamma = torch.linspace(-2, 1.7, 12)[:, None]
    folded, plain = fit_integer_codebook(weight * gamma, 15), fit_integer_codebook(weight, 15)
    codes = plain.codes[plain.indices.int()].int() * gamma.sign().int()
    assert set(codes.unique().tolist()) <= set(plain.codes.tolist())
    assert len(folded.codes) == len(plain.codes)


def test_lloyd_without_steps_keeps_the_seeds() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 4.0], [-8.0, 3.0, 6.0, 0.0]])
    book = fit_integer_codebook(weight, 7, init="linear", max_iter=0)
    # In units of peak / 127 the magnitudes run from 127/4 to 127: 31.75, 79.4, 127.
    assert book.codes.tolist() == [-127, -79, -32, 0, 32, 79, 127]
    assert book.scale.tolist() == pytest.approx([4 / 127, 8 / 127])


def test_more_weights_than_are_looked_at_one_by_one() -> None:
    weight = weights("gauss", 3, 400_000)
    book = fit_integer_codebook(weight, 15)
    check(book, weight, 15)
    part = fit_integer_codebook(weight[:, :50_000], 15)
    assert book.inertia / 8 == pytest.approx(part.inertia, rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"n_clusters": 2},
            ValueError,
            r"n_clusters must be at least 3 for an int8 codebook, got 2",
        ),
        ({"n_clusters": 1}, ValueError, r"n_clusters must be between 2 and 65536, got 1"),
        ({"n_clusters": 3.0}, TypeError, r"n_clusters must be an int, got 3\.0 \(float\)"),
        ({"weight": torch.ones(0, 3)}, ValueError, r"weight must not be empty, got shape \(0, 3\)"),
        ({"weight": torch.ones(3, 0)}, ValueError, r"weight must not be empty, got shape \(3, 0\)"),
        (
            {"weight": torch.tensor([[1.0, float("nan")]])},
            ValueError,
            r"weight must be finite, got 1 NaN or infinite of 2",
        ),
        ({"importance": torch.ones(3)}, ValueError, r"importance must have the shape .*\(2, 3\)"),
        ({"importance": -torch.ones(2, 3)}, ValueError, r"importance must be finite and at least"),
        ({"init": "best"}, ValueError, r"init must be one of .* got 'best'"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit_integer_codebook(**{"weight": torch.ones(2, 3), "n_clusters": 7, **arguments})


@pytest.mark.parametrize("init", INITS)
def test_importance_of_zeros_alone_says_nothing(init: str) -> None:
    weight = torch.tensor([[0.0, 0.0, 2.0], [1.0, 0.0, -2.0]])
    book = fit_integer_codebook(weight, 5, init=init, importance=(weight == 0).float())
    assert torch.equal(book.indices, fit_integer_codebook(weight, 5, init=init).indices)
    assert book.inertia == 0


def test_a_channel_that_nothing_weighs_has_a_scale_that_suits_it() -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(40, 32), torch.ones(40, 32)
    importance[20:] = 0
    book = fit_integer_codebook(weight, 15, importance=importance)
    wrong = (reconstructed(book, weight) - weight).square().mean(1)
    assert wrong[20:].mean() < 1.2 * wrong[:20].mean()
    half = fit_integer_codebook(weight[:20], 15)
    assert torch.equal(book.codes, half.codes)  # it moves no code
    assert book.inertia == pytest.approx(half.inertia, rel=1e-3)
