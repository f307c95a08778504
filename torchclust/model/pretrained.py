"""Hugging Face models with tied weights: their own saving seeks a weight by its plain name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from torchclust.model.slots import Slot


def warn_of_plain_names(model: nn.Module, slots: Iterable[Slot]) -> None:
    """Warn where `save_pretrained` and `tie_weights` will not find a weight any more.

    They look tied weights up as parameters, and a clustered one is computed. Said before training:
    otherwise the first checkpoint would say it, in terms of shared memory.

    Args:
        model: whatever is clustered.
        slots: the tensors to cluster.
    """
    tied = next((slot.candidate.names for slot in slots if len(slot.places) > 1), None)
    if tied is None or not any(_saves_itself(module) for module in model.modules()):
        return
    warnings.warn(
        f"{tied[0]!r} is tied to {tied[1]!r}, and save_pretrained() and tie_weights() look for "
        f"both by these names, which clustered weights do not have. Call strip_(model) before "
        f"them, it keeps the tie; until then save the state dict:  "
        f"safetensors.torch.save_model(model, path)",
        stacklevel=3,
    )


def _saves_itself(module: nn.Module) -> bool:
    return all(callable(getattr(module, name, None)) for name in ("save_pretrained", "tie_weights"))
