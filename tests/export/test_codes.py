"""Codes read off values, and parameters found again among a file's weights: pure numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchclust.export.codes import (
    Trained,
    match,
    most_codes,
    quantize_codebook,
    recover,
    recover_int8,
)

Array = npt.NDArray[Any]


def int8_weight(
    magnitudes: list[int], shape: tuple[int, ...], seed: int = 0, axis: int = 0
) -> tuple[Array, Array]:
    """A float32 weight as an int8 codebook makes it, and its codes."""
    rng = np.random.default_rng(seed)
    book = np.array(sorted({-m for m in magnitudes} | {0} | set(magnitudes)))
    codes = rng.choice(book, shape)
    channels = [n if d == axis else 1 for d, n in enumerate(shape)]
    scale = rng.uniform(1e-3, 1, channels).astype(np.float32)
    return scale * codes.astype(np.float32), codes.astype(np.int8)


def trained(weight: Array, codes: Array, axis: int = 0, *, symmetric: bool = True) -> Trained:
    groups = np.zeros(weight.shape[axis], np.int64)
    return Trained("w", weight, codes, groups, len(np.unique(codes)), symmetric, axis)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 127), min_size=1, max_size=15, unique=True),
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(9, 200),
)
def test_int8_codes_are_recovered(
    magnitudes: list[int], seed: int, rows: int, columns: int
) -> None:
    weight, codes = int8_weight(magnitudes, (rows, columns), seed)
    found = recover_int8(weight)
    assert found is not None
    assert len(np.unique(np.abs(found))) <= len(np.unique(np.abs(codes)))
    for row, code in zip(weight.astype(np.float64), found.astype(np.float64), strict=True):
        scale = row @ code / max(code @ code, 1)
        np.testing.assert_allclose(scale * code, row, atol=1e-5 * np.abs(row).max(initial=0))


def test_rows_with_few_codes_take_the_multiple_that_fits_the_others() -> None:
    full = np.array([[3, -50, 100, 0, 7]], np.float32) * 0.31
    sparse = np.array([[1, -1, 0, 0, 1]], np.float32) * 0.02
    found = recover_int8(np.concatenate([sparse, full, sparse]))
    assert found is not None
    assert set(np.abs(found).ravel()) == {0, 3, 7, 50, 100}


@pytest.mark.parametrize("shape", [(64, 32), (16, 8, 3, 3)])
def test_an_unclustered_weight_is_not_recovered(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    assert recover("w", rng.normal(size=shape).astype(np.float32)) is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_is_not_clustered(value: float) -> None:
    assert recover("w", np.full((8, 8), value, np.float32)) is None


def test_rows_of_one_value_tell_nothing() -> None:
    """As weight_norm's lengths have them: each is a multiple of itself."""
    assert recover("w", np.random.default_rng(0).normal(size=(8, 1)).astype(np.float32)) is None
    shared = np.repeat(np.float32([0.5, -1.5]), 16)[:, None]
    found = recover("w", shared)
    assert found is not None
    assert found.n_clusters == 2


def test_nan_is_not_clustered() -> None:
    assert recover("w", np.full((8, 8), np.nan, np.float32)) is None


@pytest.mark.parametrize("k", [2, 3, 16, 64, 256])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_float_codebook_is_recovered(k: int, axis: int) -> None:
    rng = np.random.default_rng(k)
    book = np.sort(rng.normal(size=k)).astype(np.float32)
    weight = book[rng.integers(0, k, (64, 48))]
    found = recover("w", weight, axis)
    assert found is not None
    assert (found.n_clusters, found.symmetric, found.recovered) == (k, False, True)
    codes = [np.unique(found.codes[weight == value]) for value in book]
    assert {len(c) for c in codes} == {1}  # equal weights keep equal codes
    of_book = np.concatenate(codes).astype(np.float64)
    assert (np.diff(of_book) >= 0).all()
    assert 64 <= np.abs(of_book).max() <= 127
    step = np.abs(book).max() / np.abs(of_book).max()
    np.testing.assert_allclose(step * of_book, book, rtol=0, atol=1.01 * step)


def test_an_int8_codebook_is_preferred_to_its_many_float_values() -> None:
    weight, codes = int8_weight([2, 9, 60, 127], (10, 256))
    found = recover("w", weight)
    assert found is not None
    assert found.symmetric
    assert found.n_clusters == 9
    np.testing.assert_array_equal(found.codes, codes)


def test_codebooks_of_channels_are_recovered_one_by_one() -> None:
    rng = np.random.default_rng(0)
    books = rng.normal(size=(80, 4)).astype(np.float32)
    weight = np.stack([book[rng.integers(0, 4, 64)] for book in books])
    found = recover("w", weight)
    assert found is not None
    assert found.n_clusters == 4
    assert most_codes(found.codes, found.groups) == 4
    assert len(np.unique(found.codes)) > 4
    assert relative_errors(weight, found.codes).max() < 1 / 127


def relative_errors(weight: Array, codes: Array) -> Array:
    """What is lost of each row by writing it as a scale times its codes."""
    wide = codes.astype(np.float64)
    scales = (weight * wide).sum(1, keepdims=True) / np.square(wide).sum(1, keepdims=True)
    lost: Array = np.linalg.norm(weight - scales * wide, axis=1) / np.linalg.norm(weight, axis=1)
    return lost


def test_groups_share_one_grid() -> None:
    weight = np.array([[1.0, -2.0, 4.0], [4.0, 0.0, -2.0], [0.5, 0.25, 0.25]], np.float32)
    codes = quantize_codebook(weight, np.array([0, 0, 1]))
    assert set(codes[:2].ravel() / codes[0, 0]) == {1, -2, 4, 0}  # no row alone would need that
    np.testing.assert_array_equal(codes[2], [2 * codes[2, 1], codes[2, 1], codes[2, 1]])


def test_equal_errors_of_equal_weights_do_not_add_up() -> None:
    """What a layer behind a ReLU gives, against rounding to the grid that ends at 127."""
    rng = np.random.default_rng(0)
    inputs = np.maximum(rng.normal(size=(256, 400)), 0)
    lost = []
    for _ in range(20):
        book = np.linspace(-1, 1, 12) * rng.uniform(0.1, 1) + rng.uniform(-0.05, 0.05)
        weight = book[np.clip(np.rint(rng.normal(5.5, 1.5, (16, 400))), 0, 11).astype(int)]
        both = (
            quantize_codebook(weight, np.zeros(16, np.int64)),
            np.rint(weight * (127 / np.abs(book).max())),
        )
        errors = []
        for codes in both:
            wide = codes.astype(np.float64)
            scales = (weight * wide).sum(1) / np.square(wide).sum(1)
            errors.append(np.linalg.norm(inputs @ (weight - scales[:, None] * wide).T))
        lost.append(errors[0] / errors[1])
    assert np.mean(lost) < 0.5


def test_an_all_zero_codebook_is_all_zero() -> None:
    codes = quantize_codebook(np.zeros((2, 3)), np.zeros(2, np.int64))
    np.testing.assert_array_equal(codes, np.zeros((2, 3)))


def emitted(weight: Array, kind: str) -> Array:
    """A parameter as (output channels, n) in the order in which a converter writes it."""
    if kind == "linear":
        return weight
    if kind == "conv":
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    turned = weight[..., ::-1, ::-1] if kind == "transposed, turned" else weight
    return np.moveaxis(np.moveaxis(turned, 1, 0), 1, -1).reshape(weight.shape[1], -1)


@pytest.mark.parametrize(
    ("kind", "shape", "axis"),
    [
        ("linear", (12, 12), 0),
        ("conv", (12, 12, 3, 3), 0),
        ("conv", (12, 1, 3, 3), 0),
        ("transposed", (12, 12, 3, 3), 1),
        ("transposed, turned", (12, 12, 3, 3), 1),
    ],
)
def test_a_parameter_is_found_behind_folded_factors(
    kind: str, shape: tuple[int, ...], axis: int
) -> None:
    weight, codes = int8_weight([1, 5, 30, 127], shape, axis=axis)
    factors = np.array([1, -2, 0, 1e-9, -1e-30, 1e-39, 0.5, 7, -1, 3, 1e6, 1 / 6])
    matrix = (factors[:, None] * emitted(weight, kind)).astype(np.float32)
    found = match(matrix, trained(weight, codes, axis))
    assert found is not None
    mirrored = np.where(factors[:, None] < 0, -1, 1) * emitted(codes, kind)
    np.testing.assert_array_equal(found.codes, mirrored)
    assert found.negative == 3
    np.testing.assert_allclose(found.scales[:, None] * mirrored, matrix, rtol=1e-5, atol=1e-36)


def test_a_block_of_a_grouped_convolution_is_found() -> None:
    weight, codes = int8_weight([1, 5, 30], (12, 2, 3, 3))
    found = match(emitted(weight, "conv")[4:8], trained(weight, codes))
    assert found is not None
    np.testing.assert_array_equal(found.codes, emitted(codes, "conv")[4:8])


@pytest.mark.parametrize("change", ["element", "columns", "shape", "permuted"])
def test_anything_else_is_not_found(change: str) -> None:
    weight, codes = int8_weight([1, 5, 30, 127], (8, 20))
    matrix = weight.copy()
    if change == "element":
        matrix[5, 3] += 0.01 * np.abs(matrix[5]).max()
    elif change == "columns":
        matrix *= np.linspace(1, 2, 20, dtype=np.float32)
    elif change == "shape":
        matrix = matrix[:, :10]
    else:
        matrix = matrix[::-1]
    assert match(matrix, trained(weight, codes)) is None
