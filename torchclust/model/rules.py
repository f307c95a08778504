"""Rules: which tensor gets which configuration.

Nothing here knows a tensor or a module: rules are resolved over `Candidate`s, plain descriptions
that `torchclust.model.slots` draws from a model. So every message about rules is raised in one
place, before anything is fitted or changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torchclust.weight.config import ClusterConfig

TOO_SMALL = "a tensor needs more elements than clusters"
UNUSUAL = "not a weight that is clustered by default"


Rule: TypeAlias = int | ClusterConfig | Mapping[str, Any] | None
Rules: TypeAlias = int | ClusterConfig | Mapping[str, Rule]


@dataclass(frozen=True)
class Candidate:
    """One parameter tensor as the rules see it.

    ``names`` holds every name of a tied tensor; ``classes`` the class names of its modules and
    their bases; ``kind`` the class as messages name it. ``skip`` says why it is not clustered
    unless a rule names it; ``refuse`` why it cannot be clustered at all.
    """

    names: tuple[str, ...]
    classes: frozenset[str]
    kind: str
    n_elements: int
    n_dims: int = 2
    skip: str | None = None
    refuse: str | None = None

    @property
    def name(self) -> str:
        """The first name, under which the tensor is reported."""
        return self.names[0]


@dataclass(frozen=True)
class Decision:
    """What the rules say of one candidate: a config, or the reason why it is left alone."""

    config: ClusterConfig | None
    skipped: str | None


def resolve_rules(
    rules: Rules,
    candidates: Sequence[Candidate],
    options: Mapping[str, Any],
    *,
    strict: bool = True,
) -> list[Decision]:
    """Decide for every candidate, in order; the last rule that matches wins.

    A rule *names* a tensor when its pattern is the tensor's full name, or when its pattern reaches
    nothing that is clustered by default (``"*.depthwise.weight"``). What is skipped by default is
    clustered only where a rule names it, so ``"*"`` never reaches biases and norms. A class name
    reaches tensors of two dimensions and more.

    Raises:
        TypeError, ValueError: invalid rules; with ``strict`` also a pattern that matches nothing,
            or that asks for something that cannot be done. Without it those are warnings.
    """
    chosen: list[tuple[ClusterConfig | None, bool] | None] = [None] * len(candidates)
    for pattern, config in _as_mapping(rules, options).items():
        matches = [i for i, c in enumerate(candidates) if reaches(pattern, c)]
        if not matches:
            _complain(_matches_nothing(pattern, candidates), strict)
        if config is not None:
            vectors = [i for i in matches if _only_by_class(pattern, candidates[i])]
            matches = [i for i in matches if i not in vectors]
            if vectors and not matches:
                _complain(_only_vectors(pattern, candidates[vectors[0]]), strict)
        usual = [i for i in matches if candidates[i].skip is None]
        for i in matches:
            named = pattern in candidates[i].names or (not usual and pattern != "*")
            if named or i in usual or config is None:
                chosen[i] = (config, named)
    return [
        _decide(candidate, choice, strict)
        for candidate, choice in zip(candidates, chosen, strict=True)
    ]


def _decide(
    candidate: Candidate, choice: tuple[ClusterConfig | None, bool] | None, strict: bool
) -> Decision:
    if choice is None:
        return Decision(None, candidate.refuse or candidate.skip or "no rule matches it")
    config, named = choice
    if config is None:
        return Decision(None, "a rule leaves it alone")
    too_small = candidate.n_elements <= config.n_clusters
    reason = candidate.refuse or (TOO_SMALL if too_small else None)
    if reason is None:
        return Decision(config, None)
    if named or candidate.refuse:
        _complain(_cannot_cluster(candidate, config, reason), strict)
    return Decision(None, reason)


def _as_mapping(rules: Rules, options: Mapping[str, Any]) -> dict[str, ClusterConfig | None]:
    """Any form of ``rules`` as {pattern: config}; every config is validated here."""
    _check_fields(options, "cluster_(model, ..., {})")
    if isinstance(rules, ClusterConfig):
        if options:
            raise TypeError(
                f"a ClusterConfig says everything already; put {', '.join(options)} into it: "
                f"ClusterConfig(n_clusters={rules.n_clusters}, "
                f"{', '.join(f'{k}={v!r}' for k, v in options.items())})"
            )
        return {"*": rules}
    if isinstance(rules, Mapping):
        if "n_clusters" in options:
            raise TypeError("n_clusters is given by the rules; write it there: {'*': 16}")
        return {_pattern(p): _as_config(p, rule, options) for p, rule in rules.items()}
    if isinstance(rules, bool) or not isinstance(rules, int):
        raise TypeError(
            f"rules must be an int, a ClusterConfig or a mapping from pattern to either, "
            f"got {rules!r}"
        )
    if "n_clusters" in options:
        raise TypeError("n_clusters is the second argument: cluster_(model, 16)")
    return {"*": ClusterConfig(n_clusters=rules, **options)}


def _as_config(pattern: str, rule: Rule, options: Mapping[str, Any]) -> ClusterConfig | None:
    if rule is None or isinstance(rule, ClusterConfig):
        return rule
    if isinstance(rule, Mapping):
        _check_fields(rule, f"rule {pattern!r}: {{}}")
        fields = {**options, **rule}
    elif isinstance(rule, int) and not isinstance(rule, bool):
        fields = {**options, "n_clusters": rule}
    else:
        raise TypeError(
            f"rule {pattern!r} must be an int, a ClusterConfig, a dict of its fields or None, "
            f"got {rule!r}"
        )
    try:
        return ClusterConfig(**fields)
    except (TypeError, ValueError) as error:
        raise type(error)(f"rule {pattern!r}: {error}") from None


def _pattern(pattern: object) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern must be a string such as 'layers.*.weight', got {pattern!r}")
    return pattern


def _check_fields(given: Mapping[str, Any], where: str) -> None:
    check_options(given, [field.name for field in dataclasses.fields(ClusterConfig)], where)


def check_options(given: Iterable[str], valid: Sequence[str], where: str) -> None:
    """Refuse an option that is none of the valid ones.

    Args:
        given: names.
        valid: names.
        where: the call that they were given in, with ``{}`` for the name.

    Raises:
        TypeError: says which one was meant, or lists them.
    """
    for key in given:
        if key not in valid:
            close = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid)}"
            raise TypeError(f"unknown option {key!r} in {where.format(key)}; {hint}")


def reaches(pattern: str, candidate: Candidate) -> bool:
    """Whether a pattern reaches a tensor: as a module class name, or as a glob over its names."""
    return pattern in candidate.classes or _globs(pattern, candidate)


def _globs(pattern: str, candidate: Candidate) -> bool:
    """As a glob, in which brackets may also stand for themselves: ``block[0].*``."""
    plain = pattern.replace("[", "[[]")
    return any(fnmatch.fnmatchcase(n, p) for n in candidate.names for p in (pattern, plain))


def _only_by_class(pattern: str, candidate: Candidate) -> bool:
    return candidate.n_dims < 2 and not _globs(pattern, candidate)


def _only_vectors(pattern: str, candidate: Candidate) -> str:
    return (
        f"rule {pattern!r} reaches tensors of one dimension only, such as {candidate.name!r}, and "
        f"a class name is for weights of two and more; name the tensor if you mean it"
    )


def advice(
    rules: Rules, candidates: Sequence[Candidate], decisions: Sequence[Decision]
) -> str | None:
    """What to type where rules for everything leave most weights alone, or cluster nothing."""
    if isinstance(rules, Mapping) and ("*" not in rules or rules["*"] is None):
        return None
    pairs = list(zip(candidates, decisions, strict=True))
    done = sum(c.n_elements for c, d in pairs if d.config is not None)
    left = [c for c, d in pairs if d.skipped == c.skip == UNUSUAL and c.n_dims > 1]
    if done and sum(c.n_elements for c in left) <= done:
        return None
    total = sum(c.n_elements for c in candidates)
    largest = max(left, key=lambda c: c.n_elements, default=None)
    if largest is None:
        why = next((d.skipped for _, d in pairs if d.skipped), "it has no parameters")
        return f"nothing is clustered: {why}. print(torchclust.summary(model)) lists every tensor"
    return (
        f"{done} of the model's {total} weights are clustered: {largest.name!r} ("
        f"{largest.kind}, {largest.n_elements} elements) is {largest.skip}. To cluster it:  "
        f'cluster_(model, {{"*": 16, "{largest.kind}": 16}})'
    )


def _matches_nothing(pattern: str, candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return (
            f"rule {pattern!r} matches no parameter: this model has none. A quantized model keeps "
            f"its weights packed: cluster the float model"
        )
    known = sorted({name for c in candidates for name in (*c.names, *c.classes)})
    close = difflib.get_close_matches(pattern, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"parameters here: {', '.join(known[:8])}"
    return (
        f"rule {pattern!r} matches no parameter and no module class; {hint} "
        f"(a pattern is a glob over parameter names, such as 'layers.*.weight', or a class name)"
    )


def _cannot_cluster(candidate: Candidate, config: ClusterConfig, reason: str) -> str:
    lower = "Lower n_clusters, or leave" if reason == TOO_SMALL else "Leave"
    return (
        f"cannot cluster {candidate.name!r} ({candidate.kind}, {candidate.n_elements} elements) "
        f"into {config.n_clusters} clusters: {reason}.\n"
        f'{lower} it out:  cluster_(model, {{"*": {config.n_clusters}, '
        f'"{candidate.name}": None}})'
    )


def _complain(message: str, strict: bool) -> None:
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)
