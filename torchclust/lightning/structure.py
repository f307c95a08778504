"""What a callback's rules find clustered already, what is left to cluster, what contradicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from torchclust.lightning.options import Options, Unsaid, of_rules
from torchclust.model.clustering import is_clustered, named_clusterings
from torchclust.model.places import clustered_weight
from torchclust.model.restore import restore_structure_
from torchclust.model.rules import Rules
from torchclust.model.slots import chosen_slots
from torchclust.weight.config import ClusterConfig

if TYPE_CHECKING:
    from torchclust.lightning.freezing import Freezer


def remaining(model: nn.Module, rules: Rules, options: Options) -> dict[str, ClusterConfig]:
    """The tensors that the rules cluster and that are not clustered yet, each with its config."""
    return {
        slot.candidate.name: config
        for slot, config in _chosen(model, rules, options)
        if clustered_weight(slot.module, slot.tensor_name) is None
    }


def check_contradictions(
    model: nn.Module,
    rules: Rules,
    options: Options,
    agreed: Mapping[str, ClusterConfig] | None = None,
) -> None:
    """Refuse rules that ask for another clustering than a tensor has.

    A rule for everything (``"*"``) is one for the rest where something is left to cluster.

    Args:
        model: clustered, at least in part.
        rules: asked for.
        options: asked for.
        agreed: clusterings that are no contradiction, whatever the rules say.
    """
    left = remaining(model, rules, options)
    named = {slot.candidate.name for slot, _ in _chosen(model, _specific(rules), options)}
    for slot, config in _chosen(model, rules, options):
        name, own = slot.candidate.name, clustered_weight(slot.module, slot.tensor_name)
        if own is None or (left and name not in named) or (agreed or {}).get(name) == own.config:
            continue
        for field in _differing(own.config, config, rules, options):
            raise ValueError(
                f"{name!r} is clustered already, with {field}={getattr(own.config, field)!r}, and "
                f"WeightClustering asks for {getattr(config, field)!r}. To keep it, ask for the "
                f"same or leave it out; to cluster anew, torchclust.strip_(module) first, without "
                f"ckpt_path"
            )


def match_structure(
    freezer: Freezer,
    asked: tuple[Rules, Options] | None,
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Make the module clustered where the incoming state is, before its tensors are looked up."""
    own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    before = {name: clustering.config for name, clustering in named_clusterings(module)}
    restore_structure_(module, own)
    if not is_clustered(module):
        return
    if asked is not None:
        check_contradictions(module, *asked, before)
    freezer.freeze_parameters_(module)  # optimizers built hereafter see the same as when saved


def _chosen(model: nn.Module, rules: Rules, options: Options) -> list[Any]:
    given = of_rules(options)
    strict = bool(given.pop("strict", True))
    return chosen_slots(model, rules, given, strict, advise=False) if rules != {} else []


def _specific(rules: Rules) -> Rules:
    given = rules if isinstance(rules, Mapping) else {}
    return {pattern: rule for pattern, rule in given.items() if pattern != "*"}


def _differing(
    own: ClusterConfig, asked: ClusterConfig, rules: Rules, options: Options
) -> list[str]:
    """The fields that differ, of those that were asked for and still matter after the fit."""
    fields = {field.name for field in dataclasses.fields(ClusterConfig)} - {"init", "max_iter"}
    everything = rules.get("*") if isinstance(rules, Mapping) else rules
    said = set(of_rules(options)) if isinstance(everything, Unsaid) else fields
    return [name for name in sorted(fields & said) if getattr(own, name) != getattr(asked, name)]
