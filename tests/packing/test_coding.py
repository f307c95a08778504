"""The parts of packing on their own: frequency tables, entropy coder, recovered codes, choices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchclust.packing.coding import (
    Codebooks,
    Codes,
    Layout,
    Sparse,
    decode_rows,
    encode_rows,
    literals,
    products,
    symbols_of,
)
from torchclust.packing.contexts import find_contexts
from torchclust.packing.dtypes import DTYPES, Bits, Dtype, to_bits
from torchclust.packing.entropy import (
    Decoder,
    encode,
    entropy,
    frequencies,
    model_of,
    quantize,
    read_drops,
    write_drops,
)
from torchclust.packing.scales import recover_scales
from torchclust.packing.search import Choice, Hint, choose

FLOATS = [dtype for dtype in DTYPES if dtype.is_scalable]
counts_of_symbols = st.lists(st.integers(1, 10**9), min_size=2, max_size=300).map(
    lambda counts: np.sort(np.array(counts))[::-1].copy()
)


@given(counts_of_symbols)
def test_frequency_tables(counts: np.ndarray) -> None:
    """They are exact shares of 2^24, cost at most 1 % more than the entropy, and come back."""
    drops = quantize(counts)
    found = frequencies(drops)
    assert found.sum() == 1 << 24
    assert found.min() >= 1
    share = counts / counts.sum()
    cost = float(-(share * np.log2(found / 2**24)).sum())
    assert cost <= 1.01 * entropy(counts) + 1e-5
    written = write_drops(drops)
    assert 8 * len(written) <= len(counts) + drops[-1] + 8
    for more in (b"", b"\xff\0"):
        read, length = read_drops(written + more, len(counts))
        assert np.array_equal(read, drops)
        assert length == len(written)


@given(st.binary(max_size=12), st.integers(1, 40))
def test_any_bits_are_one_table_or_none(encoded: bytes, k: int) -> None:
    try:
        drops, length = read_drops(encoded, k)
    except ValueError:
        return
    assert write_drops(drops) == encoded[:length]
    assert frequencies(drops).sum() == 1 << 24


@pytest.mark.parametrize("k", [1, 2, 3, 16, 257, 65536])
def test_symbols_come_back(k: int) -> None:
    rng = np.random.default_rng(k)
    symbols = np.minimum(rng.geometric(0.02 if k > 16 else 0.4, 50_000) - 1, k - 1)
    symbols = np.concatenate([symbols, np.arange(k)]).astype(np.int32)
    counts = np.bincount(symbols, minlength=k)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(k, np.int32)
    rank[order] = np.arange(k)
    symbols, counts = rank[symbols], counts[order]
    drops = quantize(counts)
    blocks = np.array_split(symbols, [1, 1, 7, 1000, 30_000])
    table = model_of(frequencies(drops))
    words = encode((block, table) for block in reversed(blocks))
    assert 4 * len(words) <= 1.001 * len(symbols) * entropy(counts) / 8 + 8 + 0.01 * k
    decoder = Decoder(words)
    back = [decoder.take(n, table) for n in (3, 0, 40_000, len(symbols) - 40_003)]
    decoder.finish()
    assert np.array_equal(np.concatenate(back), symbols)
    if k > 1:
        short = Decoder(words)
        short.take(100, table)
        with pytest.raises(ValueError, match="do not end with its last weight"):
            short.finish()


def tallied(weight: torch.Tensor) -> tuple[np.ndarray, Bits]:
    """Rows and bits of the distinct values of each row."""
    found = [np.unique(to_bits(row)) for row in weight]
    return np.repeat(np.arange(len(found)), [len(f) for f in found]), np.concatenate(found)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FLOATS),
    st.sets(st.integers(1, 127), min_size=1, max_size=40),
    st.integers(1, 30),
    st.integers(0, 10**6),
)
def test_codes_and_scales_are_recovered(
    dtype: Dtype, magnitudes: set[int], n_rows: int, seed: int
) -> None:
    """Some exact codes and scales are found, and no more codes than went in."""
    rng = np.random.default_rng(seed)
    codes = np.array([0, *magnitudes, *(-m for m in magnitudes)])
    scale = torch.from_numpy(np.exp(rng.normal(-4, 2, (n_rows, 1)))).to(dtype.torch)
    chosen = codes[rng.integers(0, len(codes), (n_rows, 50))]
    chosen[0, : len(codes)] = codes[:50]
    weight = torch.from_numpy(chosen).to(dtype.torch) * scale
    row, value = tallied(weight)
    found = recover_scales(row, value, dtype, n_rows)
    if not chosen.any():
        assert found is None
        return
    assert found is not None
    scales, code = found
    assert np.array_equal(products(scales[row], code, dtype), value)
    assert np.abs(code).max() <= 127
    if dtype.name in ("float32", "float64"):
        assert len(np.unique(np.abs(code))) <= len(np.unique(np.abs(chosen)))


def test_rows_with_few_values_keep_to_the_codebook() -> None:
    """3 and 50 alone could be 6 and 100 as well, which would be one code more."""
    codes = torch.tensor([[3.0, 50.0, 100.0], [3.0, 50.0, 0.0], [50.0, -50.0, 0.0]])
    weight = codes * torch.tensor([[0.013], [0.0071], [0.0177]])
    found = recover_scales(*tallied(weight), DTYPES[0], 3)
    assert found is not None
    assert set(np.abs(found[1]).tolist()) == {0, 3, 50, 100}


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_what_has_no_codes_is_told_so(dtype: Dtype) -> None:
    torch.manual_seed(0)
    dense = torch.randn(20, 60, dtype=torch.float64).to(dtype.torch)
    for odd in (None, -0.0, float("nan"), float("inf")):
        weight = dense if odd is None else torch.arange(60).repeat(20, 1).to(dtype.torch)
        if odd is not None:
            weight[7, 3] = odd
        assert recover_scales(*tallied(weight), dtype, 20) is None


@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(1, 9),
    st.floats(0, 1),
    st.integers(0, 10**6),
)
def test_contexts_cost_what_they_save(
    n_rows: int, n_columns: int, k: int, alive: float, seed: int
) -> None:
    """Frequencies are shares of 2^24; the message is no longer than one without classes."""
    rng = np.random.default_rng(seed)
    holds = (rng.random(n_rows) < alive)[:, None] & (rng.random(n_columns) < alive)
    values = rng.geometric(0.5, (n_rows, n_columns)).clip(max=k) * holds
    used, symbols = np.unique(values, return_inverse=True)
    order = np.argsort(-np.bincount(symbols.reshape(-1)), kind="stable")
    rank = np.empty(len(used), np.uint8)
    rank[order] = np.arange(len(used))
    symbols = rank[symbols].reshape(n_rows, n_columns)
    counts = np.bincount(symbols.reshape(-1))
    contexts, classes = find_contexts(symbols, counts)
    for table in contexts.frequencies():
        assert table.sum() == 1 << 24
        assert len(table) in (1, len(used))
        assert table.min() >= 1
    coding = Codebooks(np.zeros((1, len(used)), np.uint32), n_rows)
    layout = Layout((n_rows, n_columns))
    words = encode_rows(coding, symbols, contexts, classes, layout)
    whole = model_of(frequencies(quantize(counts)))
    plain = encode([(symbols.reshape(-1).astype(np.int32), whole)])
    tables = 2 * contexts.shares.size + (contexts.shares.size > 1)
    assert 4 * len(words) + tables <= 4 * len(plain) + 2 + 8


def coded_and_back(choice: Choice, bits: Bits, dtype: Dtype, layout: Layout) -> Bits:
    coding = choice.coding
    assert coding is not None
    stored = [*literals(bits, dtype, layout)] if isinstance(coding, Sparse) else []
    symbols = symbols_of(coding, bits, layout)
    contexts, classes = find_contexts(symbols, choice.counts)
    words = encode_rows(coding, symbols, contexts, classes, layout)
    literal = np.concatenate(stored) if stored else np.zeros(0, dtype.bits)
    rows = np.empty((layout.n_rows, layout.n_columns), dtype.bits)
    for row, column, block in decode_rows(coding, contexts, words, literal, layout):
        rows[row, column] = block
    return to_bits(layout.restore(rows, dtype))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([dtype for dtype in DTYPES if dtype.units == 1]),
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    st.lists(st.integers(1, 9), min_size=0, max_size=4),
    st.integers(0, 1),
    st.integers(0, 10**6),
)
def test_what_is_chosen_is_exact(
    dtype: Dtype, pool: list[int], shape: list[int], axis: int, seed: int
) -> None:
    """Whatever the bits: if a tensor is not left raw, it comes back."""
    rng = np.random.default_rng(seed)
    layout = Layout(tuple(shape), axis if len(shape) > 1 else 0)
    mask = 1 if dtype.name == "bool" else (1 << 8 * dtype.unit) - 1
    values = np.array([v & mask for v in pool] + [0], np.uint64).astype(dtype.bits)
    bits = values[rng.integers(0, len(values), layout.n_elements)]
    for rows_per_book in (None, 1, 3):
        choice = choose(bits, dtype, layout, Hint(rows_per_book))
        assert choice.bits <= 8 * bits.nbytes
        if choice.coding is not None:
            assert np.array_equal(coded_and_back(choice, bits, dtype, layout), bits)
            assert choice.counts.sum() == len(bits)
            assert (np.diff(choice.counts) <= 0).all()


def test_a_wrong_hint_does_no_harm() -> None:
    """Codes and scales that do not fit the values are found out."""
    dtype, layout = DTYPES[0], Layout((40, 30))
    codes = np.array([-5, 0, 5], np.int8)
    true = np.linspace(0.01, 0.09, 40, dtype=np.float32).view(np.uint32)
    rng = np.random.default_rng(0)
    bits = products(true[:, None], codes[rng.integers(0, 3, (40, 30))], dtype).reshape(-1)
    for scales, hinted, found in (
        (true, codes, {-5, 0, 5}),
        (true + 1, codes, {-1, 0, 1}),  # searched for: the smallest codes that explain it
        (true, codes * 2, {-1, 0, 1}),
        (true * 0, codes, {-1, 0, 1}),
    ):
        choice = choose(bits, dtype, layout, Hint(codes=hinted.astype(np.int8), scales=scales))
        assert isinstance(choice.coding, Codes)
        assert np.array_equal(coded_and_back(choice, bits, dtype, layout), bits)
        assert set(choice.coding.codes.tolist()) == found
