"""The lookup and the group-by-index sum against a scatter over single elements."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from torchclust.fitting.threads import WORTHWHILE
from torchclust.weight import lookup as module
from torchclust.weight.lookup import grouped_sum, lookup

SHAPES = [
    ((7,), (7,)),
    ((5,), (3, 4, 2)),
    ((256,), (70_000,)),
    ((3, 6), (3, 5, 2)),
    ((9, 2), (9, 1)),
]


def scattered(values: Tensor, indices: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Eq. 3 of the paper, element by element, in float64."""
    total = np.zeros(shape)
    if len(shape) == 1:
        np.add.at(total, indices.numpy().ravel(), values.double().numpy().ravel())
        return total
    for row, (index, value) in enumerate(zip(indices, values, strict=True)):
        np.add.at(total[row], index.numpy().ravel(), value.double().numpy().ravel())
    return total


def example(
    shape: tuple[int, ...], of: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(shape, generator=generator).to(dtype)
    indices = torch.randint(0, shape[-1], of, generator=generator).byte()
    return table, indices, torch.randn(of, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "of"), SHAPES)
def test_lookup_and_its_gradient(
    shape: tuple[int, ...], of: tuple[int, ...], dtype: torch.dtype
) -> None:
    table, indices, upstream = example(shape, of, dtype)
    table.requires_grad_()
    value = lookup(table, indices)
    by_row = table.expand(of[0], -1) if len(shape) == 1 else table
    looked_up = torch.gather(by_row, 1, indices.view(of[0], -1).long()).view(of)
    assert torch.equal(value, looked_up)
    value.backward(upstream)
    expected = scattered(upstream, indices, shape)
    assert table.grad is not None
    assert table.grad.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps * max(1, np.abs(expected).max())
    np.testing.assert_allclose(
        table.grad.double().numpy(), expected, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize(("shape", "of"), [*SHAPES[:2], *SHAPES[3:]])
def test_gradcheck_to_second_order(shape: tuple[int, ...], of: tuple[int, ...]) -> None:
    table, indices, values = example(shape, of, torch.float64)
    table.requires_grad_()
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda t: lookup(t, indices), table)
    assert torch.autograd.gradgradcheck(lambda t: lookup(t, indices).square(), table)
    assert torch.autograd.gradcheck(lambda t, v: lookup(t.square(), indices) * v, (table, values))


def test_gradient_passes_straight_through() -> None:
    table, indices, upstream = example((4,), (6, 5))
    table.requires_grad_()
    weight = torch.randn(6, 5, requires_grad=True)
    lookup(table, indices, through=weight).backward(upstream)
    assert weight.grad is not None
    assert table.grad is not None
    assert torch.equal(weight.grad, upstream)
    np.testing.assert_allclose(table.grad.numpy(), scattered(upstream, indices, (4,)), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 63, 64, 1000, 300_001])
@pytest.mark.parametrize("rows", [0, 3])
def test_the_accelerators_sum_is_the_same(n: int, rows: int) -> None:
    """The path of CUDA devices, run here: lanes, remainders, several codebooks."""
    shape, of = ((5,), (n,)) if rows == 0 else ((rows, 5), (rows, n))
    _, indices, values = example(shape, of)
    found = module._scatter_sum(values, indices, torch.Size(shape))
    np.testing.assert_allclose(
        found.numpy(), scattered(values, indices, shape), atol=1e-4 * n**0.5, rtol=1e-5
    )


def test_sums_are_carried_in_float64() -> None:
    """Forty million equal float32 numbers: a float32 running sum would stop growing at 2**24."""
    n = 40_000_000
    values = torch.ones(1).expand(n)
    indices = torch.zeros(1, dtype=torch.uint8).expand(n)
    assert grouped_sum(values, indices, torch.Size((1,))).item() == n


@pytest.mark.parametrize("through", [False, True])
def test_compiled_export_and_transforms_see_plain_operators(through: bool) -> None:
    """`torch.func` transforms and exporters meet no custom function, and get the same numbers."""
    table, indices, upstream = example((4,), (6, 5))
    weight = torch.zeros(6, 5)

    def loss(t: Tensor, w: Tensor) -> Tensor:
        return (lookup(t, indices, through=w if through else None) * upstream).sum()

    by_table, by_weight = torch.func.grad(loss, argnums=(0, 1))(table, weight)
    np.testing.assert_allclose(by_table, scattered(upstream, indices, (4,)), rtol=1e-5)
    assert torch.equal(by_weight, upstream if through else torch.zeros(6, 5))
    per_sample = torch.vmap(lambda scale: torch.func.grad(loss)(table * scale, weight))
    assert per_sample(torch.ones(3)).shape == (3, 4)


def test_memory_is_written_again_only_when_nobody_holds_it() -> None:
    table, indices, _ = example((7,), (6400, 8))
    memory = module.Memory()
    first = lookup(table, indices, memory=memory)
    address, expected = first.data_ptr(), first.clone()
    second = lookup(table + 1, indices, memory=memory)
    assert second.data_ptr() != address
    assert torch.equal(first, expected)
    for keep in (lambda t: t.view(-1)[3:], lambda t: t.numpy(), lambda t: t.detach()):
        held = keep(second)
        before, copy_of = second.data_ptr(), np.asarray(held).copy()
        del second
        second = lookup(table + 2, indices, memory=memory)
        assert second.data_ptr() != before
        assert np.array_equal(np.asarray(held), copy_of)
    address = second.data_ptr()
    del second, held
    assert lookup(table, indices, memory=memory).data_ptr() == address


def test_memory_that_backward_still_needs_is_left_alone() -> None:
    table, indices, _ = example((7,), (6400, 8))
    memory = module.Memory()
    x = torch.randn(5, 8, requires_grad=True)  # its gradient needs the weight
    outputs = [
        torch.nn.functional.linear(x, lookup(factor * table, indices, memory=memory)).pow(2).sum()
        for factor in (1.0, 3.0)
    ]
    (found,) = torch.autograd.grad(sum(outputs), x)
    outputs = [(x @ (factor * table)[indices.long()].T).pow(2).sum() for factor in (1.0, 3.0)]
    (expected,) = torch.autograd.grad(sum(outputs), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.1)  # sums of 6,400 products


def test_copies_have_memory_of_their_own() -> None:
    table, indices, _ = example((7,), (6400, 8))
    memory = module.Memory()
    value = lookup(table, indices, memory=memory)
    for copied in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        assert lookup(table, indices, memory=copied).data_ptr() != value.data_ptr()


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [(16,), (1500, 6)])
def test_threads_change_no_bit(shape: tuple[int, ...], inference: bool) -> None:
    table, indices, values = example(shape, (1500, 1500))
    assert indices.numel() >= WORTHWHILE
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with torch.inference_mode(inference):
                found.append((lookup(table, indices), grouped_sum(values, indices, table.shape)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 16, 129, 256])
def test_values_gathered_in_pairs(k: int, dtype: torch.dtype) -> None:
    table, indices, _ = example((k,), (2, 512 * k + 1), dtype)
    table[-1] = torch.nan
    expected = table[indices.long()]
    flat = indices.view(-1)
    for part in (flat, flat[1:], flat[1:-1], flat[::2], indices.T):  # aligned, odd in every way
        value = lookup(table, part)
        wanted = table[part.long()]
        assert value.shape == part.shape
        assert torch.equal(value.view(torch.uint8), wanted.contiguous().view(torch.uint8))
    assert torch.equal(lookup(table, indices).nan_to_num(7), expected.nan_to_num(7))


def test_an_index_beyond_the_table_is_never_a_silent_zero() -> None:
    table, indices, _ = example((4,), (8192,))
    for place in (0, 1):  # the lower and the upper half of a pair
        wrong = indices.clone()
        wrong[place] = 4
        try:
            value = lookup(table, wrong)
        except IndexError:
            continue
        assert value[place].isnan()
