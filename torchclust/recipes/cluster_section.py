"""The section `cluster` of a recipe: how weights are clustered, or what is to be chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from torchclust.recipes.section import Section, known_keys
from torchclust.weight.config import (
    Assignment,
    ClusterConfig,
    CodebookDtype,
    Gradient,
    Granularity,
    Init,
)

_CONFIG_FIELDS = dataclasses.fields(ClusterConfig)


class ClusterSection(Section):
    """ClusterConfig's fields for every clusterable weight, then `rules` for some of them.

    With `budget` or `max_accuracy_drop` in the place of `n_clusters`, every tensor gets the number
    of its own that is best for the whole (`torchclust.recipes.choice`); those that `rules` give one
    keep it. With `n_clusters` a `budget` stands in the place of `rate`.
    """

    n_clusters: int = Field(16, description="most distinct values per codebook, 2 to 256")
    codebook_dtype: CodebookDtype = Field("float32", description="int8: the codes of the file")
    init: Init = Field("optimal", description="how a codebook is fitted")
    max_iter: int = Field(300, description="k-means steps after the seeds")
    granularity: Granularity = Field("tensor", description="what shares one codebook")
    group_size: int | None = Field(None, description="output channels per codebook, for group")
    assignment: Assignment = Field("fixed", description="nearest: weights train and move cluster")
    gradient: Gradient = Field("sum", description="how member gradients reach their centroid")
    preserve_sparsity: bool = Field(False, description="zeros stay exactly zero")
    rate: float = Field(0.0, ge=0, description="what a bit costs: fewer bytes for more error")
    rules: dict[str, Any] = Field(
        default_factory=dict,
        description="pattern of parameter names, or class name -> int, fields, or null",
    )
    budget: float | None = Field(
        None, gt=0, description="KiB for all encoded weights; chooses rate, or all n_clusters"
    )
    max_accuracy_drop: float | None = Field(
        None, gt=0, description="points; chooses the smallest n_clusters that keep within it"
    )
    inputs: int | None = Field(
        None, ge=0, description="training samples whose outputs clustering keeps; null: none"
    )

    @property
    def chooses(self) -> bool:
        """Whether numbers of clusters, or a price, are to be chosen."""
        return self.budget is not None or self.max_accuracy_drop is not None

    @property
    def prices(self) -> bool:
        """Whether the price of a bit is to be chosen."""
        return self.budget is not None and "n_clusters" in self.model_fields_set

    @property
    def in_short(self) -> str:
        """What was chosen, where something is to be chosen."""
        rules = [f"{name} {rule}" for name, rule in self.rules.items()]
        return ", ".join([f"rate {self.rate:.4g}"] * (self.rate > 0) + rules)

    def at(self, rate: float) -> ClusterSection:
        """Return the section at this price, with nothing left to choose."""
        return self.model_copy(update={"budget": None, "rate": rate})

    def with_rules(self, rules: Mapping[str, Any]) -> ClusterSection:
        """Return the section with these rules after its own, and nothing left to choose."""
        others = {key: rule for key, rule in self.rules.items() if key not in rules}
        fields = {"budget": None, "max_accuracy_drop": None, "rules": {**others, **rules}}
        return self.model_copy(update=fields)

    @property
    def options(self) -> dict[str, Any]:
        """ClusterConfig's fields but for `n_clusters`, as `cluster_` takes them."""
        return {f.name: getattr(self, f.name) for f in _CONFIG_FIELDS if f.name != "n_clusters"}

    @property
    def all_rules(self) -> dict[str, Any]:
        """`n_clusters` for everything, then `rules`: the second argument of `cluster_`."""
        return {"*": self.n_clusters, **{p: self._inheriting(r) for p, r in self.rules.items()}}

    def _inheriting(self, rule: Any) -> Any:
        """Return a rule with the section's `n_clusters`, where it gives other fields only."""
        return {"n_clusters": self.n_clusters, **rule} if isinstance(rule, Mapping) else rule

    @model_serializer(mode="wrap")
    def _without_what_is_chosen(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = dump(self)
        if self.chooses and not self.prices:
            fields.pop("n_clusters")
            if "codebook_dtype" not in self.model_fields_set:  # then it may be chosen, too
                fields.pop("codebook_dtype")
        return fields

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> ClusterSection:
        if self.budget is not None and self.max_accuracy_drop is not None:
            raise ValueError(
                f"give either budget ({self.budget:g}) or max_accuracy_drop "
                f"({self.max_accuracy_drop:g}), not both"
            )
        if self.prices and self.rate:
            raise ValueError(
                f"budget chooses the rate where n_clusters is given: leave rate ({self.rate:g}) "
                "out, or n_clusters (--set cluster.n_clusters=null) to choose that"
            )
        if self.max_accuracy_drop is not None and "n_clusters" in self.model_fields_set:
            raise ValueError(
                "max_accuracy_drop chooses n_clusters for every tensor: leave n_clusters "
                f"({self.n_clusters}) out (--set cluster.n_clusters=null), or give single "
                "tensors theirs under rules"
            )
        return self

    @model_validator(mode="after")
    def _valid_configs(self) -> ClusterSection:
        ClusterConfig(n_clusters=self.n_clusters, **self.options)
        for pattern, rule in self.rules.items():
            if rule is None:
                continue
            if isinstance(rule, bool) or not isinstance(rule, int | Mapping):
                raise ValueError(
                    f"rule {pattern!r} is a number of clusters, a mapping or null, got {rule!r}"
                )
            fields = rule if isinstance(rule, Mapping) else {"n_clusters": rule}
            known_keys(fields, [f.name for f in _CONFIG_FIELDS], f"rules.{pattern}.")
            try:
                ClusterConfig(**{"n_clusters": self.n_clusters, **self.options, **fields})
            except (TypeError, ValueError) as error:
                raise ValueError(f"rule {pattern!r}: {error}") from None
        return self
