"""What is kept between evaluations is what the state dict would give, whoever edits what."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from torchclust import cluster_, restore_
from torchclust.weight.evaluation_cache import fingerprint

MODES: list[dict[str, Any]] = [
    {"assignment": a, "codebook_dtype": d}
    for a in ("fixed", "nearest")
    for d in ("float32", "int8")
]
IDS: Callable[[dict[str, str]], str] = lambda m: "-".join(m.values())  # noqa: E731


def layer(width: int, mode: dict[str, Any]) -> nn.Linear:
    torch.manual_seed(0)
    return cluster_(nn.Linear(width, width), 16, init="linear", max_iter=1, **mode)


def mask(weight: Tensor) -> None:
    weight.data.mul_(torch.arange(weight.numel()).view_as(weight) % 2)


def reverse(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0).clone())


def one_value(weight: Tensor) -> None:
    weight.data[-1, -1] += 1


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("width", [16, 300])
@pytest.mark.parametrize("edit", [mask, reverse, one_value])
def test_an_edit_of_the_weight_handed_out_does_not_stick(
    edit: Callable[[Tensor], None], width: int, mode: dict[str, Any]
) -> None:
    model, x = layer(width, mode), torch.randn(2, width)
    with torch.no_grad():
        model(x)
        edit(model.weight)
        restored = restore_(nn.Linear(width, width), model.state_dict())
        assert torch.equal(model(x), restored(x))


@pytest.mark.parametrize("mode", MODES, ids=IDS)
@pytest.mark.parametrize("width", [16, 300])
def test_an_edit_of_any_source_is_seen(width: int, mode: dict[str, Any]) -> None:
    model = layer(width, mode)
    with torch.no_grad():
        before = model.weight.clone()
        model.parametrizations.weight.original.data.neg_()
        after = model.weight.clone()
        assert not torch.equal(before, after)
        restored = restore_(nn.Linear(width, width), model.state_dict())
        assert torch.equal(after, restored.weight)


def test_an_edit_of_indices_is_seen() -> None:
    model = layer(300, {})
    with torch.no_grad():
        model.weight  # noqa: B018
        model.parametrizations.weight[0].indices.data.zero_()
        assert len(model.weight.unique()) == 1


@pytest.mark.slow
def test_a_latent_changed_by_another_process_is_seen() -> None:
    model = layer(300, {"assignment": "nearest"})
    model.share_memory()
    with torch.no_grad():
        before = model.weight.clone()
        # A function of torch's own: the child need not find this module.
        mp.spawn(partial(Tensor.mul_, model.parametrizations.weight.original.detach()))
        assert not torch.equal(model.weight, before)


@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), lambda: nn.LSTM(64, 16)])
def test_one_thread_evaluates_while_another_trains(make: Callable[[], nn.Module]) -> None:
    model, x, failed = cluster_(make(), 4), torch.randn(2, 64), []
    done, interval = threading.Event(), sys.getswitchinterval()

    def evaluate() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    model(x)
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for _ in range(150):
            model.zero_grad()
            found = model(x)
            (found if isinstance(found, Tensor) else found[0]).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert failed == []


@pytest.mark.parametrize("n", [1, 7, 1021 * 2, 1021 * 8 + 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.bool])
def test_fingerprints_tell_every_single_edit(n: int, dtype: torch.dtype) -> None:
    tensor = (torch.arange(n) % 100).to(dtype)
    first = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == first
    for place in (0, n // 2, n - 1):
        edited = tensor.clone()
        edited[place] = 1 - edited[place].int()
        assert fingerprint(edited) != first
