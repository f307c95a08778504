"""The models of ``tests/packing/packed-v*.packed``: all codings, most dtypes, and no chance.

python tests/packed_sample.py FILE    # how the newest of the files was written
"""

import sys

import torch
from torch import Tensor, nn

from torchclust.packing.pack import save_packed


def ramp(*shape: int) -> Tensor:
    """Uneven integers 0..15, the same everywhere and always."""
    n = torch.arange(torch.Size(shape).numel())
    return (n * n % 101 * n % 16).reshape(shape)


class Sample(nn.Module):
    """Parameters and buffers with fixed values; it computes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(10, 24, bias=False)
        self.twin = nn.Linear(10, 24, bias=False)
        self.twin.weight = self.shared.weight
        self.by_channel = nn.Conv1d(14, 5, 5).half()
        self.codes = nn.ConvTranspose1d(24, 4, 3)
        self.narrow = nn.Linear(30, 3).bfloat16()
        self.sparse = nn.Linear(21, 10, bias=False)
        self.register_buffer("steps", torch.tensor(12345678901))
        self.register_buffer("mask", ramp(70) % 3 == 0)
        self.register_buffer("none", torch.zeros(3, 0))
        self.register_buffer("wave", torch.complex(*torch.arange(4.0).view(2, 2)))
        self.register_buffer("odd", torch.tensor([float("nan"), -0.0, 1e-45], dtype=torch.float64))
        self.fill_()

    @torch.no_grad()
    def fill_(self) -> None:
        """Set every value."""
        self.shared.weight.copy_((ramp(24, 10) % 5 - 2) / 7)
        channels = torch.arange(1, 6).view(5, 1, 1)
        self.by_channel.weight.copy_((ramp(5, 14, 5) % 4 + channels).sqrt() - 2)
        self.by_channel.bias.copy_(torch.arange(5) / 3)
        code = torch.tensor([-100, -31, 0, 0, 31, 100])[ramp(24, 4, 3) % 6]
        self.codes.weight.copy_(code * (torch.tensor([3.0, 5.0, 7.0, 11.0]) / 1000).view(1, 4, 1))
        self.codes.bias.zero_()
        scale = (torch.tensor([[3.0], [5.0], [7.0]]) / 1000).bfloat16()
        self.narrow.weight.copy_(torch.tensor([-9, 0, 9, 50]).bfloat16()[ramp(3, 30) % 4] * scale)
        self.narrow.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
        dense = torch.arange(210.0).view(10, 21).sub(99.5).div(64)
        self.sparse.weight.copy_(dense * (ramp(10, 21) > 13))


class Emptied(Sample):
    """Rows and columns that hold little, in several classes; values that are multiples of one."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse.weight.data.div_(3)  # so that literals do not deflate
        kept = (torch.arange(40) % 4 > 1)[:, None] & (torch.arange(50) % 3 > 0)
        self.register_buffer("emptied", (ramp(40, 50) % 9 - 4).sqrt().nan_to_num() * kept)
        self.register_buffer("short", torch.arange(1.0, 61.0).sqrt().mul(64).round() / 256)
        self.register_buffer("even", (ramp(30, 20) % 7 - 3) * torch.tensor(0.3))


if __name__ == "__main__":
    print(save_packed(Emptied(), sys.argv[1]))
