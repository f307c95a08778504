"""Blocks that hand constants on, and how often a block runs while its layers are fitted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchclust
from torchclust.data_aware.batches import Call
from torchclust.data_aware.blocks import find_blocks
from torchclust.data_aware.layers import Side


class Scaled(nn.Module):
    """A residual block that is called with something beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor, share: Any = None, *, drop: float | None = None) -> Tensor:
        scale = 1.0 if share is None else float(share)
        inner: Tensor = self.narrow(self.widen(x).relu())
        return x + scale * (1.0 if drop is None else drop) * inner


class Stack(nn.Module):
    def __init__(self, beside: Any, depth: int = 3) -> None:
        super().__init__()
        self.beside, self.blocks = beside, nn.ModuleList(Scaled() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            share = len(x) if self.beside == "size" else self.beside
            x = block(x, share, drop=0.25 * number)
        return x


def holders(model: Stack) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("beside", [None, 0.5, True])
def test_constants_beside_the_input_go_along(beside: Any) -> None:
    model, batches = Stack(beside).eval(), [Call((torch.randn(n, 6),)) for n in (4, 3)]
    blocks = find_blocks(model, batches[0], holders(model))
    assert [block.chained for block in blocks] == [False, True, True]
    side = Side(model, batches)
    with torch.no_grad():
        for block in blocks:
            side.enter(block)
            for call, batch in zip(side.stored, batches, strict=True):
                reached = block.input_of(model, batch)
                assert torch.equal(call.args[0], reached.args[0])
                assert (call.args[1:], call.kwargs) == (reached.args[1:], reached.kwargs)


@pytest.mark.parametrize("beside", ["size", torch.ones(1), [torch.ones(1)]])
def test_what_may_differ_between_batches_breaks_the_chain(beside: Any) -> None:
    if isinstance(beside, list):
        beside = beside[0].requires_grad_()
    model = Stack(beside).eval()
    blocks = find_blocks(model, Call((torch.randn(4, 6),)), holders(model))
    assert not any(block.chained for block in blocks)
    torchclust.cluster_(model, 4, inputs=[torch.randn(n, 6) for n in (40, 7)])


def test_work_grows_with_the_blocks_and_not_with_their_square() -> None:
    def runs(depth: int) -> int:
        model, seen = Stack(0.5, depth).eval(), list[nn.Module]()
        for name, module in model.named_modules():
            if name.endswith("narrow"):  # the copy that is clustered has the hook too
                module.register_forward_pre_hook(lambda module, _: seen.append(module))
        torchclust.cluster_(model, 4, inputs=[torch.randn(16, 6)] * 4)
        return len(seen)

    assert runs(6) - runs(4) == runs(4) - runs(2) > 0
