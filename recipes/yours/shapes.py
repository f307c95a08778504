"""Discs and squares in noise, made as they are needed: images for the two examples beside it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

SIZE = 48
KINDS = ("disc", "square", "cross")


class Shapes(Dataset[tuple[Tensor, Tensor, Tensor, Tensor]]):
    """Images (1, 48, 48) with one shape each: image, mask of kinds, kind, box in [0, 1].

    The mask is 0 where there is nothing, else 1 + the kind. A box is centre and size, x before y.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if index >= self.count:
            raise IndexError(index)
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        kind = int(torch.randint(len(KINDS), (), generator=random))
        width, height = (torch.rand(2, generator=random) * 0.3 + 0.2).tolist()
        x, y = (torch.rand(2, generator=random) * 0.5 + 0.25).tolist()
        places = (torch.arange(SIZE) + 0.5) / SIZE
        across, down = (places - x) / (width / 2), ((places - y) / (height / 2))[:, None]
        inside = (across.abs() <= 1) & (down.abs() <= 1)
        if kind == 0:
            inside = across**2 + down**2 <= 1
        elif kind == 2:
            inside &= (across.abs() <= 0.35) | (down.abs() <= 0.35)
        contrast = float(torch.rand((), generator=random)) * 0.5 + 0.3
        image = 0.2 * torch.randn(SIZE, SIZE, generator=random) + contrast * inside
        box = torch.tensor([x, y, width, height])
        return image[None], inside.long() * (1 + kind), torch.tensor(kind), box
