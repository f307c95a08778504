"""The survey of a model: its parameter tensors, whatever computes them now, and what rules reach.

A `Slot` is a tensor and the places where it stands; its `Candidate` is all that rules look at.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchclust.data_aware.blocks import evaluating
from torchclust.model.places import (
    clustered_weight,
    computed_from,
    is_covered,
    join,
    parameters_behind,
    parametrizations_of,
    underlying,
)
from torchclust.model.refusals import (
    CONV_TRANSPOSE,
    overlaps,
    why_not_subclassed,
    why_refused,
    why_skipped,
    why_unreadable,
)
from torchclust.model.rules import (
    TOO_SMALL,
    Candidate,
    Decision,
    Rules,
    advice,
    reaches,
    resolve_rules,
)
from torchclust.weight.config import ClusterConfig


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
        return 1 if isinstance(self.module, CONV_TRANSPOSE) else 0

    def value(self) -> Tensor:
        """What is clustered: the weight, or, behind a "nearest" lookup, the weight that trains."""
        own = clustered_weight(self.module, self.tensor_name)
        latent_counts = not is_covered(self.module, self.tensor_name)
        if own is not None and own.config.assignment == "nearest" and latent_counts:
            latent = parametrizations_of(self.module)[self.tensor_name].original
            assert isinstance(latent, Tensor)
            return latent.detach()
        with torch.no_grad():
            value = _read(self.module, self.tensor_name)
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
        parameter = underlying(slot.module, slot.tensor_name)
        if own is None and why_unreadable(parameter) is not None:
            shape = _shape(slot.module, slot.tensor_name, parameter)
            value = torch.empty(shape, dtype=parameter.dtype, device="meta")
        else:
            with torch.no_grad():
                value = slot.value() if own is None else _read(slot.module, slot.tensor_name)
        found.append((slot.candidate.name, value.detach(), decision))
    return found


def weights_read(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter tensor by name, as the very tensor that the last forward pass read.

    Of torch's parametrizations only inside the `parametrize.cached` in which that pass ran. What
    hooks compute, as those of pruning do, they left where the pass found it.
    """
    return {slot.candidate.name: getattr(slot.module, slot.tensor_name) for slot in slots_of(model)}


def planned(model: nn.Module, rules: Rules, *, strict: bool = True, **options: Any) -> list[str]:
    """Names of the tensors that `cluster_` would cluster; raises what it would raise of rules."""
    chosen = chosen_slots(model, rules, options, strict, advise=False)
    return [slot.candidate.name for slot, _ in chosen]


def chosen_slots(
    model: nn.Module,
    rules: Rules,
    options: Mapping[str, Any],
    strict: bool,
    *,
    advise: bool = True,
) -> list[tuple[Slot, ClusterConfig]]:
    """Return the slots that the rules cluster, each with its configuration."""
    slots = list(slots_of(model))
    candidates = [slot.candidate for slot in _looked_at_closely(slots)]
    found = resolve_rules(rules, candidates, options, strict=strict)
    hint = advice(rules, candidates, found) if advise else None
    if hint is not None:
        warnings.warn(hint, stacklevel=3)
    return [
        (slot, decision.config)
        for slot, decision in zip(slots, found, strict=True)
        if decision.config is not None
    ]


def _looked_at_closely(slots: Sequence[Slot]) -> list[Slot]:
    """The slots with what only a look at all of them, or at their classes, would refuse."""
    plain = {slot.candidate.name: underlying(slot.module, slot.tensor_name) for slot in slots}
    shared = overlaps(plain)
    closely = []
    for slot in slots:
        candidate, other = slot.candidate, shared.get(slot.candidate.name)
        if other is not None and candidate.refuse is None:
            refuse = (
                f"it shares memory with {other!r}, another parameter (a transposed or sliced view "
                f"of it); a lookup would part them. Tie them as one parameter first"
            )
            candidate = dataclasses.replace(candidate, refuse=refuse)
        elif candidate.refuse is None and candidate.skip is None:
            refused = filter(None, (why_not_subclassed(_own_class(m)) for m, _ in slot.places))
            candidate = dataclasses.replace(candidate, refuse=next(refused, None))
        closely.append(dataclasses.replace(slot, candidate=candidate))
    return closely


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
    computing = {
        id(inner)
        for module in model.modules()
        for holder in parametrizations_of(module).values()
        for inner in holder.modules()
    }
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in computing:
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
        tensor_name = computed_from(module, name)
        if parameter is parameters_behind(module, tensor_name)[0]:  # of weight_norm's two, once
            yield tensor_name, id(parameter)


def _describe(names: tuple[str, ...], places: tuple[tuple[nn.Module, str], ...]) -> Candidate:
    module, name = places[0]
    mro = (cls for owner, _ in places for cls in type(owner).__mro__)
    bases = {cls.__name__ for cls in mro if issubclass(cls, nn.Module)}
    base = _own_class(module)
    parameter = underlying(module, name)
    shape = _shape(module, name, parameter)
    return Candidate(
        names=names,
        classes=frozenset(bases - {"Module", f"Parametrized{base.__name__}"}),
        kind=base.__name__,
        n_elements=shape.numel(),
        n_dims=len(shape),
        skip=why_skipped(module, name),
        refuse=why_refused(module, name, parameter),
    )


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class below the one that torch's parametrizations derive from it."""
    return type(module).__bases__[0] if parametrizations_of(module) else type(module)


def _shape(module: nn.Module, name: str, parameter: Tensor) -> torch.Size:
    if is_lazy(parameter):
        return torch.Size((0, 0))
    own = clustered_weight(module, name)
    if own is not None:
        return own.shape
    if name in parametrizations_of(module):  # weight_norm's first tensor is one column
        with torch.no_grad():
            return _read(module, name).shape
    return parameter.shape


def _read(module: nn.Module, name: str) -> Tensor:
    """The tensor as eval mode computes it: read in training, spectral_norm's estimate moves on."""
    computing = (holder for key, holder in parametrizations_of(module).items() if key == name)
    with evaluating(*computing):
        value: Tensor = getattr(module, name)
        return value


def clustered_slots(model: nn.Module) -> Iterator[tuple[Slot, ClusterConfig]]:
    """Iterate over the slots that are clustered now, each with its configuration."""
    for slot in slots_of(model):
        own = clustered_weight(slot.module, slot.tensor_name)
        if own is not None:
            yield slot, own.config
