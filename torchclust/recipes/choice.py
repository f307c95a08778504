"""A recipe's ``cluster.budget`` and ``cluster.max_accuracy_drop``: what each tensor is to cost.

Every free tensor is clustered alone into each of several numbers of clusters, which gives bytes and
loss (`torchclust.allocation.sensitivity`); `torchclust.allocation.knapsack` shares the budget. What
comes out is an ordinary list of rules, with which the same recipe runs again without choosing
anything.

Fine-tuning with ``assignment: nearest`` moves weights from code to code, and so the bytes that they
encode to. So the budget is compared with the fine-tuned model; where that is over it, or leaves
room for a better choice, every tensor's bytes are corrected by what came out and shared anew.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchclust.allocation.encoded_size import encoded_bytes
from torchclust.allocation.knapsack import Allocation, Allocations, Choice, Curves, rescaled
from torchclust.allocation.sensitivity import Distance, sensitivity_curves
from torchclust.model.clustering import named_clusterings
from torchclust.model.slots import decisions
from torchclust.recipes.chip import measure_of, ways
from torchclust.recipes.prepare import clustered_copy
from torchclust.recipes.price import within_budget
from torchclust.recipes.schema import ClusterSection, Recipe, RecipeError
from torchclust.weight.config import ClusterConfig

SAMPLES = 1024  # unlabelled training samples behind every loss
LABELLED = 4000  # training samples behind every accuracy
_ROUNDS = 3  # of fine-tuning and correcting; one is usual
_FIRST = 0.99  # of the budget: what is filled at first, as fine-tuning may add a little
_BETTER = 0.9  # of the loss: what makes another round worth its time
_KIB = 1024
_TRAINED, _FITTED = 0.1, 0.02  # rates to try first: where weights move by it, where they do not


@dataclass(frozen=True)
class Chosen:
    """What was chosen: the rules to run with, and what each tensor costs.

    Attributes:
        section: the recipe's section ``cluster`` with the choice as rules, or as its rate.
        allocation: the choice of every weight tensor (two dimensions or more).
    """

    section: ClusterSection
    allocation: Allocation

    @property
    def n_bytes(self) -> int:
        """What all tensors come to."""
        return sum(choice.n_bytes for choice in self.allocation.values())

    @property
    def sizes(self) -> dict[str, int]:
        """What every tensor comes to."""
        return {name: choice.n_bytes for name, choice in self.allocation.items()}

    @property
    def loss(self) -> float:
        """What they lose together, as far as single tensors tell."""
        return sum(choice.loss for choice in self.allocation.values())

    def measured(self, n_bytes: Mapping[str, int]) -> Chosen:
        """Return the same choice with these bytes."""
        allocation = {
            name: dataclasses.replace(choice, n_bytes=n_bytes[name])
            for name, choice in self.allocation.items()
        }
        return dataclasses.replace(self, allocation=allocation)

    def to_dict(self) -> dict[str, Any]:
        """Return rules and tensors as plain values."""
        tensors = {name: dataclasses.asdict(c) for name, c in self.allocation.items()}
        rules = dict(self.section.rules)
        found = {"rules": rules, "encoded_bytes": self.n_bytes, "tensors": tensors}
        return {**found, "rate": self.section.rate} if self.section.rate else found


def tensor_configs(recipe: Recipe, model: nn.Module) -> tuple[dict[str, ClusterConfig], set[str]]:
    """Return how every tensor is clustered, and the names of those whose `n_clusters` is free."""
    section = recipe.cluster
    assert section is not None
    rules = section.rules.values()
    given = {r.get("n_clusters") if isinstance(r, Mapping) else r for r in rules}
    marker = next(k for k in itertools.count(3) if k not in given)
    marked = section.with_rules({}).model_copy(update={"n_clusters": marker})
    tried = clustered_copy(recipe.model_copy(update={"cluster": marked}), model)
    configs = {name: clustering.config for name, clustering in named_clusterings(tried)}
    return configs, {name for name, config in configs.items() if config.n_clusters == marker}


def curves_of(
    recipe: Recipe,
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    distance: Distance | None = None,
) -> dict[str, list[Choice]]:
    """Return the choices of every weight tensor, free or not; of one that is not there is one."""
    configs, free = tensor_configs(recipe, model)
    sizes = {name: value.numel() for name, value, _ in decisions(model) if value.dim() > 1}
    tried = {
        name: ways(recipe, config, sizes[name]) if name in free else [config]
        for name, config in configs.items()
        if name in sizes
    }
    measure = measure_of(recipe)
    found = sensitivity_curves(model, tried, inputs, measure, distance=distance, seed=recipe.seed)
    plain = encoded_bytes(model, measure, sizes)
    return {name: found.get(name) or [Choice(None, plain[name], 0.0)] for name in sizes}


def choose(
    recipe: Recipe,
    start: nn.Module,
    curves: Curves,
    lost: Callable[[ClusterSection], float],
    train: Callable[[ClusterSection], nn.Module],
) -> Chosen:
    """Choose every free tensor's number of clusters, as the recipe's section ``cluster`` asks.

    Args:
        recipe: whose section ``cluster`` has a `budget` or a `max_accuracy_drop`.
        start: the model that is to be clustered.
        curves: of `curves_of`, before fine-tuning.
        lost: how much worse the training data's metric is with another section ``cluster``, before
            fine-tuning.
        train: clusters and fine-tunes a copy of `start` with another section ``cluster``.

    Raises:
        RecipeError: there is no such choice; the text says what is the least possible.
    """
    section = recipe.cluster
    assert section is not None
    configs, free = tensor_configs(recipe, start)

    def section_of(allocation: Allocation) -> ClusterSection:
        return section.with_rules(_rules(section, configs, free, allocation))

    if section.budget is not None:
        measure = measure_of(recipe)
        return _within_budget(
            section.budget,
            curves,
            section_of,
            lambda chosen: encoded_bytes(train(chosen), measure, curves),
        )

    assert section.max_accuracy_drop is not None
    return _within_drop(section.max_accuracy_drop, curves, section_of, lost)


def choose_price(recipe: Recipe, sizes_of: Callable[[ClusterSection], dict[str, int]]) -> Chosen:
    """Choose the price of a bit, one for all tensors, that the budget asks for.

    Args:
        recipe: whose section ``cluster`` has a `budget` and `n_clusters`.
        sizes_of: clusters and fine-tunes with another section ``cluster``, and counts each
            tensor's bytes.

    Raises:
        RecipeError: no price is high enough; the text says what the least was.
    """
    section = recipe.cluster
    assert section is not None
    assert section.budget is not None
    found: dict[float, dict[str, int]] = {}

    def count(rate: float) -> int:
        found[rate] = sizes_of(section.at(rate))
        return max(1, sum(found[rate].values()))

    learns = section.assignment == "nearest" and recipe.finetune is not None
    rate = within_budget(section.budget * _KIB, count, _TRAINED if learns else _FITTED)
    allocation = {name: Choice(None, size, 0.0) for name, size in found[rate].items()}
    return Chosen(section.at(rate), allocation)


def _within_budget(
    budget: float,
    curves: Curves,
    section_of: Callable[[Allocation], ClusterSection],
    sizes_of: Callable[[ClusterSection], dict[str, int]],
) -> Chosen:
    """Return the choice of least loss that is in the budget (KiB) after fine-tuning."""
    most, least = budget * _KIB, Allocations(curves).least
    fitting: list[Chosen] = []
    for _ in range(_ROUNDS):
        best = Allocations(curves)
        if most < best.least:
            least = best.least
            break
        allocation = best.within(max(best.least, most * (1 if fitting else _FIRST)))
        tried = Chosen(section_of(allocation), allocation)
        if fitting and tried.loss > _BETTER * min(chosen.loss for chosen in fitting):
            break
        tried = tried.measured(sizes_of(tried.section))
        curves = rescaled(curves, allocation, tried.sizes)
        least = tried.n_bytes
        if tried.n_bytes <= most:
            fitting.append(tried)
    if not fitting:
        raise RecipeError(
            f"cluster.budget: {budget:g} KiB do not hold the weights; the least possible is "
            f"{least / _KIB:.1f}:  --set cluster.budget={math.ceil(least / _KIB)}"
        )
    return min(fitting, key=lambda chosen: chosen.loss)


def _within_drop(
    most: float,
    curves: Curves,
    section_of: Callable[[Allocation], ClusterSection],
    lost: Callable[[ClusterSection], float],
) -> Chosen:
    """Return the smallest choice that loses at most so many points, found by bisection."""
    best = Allocations(curves)

    def at(index: int) -> Chosen:
        allocation = best.within(best.sizes[index])
        return Chosen(section_of(allocation), allocation)

    low, high = -1, len(best.sizes) - 1
    found = at(high)
    points = lost(found.section)
    if points > most:
        raise RecipeError(
            f"cluster.max_accuracy_drop: the most clusters there are already lose {points:.2f} "
            f"points of training accuracy, more than {most:g}:  "
            f"--set cluster.max_accuracy_drop={math.ceil(points * 100) / 100:g}"
        )
    while high - low > 1:
        middle = (low + high) // 2
        tried = at(middle)
        if lost(tried.section) <= most:
            found, high = tried, middle
        else:
            low = middle
    return found


def _rules(
    section: ClusterSection,
    configs: Mapping[str, ClusterConfig],
    free: set[str],
    allocation: Allocation,
) -> dict[str, Any]:
    """Return an allocation as rules: a number, or fields where other rules reach the tensor too."""
    usual = ClusterConfig(n_clusters=section.n_clusters, **section.options)
    rules: dict[str, Any] = {}
    for name in (n for n in allocation if n in free):
        k, kind = allocation[name].n_clusters, allocation[name].codebook_dtype
        config = dataclasses.replace(configs[name], codebook_dtype=kind or usual.codebook_dtype)
        fields = {
            field: value
            for field, value in dataclasses.asdict(config).items()
            if field != "n_clusters" and value != getattr(usual, field)
        }
        rules[name] = {"n_clusters": k, **fields} if fields and k is not None else k
    return rules
