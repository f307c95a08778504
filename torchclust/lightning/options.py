"""What `WeightClustering` takes: the fields that LightningCLI parses, and what was left unsaid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypedDict

from torch import Tensor

from torchclust.model.rules import Rules, check_options
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


def check_names(callback: Callable[..., Any], options: Iterable[str]) -> None:
    """Refuse an option that neither the callback nor `cluster_` has: the name says whose it was.

    Raises:
        TypeError: names the option that was meant.
    """
    own = [name for name in inspect.signature(callback).parameters if name != "options"]
    others = (name for name in options if name != "n_clusters")  # the rules say where that goes
    check_options(others, [*own, *Options.__annotations__], "WeightClustering(..., {})")


def of_rules(options: Options) -> dict[str, Any]:
    """The options that say what is clustered how."""
    return {key: value for key, value in options.items() if key not in BESIDE_RULES}


def leaving_out(rules: Rules, patterns: Sequence[str]) -> Rules:
    """The rules with the patterns as last ones, which leave what they match alone."""
    if not patterns:
        return rules
    given = rules if isinstance(rules, Mapping) else {"*": rules}
    return {p: rule for p, rule in given.items() if p not in patterns} | dict.fromkeys(patterns)
