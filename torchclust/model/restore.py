"""`restore_`: a plain model becomes what a state dict was saved from.

In: a model and a clustered state dict. Its keys say which tensors to cluster and how; the model is
given that structure first (values are placeholders), then loaded. Out: the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchclust.activations.quantized import match_quantized_
from torchclust.model.cluster import ModuleT, strip_
from torchclust.model.places import clustered_weight, join, parametrizations_of, underlying
from torchclust.model.slots import slots_of
from torchclust.model.surgery import attach, make_for
from torchclust.weight.clustered import PARAMETERS
from torchclust.weight.config import ClusterConfig, config_from_bytes
from torchclust.weight.stored import rounded

_TRAINED = frozenset({"original", *PARAMETERS})  # in the weight's dtype
_CONFIG_KEY = re.compile(r"(?:(?P<path>.+)\.)?parametrizations\.(?P<name>[^.]+)\.0\.config_json")


def restore_(model: ModuleT, state_dict: Mapping[str, Any]) -> ModuleT:
    """Give a plain model the clusterings that a state dict was saved with, and load it.

    Args:
        model: the same architecture, clustered or not; any weights.
        state_dict: of a clustered model, or a Lightning checkpoint that holds one as
            ``"state_dict"``. One of a plain model is simply loaded.

    Returns:
        The same object, equal to the saved model to the bit and ready to train on.

    Raises:
        ValueError: the state dict names a module or tensor that this model lacks.
        RuntimeError: from ``load_state_dict``, if other tensors do not fit.

    Example:
        >>> import torch
        >>> from torchclust import cluster_, is_clustered, restore_
        >>> saved = cluster_(torch.nn.Linear(8, 8), 4).state_dict()
        >>> restored = restore_(torch.nn.Linear(8, 8), saved)
        >>> is_clustered(restored, "weight")
        True
    """
    state = state_dict.get("state_dict", state_dict)
    restore_structure_(model, state)
    model.load_state_dict(state)
    return model


def restore_structure_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the model clustered, and its activations rounded, exactly where the state dict's are.

    Values are left to its loading.
    """
    saved = {key: m for key in state if (m := _CONFIG_KEY.fullmatch(key))}
    fits = {
        (m["path"] or "", m["name"]): _tensors_under(state, key.removesuffix("0.config_json"))
        for key, m in saved.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, name in fits:
        owner = modules.get(path)
        if owner is None or not (hasattr(owner, name) or hasattr(owner, name + "_orig")):
            raise ValueError(
                f"the state dict has a clustered {join(path, name)!r}, this model has no such "
                f"parameter: restore_ needs the architecture that was saved"
            )
    present = {
        (path, name): _layout(holder.state_dict())
        for path, module in modules.items()
        for name, holder in parametrizations_of(module).items()
        if clustered_weight(module, name) is not None
    }
    # What fits already stays: an optimizer may hold these very parameters.
    if present != {place: _layout(tensors) for place, tensors in fits.items()}:
        _refuse_covered(fits)
        strip_(model, validate=False)
        for slot in slots_of(model):
            path, _, name = slot.candidate.name.rpartition(".")
            if (path, name) in fits:
                here = underlying(slot.module, slot.tensor_name)
                tensors = {key: tensor.to(here.device) for key, tensor in fits[path, name].items()}
                # `load_state_dict` converts too: Lightning restores, then makes modules bfloat16.
                for key in tensors.keys() & _TRAINED:
                    tensors[key] = tensors[key].to(here.dtype)
                attach(slot, make_for(slot, config_from_bytes(tensors["config_json"]), tensors))
    match_quantized_(model, state)


def _refuse_covered(fits: Mapping[tuple[str, str], Mapping[str, Tensor]]) -> None:
    for (path, name), tensors in fits.items():
        if any("." in key for key in tensors):
            raise ValueError(
                f"the state dict has another parametrization on top of the clustered "
                f"{join(path, name)!r}, which restore_ cannot make: cluster this model likewise, "
                f"register that parametrization, and call model.load_state_dict(state_dict)"
            )


def _tensors_under(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of one parametrization list by the names that `ClusteredWeight` gives them."""
    return {
        key.removeprefix(prefix).removeprefix("0."): value.detach().clone()
        for key, value in rounded(state, prefix + "0.").items()
        if key.startswith(prefix)
    }


def _layout(tensors: Mapping[str, Tensor]) -> tuple[ClusterConfig, dict[str, Any]]:
    """What must agree before values can be loaded into one clustered tensor."""
    plain = {key.removeprefix("0."): tensor for key, tensor in tensors.items()}
    config = config_from_bytes(plain.pop("config_json"))
    return config, {
        name: (tensor.shape, tensor.is_floating_point() or tensor.dtype)
        for name, tensor in plain.items()
    }
