"""Networks whose activation ranges were learned, for the tests of both roads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from export_networks import CASES, Case, randomize_norms, resnet
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.activations.quantized import quantize_activations_


class Mixed(nn.Module):
    """Residual sum, concatenation, SiLU, hard-swish, gates, pools and a softmax, as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.c = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        y = self.relu(self.norm(self.b(x)) + x)
        z = F.silu(self.c(torch.cat([x, y, F.max_pool2d(y, 3, 1, 1)], 1)))
        z = F.hardswish(F.avg_pool2d(z, 2))
        z = z * torch.sigmoid(F.adaptive_avg_pool2d(z, 1))
        return F.softmax(self.head(F.adaptive_avg_pool2d(z, 1).flatten(1)), 1)


NETWORKS = {
    "mixed": Case(Mixed),
    "resnet": Case(resnet),
    **{name: CASES[name] for name in ("squeeze_excite", "encoder_decoder", "two_in_two_out")},
}


def trained(case: Case) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """A model whose ranges have moved away from the data that it is calibrated on."""
    torch.manual_seed(0)
    model = cluster_(randomize_norms(case.build(), tiny=False), 16, codebook_dtype="int8")
    inputs = [case.inputs(seed) for seed in range(24)]
    batch = tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
    quantize_activations_(model, batch).train()
    for _ in range(20):
        model(*(1.25 * x for x in batch))
    return model.eval(), inputs
