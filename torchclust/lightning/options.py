"""What `WeightClustering` takes: the fields that LightningCLI parses, and what was left unsaid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from torchclust.model.rules import Rules
from torchclust.weight.config import Assignment, CodebookDtype, Gradient, Granularity, Init

BESIDE_RULES = ("importance", "inputs", "seed")


class Options(TypedDict, total=False):
    """What `torchclust.cluster_` takes beside the rules; typed, so that LightningCLI parses it."""

    codebook_dtype: CodebookDtype
    init: Init
    max_iter: int
    granularity: Granularity
    group_size: int | None
    assignment: Assignment
    gradient: Gradient
    preserve_sparsity: bool
    rate: float
    importance: Mapping[str, Tensor] | None
    inputs: Iterable[Any] | None
    strict: bool
    seed: int


class Unsaid(int):
    """The number of clusters where none was asked for: no clustering contradicts it."""


DEFAULT = Unsaid(16)


def of_rules(options: Options) -> dict[str, Any]:
    """The options that say what is clustered how."""
    return {key: value for key, value in options.items() if key not in BESIDE_RULES}


def leaving_out(rules: Rules, patterns: Sequence[str]) -> Rules:
    """The rules with the patterns as last ones, which leave what they match alone."""
    if not patterns:
        return rules
    given = rules if isinstance(rules, Mapping) else {"*": rules}
    return {p: rule for p, rule in given.items() if p not in patterns} | dict.fromkeys(patterns)
