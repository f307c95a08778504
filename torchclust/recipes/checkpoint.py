"""A checkpoint, clustered or plain, into the model or module of a recipe."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from torchclust.model.restore import restore_
from torchclust.recipes.section import RecipeError


def load_checkpoint_(model: nn.Module, file: Path, section: str = "model") -> nn.Module:
    """Load a state dict, clustered or plain, into `model`, in place.

    Takes what ``torch.save(model.state_dict(), file)`` writes, ``.safetensors``, and Lightning's
    checkpoints. Names that all begin with ``model.`` lose that, unless the model itself has such.
    """
    try:
        content = _read(file)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n", 1)[0]
        raise RecipeError(
            f"{section}.checkpoint: cannot read {file.absolute()}: {reason}"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(
            f"{section}.checkpoint: {file} is no checkpoint that loads without running code; write "
            "one with torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"{section}.checkpoint: {file} holds a {found}, no state dict")
    has_prefix = all(str(name).startswith("model.") for name in model.state_dict())
    if content and not has_prefix and all(str(name).startswith("model.") for name in content):
        content = {name.removeprefix("model."): value for name, value in content.items()}
    try:
        return restore_(model, content)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"{section}.checkpoint: {file} does not fit the {section}: {reason}"
        ) from error


def _read(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)
