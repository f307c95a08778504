"""How far apart the classes are that two networks see."""

from __future__ import annotations

import torch
from torch import Tensor


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of class probabilities, in nats.

    Classes that the wanted logits mask by -inf cannot come up, whatever the others make of them.

    Args:
        logits: of shape ``(n, classes)``, floating; differentiable.
        wanted: of that shape and dtype.
    """
    after, before = logits.log_softmax(1), wanted.log_softmax(1)
    apart = (before.exp() * (before - after)).masked_fill(before == -torch.inf, 0)
    return apart.sum(1).mean()
