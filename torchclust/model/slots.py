"""The survey of a model: its parameter tensors, whatever computes them now, and what rules reach.

A `Slot` is a tensor and the places where it stands; its `Candidate` is all that rules look at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchclust.model.places import (
    clustered_weight,
    join,
    parameters_behind,
    parametrizations_of,
    underlying,
)
from torchclust.model.rules import TOO_SMALL, Candidate, Decision, Rules, reaches, resolve_rules
from torchclust.weight.config import ClusterConfig

_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_CONV_TRANSPOSE)
_CLUSTERABLE: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, *_CONV), r"weight"),
    ((nn.RNNBase, nn.RNNCellBase), r"weight_(ih|hh).*"),
    ((nn.MultiheadAttention,), r"(in|q|k|v)_proj_weight"),
)
"""By default: these modules' tensors whose whole name matches. Attention's out-projection is a
Linear of its own."""


@dataclass(frozen=True)
class Slot:
    """A parameter tensor and the places where it stands: one, or several where it is tied."""

    places: tuple[tuple[nn.Module, str], ...]
    candidate: Candidate

    @property
    def module(self) -> nn.Module:
        """The module of the first place."""
        return self.places[0][0]

    @property
    def tensor_name(self) -> str:
        """The tensor's attribute there."""
        return self.places[0][1]

    @property
    def channel_dim(self) -> int:
        """The weight's output-channel dimension: 1 for ConvTranspose, else 0."""
        return 1 if isinstance(self.module, _CONV_TRANSPOSE) else 0

    def value(self) -> Tensor:
        """What is clustered: the weight, or, behind a "nearest" lookup, the weight that trains."""
        own = clustered_weight(self.module, self.tensor_name)
        if own is not None and own.config.assignment == "nearest":
            latent = parametrizations_of(self.module)[self.tensor_name].original
            assert isinstance(latent, Tensor)
            return latent.detach()
        with torch.no_grad():
            value: Tensor = getattr(self.module, self.tensor_name)
            pruned = getattr(self.module, self.tensor_name + "_mask", None)
            if isinstance(pruned, Tensor):  # torch.nn.utils.prune: up to date only after a forward
                unpruned: Tensor = getattr(self.module, self.tensor_name + "_orig")
                value = unpruned * pruned
            return value.detach()


def decisions(model: nn.Module) -> list[tuple[str, Tensor, Decision]]:
    """For every parameter tensor: its name, its value, its config or why it was left alone."""
    most = max((config.n_clusters for _, config in clustered_slots(model)), default=0)
    found = []
    for slot in slots_of(model):
        own = clustered_weight(slot.module, slot.tensor_name)
        reason = slot.candidate.refuse or slot.candidate.skip
        if reason is None and slot.candidate.n_elements <= most:
            reason = TOO_SMALL
        decision = (
            Decision(None, reason or "no rule clusters it")
            if own is None
            else Decision(own.config, None)
        )
        with torch.no_grad():
            value = slot.value() if own is None else getattr(slot.module, slot.tensor_name)
        found.append((slot.candidate.name, value.detach(), decision))
    return found


@contextmanager
def live_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every parameter tensor by name, as the very tensor that forward calls inside will read."""
    with parametrize.cached():
        yield {
            slot.candidate.name: getattr(slot.module, slot.tensor_name) for slot in slots_of(model)
        }


def planned(model: nn.Module, rules: Rules, *, strict: bool = True, **options: Any) -> list[str]:
    """Names of the tensors that `cluster_` would cluster; raises what it would raise of rules."""
    return [slot.candidate.name for slot, _ in chosen_slots(model, rules, options, strict)]


def chosen_slots(
    model: nn.Module, rules: Rules, options: Mapping[str, Any], strict: bool
) -> list[tuple[Slot, ClusterConfig]]:
    """Return the slots that the rules cluster, each with its configuration."""
    slots = list(slots_of(model))
    found = resolve_rules(rules, [s.candidate for s in slots], options, strict=strict)
    return [
        (slot, decision.config)
        for slot, decision in zip(slots, found, strict=True)
        if decision.config is not None
    ]


def parameters_matching(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """The parameters behind every tensor that a pattern reaches, as it reaches them in a rule."""
    return [
        parameter
        for slot in slots_of(model)
        if reaches(pattern, slot.candidate)
        for parameter in parameters_behind(slot.module, slot.tensor_name)
    ]


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every parameter tensor of the model, whatever computes it now; tied ones once."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        for name, identity in _tensor_names(module):
            places.setdefault(identity, []).append((join(path, name), module, name))
    for found in places.values():
        names = tuple(dict.fromkeys(path for path, _, _ in found))
        tied = tuple(dict.fromkeys((module, name) for _, module, name in found))
        yield Slot(tied, _describe(names, tied))


def _tensor_names(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's logical tensor names, each with what identifies the tensor across modules."""
    for name, holder in parametrizations_of(module).items():
        own = clustered_weight(module, name)
        yield name, id(holder if own is None else own)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        stem = re.sub(r"_(orig|g)$", "", name)
        computed = stem != name and stem not in module._parameters and hasattr(module, stem)
        if computed:
            yield stem, id(parameter)
        elif not (name.endswith("_v") and name[:-2] + "_g" in module._parameters):
            yield name, id(parameter)


def _describe(names: tuple[str, ...], places: tuple[tuple[nn.Module, str], ...]) -> Candidate:
    module, name = places[0]
    mro = (cls for owner, _ in places for cls in type(owner).__mro__)
    bases = {cls.__name__ for cls in mro if issubclass(cls, nn.Module)}
    base = type(module) if not parametrize.is_parametrized(module) else type(module).__bases__[0]
    parameter = underlying(module, name)
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return Candidate(
        names=names,
        classes=frozenset(bases - {"Module", f"Parametrized{base.__name__}"}),
        kind=base.__name__,
        n_elements=0 if lazy else _n_elements(module, name, parameter),
        skip=_why_skipped(module, name),
        refuse=_why_refused(module, name, parameter),
    )


def _why_skipped(module: nn.Module, name: str) -> str | None:
    if not any(
        isinstance(module, classes) and re.fullmatch(pattern, name)
        for classes, pattern in _CLUSTERABLE
    ):
        return "not a weight that is clustered by default"
    if isinstance(module, _CONV) and 1 < module.groups == module.in_channels:
        return "depthwise convolution"
    return None


def _why_refused(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "it is lazy and has no values yet; run one batch through the model first"
    if parameter.is_meta:
        return "it is on the meta device and has no values; load the weights first"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, and only floating-point weights are clustered"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and name == "weight":
        if module.sparse:
            return (
                "sparse=True gives gradients by row, and a shared centroid has none; "
                "build the embedding with sparse=False"
            )
        if module.max_norm is not None:
            return (
                "max_norm rescales rows in place, which would break up the clusters; "
                "build the embedding with max_norm=None"
            )
    if name + "_orig" in module._parameters and name + "_mask" not in module._buffers:
        return (
            "a forward hook recomputes it (spectral_norm?); remove that first, or use "
            "torch.nn.utils.parametrizations"
        )
    return None


def _n_elements(module: nn.Module, name: str, parameter: Tensor) -> int:
    own = clustered_weight(module, name)
    if own is not None:
        return own.shape.numel()
    if parametrize.is_parametrized(module, name):  # weight_norm's first tensor is one column
        with torch.no_grad():
            weight: Tensor = getattr(module, name)
            return weight.numel()
    return parameter.numel()


def clustered_slots(model: nn.Module) -> Iterator[tuple[Slot, ClusterConfig]]:
    """Iterate over the slots that are clustered now, each with its configuration."""
    for slot in slots_of(model):
        own = clustered_weight(slot.module, slot.tensor_name)
        if own is not None:
            yield slot, own.config
