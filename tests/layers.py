"""Every clusterable layer type, how to call it, and its clusterable tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    weights: tuple[str, ...] = ("weight",)

    def call(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
        """One output tensor, floating inputs cast to the dtype."""
        inputs = (x.to(dtype) if x.is_floating_point() else x for x in self.inputs())
        found = module(*inputs)
        while isinstance(found, tuple):
            found = found[0]
        return found


def _image(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape),)


def _tokens() -> tuple[Tensor, ...]:
    return (torch.arange(12).view(3, 4),)


def _three(width: int, key: int) -> Callable[[], tuple[Tensor, ...]]:
    def inputs() -> tuple[Tensor, ...]:
        shapes = ((4, 2, width), (4, 2, key), (4, 2, key))
        return tuple(torch.linspace(-1, 1, torch.Size(s).numel()).view(s) for s in shapes)

    return inputs


_LSTM = tuple(f"weight_{p}_l{i}{r}" for i in (0, 1) for p in ("ih", "hh") for r in ("", "_reverse"))
LAYERS = {
    "Linear": Layer(lambda: nn.Linear(12, 9), _image(2, 12)),
    "Bilinear": Layer(
        lambda: nn.Bilinear(5, 6, 4),
        lambda: (torch.linspace(-1, 1, 10).view(2, 5), torch.linspace(-1, 1, 12).view(2, 6)),
    ),
    "Conv1d": Layer(lambda: nn.Conv1d(4, 6, 3), _image(2, 4, 8)),
    "Conv2d": Layer(lambda: nn.Conv2d(4, 6, 3, groups=2), _image(2, 4, 5, 5)),
    "Conv3d": Layer(lambda: nn.Conv3d(2, 3, 2), _image(1, 2, 3, 3, 3)),
    "ConvTranspose1d": Layer(lambda: nn.ConvTranspose1d(4, 6, 3), _image(2, 4, 5)),
    "ConvTranspose2d": Layer(lambda: nn.ConvTranspose2d(4, 6, 3), _image(2, 4, 3, 3)),
    "ConvTranspose3d": Layer(lambda: nn.ConvTranspose3d(2, 3, 2), _image(1, 2, 3, 3, 3)),
    "Embedding": Layer(lambda: nn.Embedding(12, 7), _tokens),
    "EmbeddingBag": Layer(lambda: nn.EmbeddingBag(12, 7), _tokens),
    "RNN": Layer(lambda: nn.RNN(6, 5), _image(3, 2, 6), ("weight_ih_l0", "weight_hh_l0")),
    "LSTM": Layer(lambda: nn.LSTM(6, 5, 2, bidirectional=True), _image(3, 2, 6), _LSTM),
    "LSTM-proj": Layer(
        lambda: nn.LSTM(6, 8, proj_size=4), _image(3, 2, 6), ("weight_ih_l0", "weight_hh_l0")
    ),
    "GRU": Layer(lambda: nn.GRU(6, 5), _image(3, 2, 6), ("weight_ih_l0", "weight_hh_l0")),
    "RNNCell": Layer(lambda: nn.RNNCell(6, 5), _image(2, 6), ("weight_ih", "weight_hh")),
    "LSTMCell": Layer(lambda: nn.LSTMCell(6, 5), _image(2, 6), ("weight_ih", "weight_hh")),
    "GRUCell": Layer(lambda: nn.GRUCell(6, 5), _image(2, 6), ("weight_ih", "weight_hh")),
    "MultiheadAttention": Layer(
        lambda: nn.MultiheadAttention(8, 2), _three(8, 8), ("in_proj_weight", "out_proj.weight")
    ),
    "MultiheadAttention-separate": Layer(
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=6),
        _three(8, 6),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"),
    ),
}
