"""What to cluster and how: the validated configuration, and the rules that assign it to tensors.

Nothing here knows a tensor or a module: rules are resolved over `Candidate`s, plain descriptions
that `torchclust.model` draws from a model. So every message about rules is raised in one place,
before anything is fitted or changed.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

Init: TypeAlias = Literal["optimal", "linear", "density", "random", "kmeans++"]
CodebookDtype: TypeAlias = Literal["float32", "int8"]
Granularity: TypeAlias = Literal["tensor", "channel", "group"]
Assignment: TypeAlias = Literal["fixed", "nearest"]
Gradient: TypeAlias = Literal["sum", "mean"]

TOO_SMALL = "a tensor needs more elements than clusters"
_CHOICES: dict[str, tuple[str, ...]] = {
    "codebook_dtype": get_args(CodebookDtype),
    "init": get_args(Init),
    "granularity": get_args(Granularity),
    "assignment": get_args(Assignment),
    "gradient": get_args(Gradient),
}


@dataclass(frozen=True)
class ClusterConfig:
    """How one tensor is clustered. Immutable, and valid once it exists.

    Args:
        n_clusters: most distinct values per codebook, 2..256 (indices then fit one byte). The
            default of 16 costs 4 bits per weight before entropy coding.
        codebook_dtype: ``"float32"`` for the paper's codebook in the weight's own dtype;
            ``"int8"`` for integers in [-127, 127], symmetric about 0 and containing 0, with one
            scale per output channel: the codes that the exported file will hold.
        init: where k-means starts; ``"optimal"`` needs no start, it is the global minimum.
        max_iter: Lloyd steps after the seeds; 0 keeps the seeds.
        granularity: what shares one codebook: the tensor, each output channel, or each
            ``group_size`` output channels. An int8 codebook is always one per tensor (Vela builds
            one palette per layer), its scales are per channel already.
        group_size: output channels per codebook with ``granularity="group"``, else None.
        assignment: ``"fixed"`` trains the centroids only (Deep Compression, section 3);
            ``"nearest"`` trains the weight as well, straight-through, and assigns it anew on every
            forward.
        gradient: how the members' gradients reach their centroid: ``"sum"`` is the paper's Eq. 3.
        preserve_sparsity: weights that are exactly zero stay exactly zero; one centroid is 0.

    Raises:
        TypeError, ValueError: naming the field, the value given and what is valid.

    Example:
        >>> ClusterConfig(n_clusters=4).codebook_dtype
        'float32'
        >>> ClusterConfig(n_clusters=1)
        Traceback (most recent call last):
        ...
        ValueError: n_clusters must be between 2 and 256, got 1
    """

    n_clusters: int = 16
    codebook_dtype: CodebookDtype = "float32"
    init: Init = "optimal"
    max_iter: int = 300
    granularity: Granularity = "tensor"
    group_size: int | None = None
    assignment: Assignment = "fixed"
    gradient: Gradient = "sum"
    preserve_sparsity: bool = False

    def __post_init__(self) -> None:
        _require_int("n_clusters", self.n_clusters)
        if not 2 <= self.n_clusters <= 256:
            raise ValueError(f"n_clusters must be between 2 and 256, got {self.n_clusters}")
        for field, valid in _CHOICES.items():
            if getattr(self, field) not in valid:
                raise ValueError(
                    f"{field} must be one of {', '.join(map(repr, valid))}, "
                    f"got {getattr(self, field)!r}"
                )
        _require_int("max_iter", self.max_iter)
        if self.max_iter < 0:
            raise ValueError(f"max_iter must be at least 0, got {self.max_iter}")
        if not isinstance(self.preserve_sparsity, bool):
            raise TypeError(
                f"preserve_sparsity must be True or False, got {self.preserve_sparsity!r}"
            )
        if self.n_clusters < 3 and (self.preserve_sparsity or self.codebook_dtype == "int8"):
            why = "preserve_sparsity" if self.preserve_sparsity else "codebook_dtype='int8'"
            raise ValueError(
                f"n_clusters must be at least 3 with {why} (0 and one value on each side), "
                f"got {self.n_clusters}"
            )
        self._check_granularity()

    def _check_granularity(self) -> None:
        if self.codebook_dtype == "int8" and self.granularity != "tensor":
            raise ValueError(
                f"granularity must be 'tensor' with codebook_dtype='int8', got "
                f"{self.granularity!r}: the compiler builds one palette per layer, and an int8 "
                f"codebook has a scale per output channel already"
            )
        if self.granularity == "group":
            if self.group_size is None:
                raise ValueError("granularity='group' needs group_size, e.g. group_size=8")
            _require_int("group_size", self.group_size)
            if self.group_size < 1:
                raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        elif self.group_size is not None:
            raise ValueError(
                f"group_size={self.group_size!r} needs granularity='group', "
                f"got granularity={self.granularity!r}"
            )

    def to_json(self) -> str:
        """The fields as one line of JSON, as a clustered state dict carries them."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ClusterConfig:
        """The reverse of `to_json`."""
        return cls(**json.loads(text))


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
    clustered only where a rule names it, so ``"*"`` never reaches biases and norms.

    Raises:
        TypeError, ValueError: invalid rules; with ``strict`` also a pattern that matches nothing,
            or that asks for something that cannot be done. Without it those are warnings.
    """
    chosen: list[tuple[ClusterConfig | None, bool] | None] = [None] * len(candidates)
    for pattern, config in _as_mapping(rules, options).items():
        matches = [i for i, c in enumerate(candidates) if reaches(pattern, c)]
        if not matches:
            _complain(_matches_nothing(pattern, candidates), strict)
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
    fields = [field.name for field in dataclasses.fields(ClusterConfig)]
    for key in given:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(fields)}"
            raise TypeError(f"unknown option {key!r} in {where.format(key)}; {hint}")


def reaches(pattern: str, candidate: Candidate) -> bool:
    """Whether a pattern reaches a tensor: as a module class name, or as a glob over its names."""
    return pattern in candidate.classes or any(
        fnmatch.fnmatchcase(name, pattern) for name in candidate.names
    )


def _matches_nothing(pattern: str, candidates: Sequence[Candidate]) -> str:
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


def _require_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
