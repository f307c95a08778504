"""Sharing a budget among tensors: against every combination there is."""

import itertools

import numpy as np
import pytest

from torchclust.allocation.knapsack import Allocations, Choice, rescaled


def random_curves(seed: int, *, most: int = 40) -> dict[str, list[Choice]]:
    """Some tensors with some choices, in no order, some of them dominated or equal."""
    rng = np.random.default_rng(seed)
    return {
        f"t{i}": [
            Choice(k, int(rng.integers(1, most)), float(rng.choice([0, 1, 2, rng.random() * 5])))
            for k in range(2, 2 + rng.integers(1, 6))
        ]
        for i in range(rng.integers(1, 5))
    }


def cost(choices: tuple[Choice, ...]) -> tuple[int, float]:
    return sum(c.n_bytes for c in choices), sum(c.loss for c in choices)


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_best_of_all_combinations(seed: int) -> None:
    curves = random_curves(seed)
    combinations = [cost(choices) for choices in itertools.product(*curves.values())]
    least = min(size for size, _ in combinations)
    best = Allocations(curves)
    assert best.least == least
    for budget in range(least, max(size for size, _ in combinations) + 3):
        found = best.within(budget)
        assert list(found) == list(curves)
        assert all(choice in curves[name] for name, choice in found.items())
        size, loss = cost(tuple(found.values()))
        assert size <= budget
        assert loss == pytest.approx(min(x for s, x in combinations if s <= budget), abs=1e-12)
    losses = [min(x for s, x in combinations if s <= size) for size in best.sizes]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] == pytest.approx(min(loss for _, loss in combinations))
    assert [cost(tuple(best.within(s).values()))[0] for s in best.sizes] == best.sizes


def test_large_tensors_are_shared_in_steps_and_stay_within(monkeypatch) -> None:
    """A table that would be too long gets coarser: never over budget, and nearly as good."""
    for seed in range(20):
        curves = random_curves(seed, most=100_000)
        exact = Allocations(curves)
        monkeypatch.setattr("torchclust.allocation.knapsack._STEPS", 500)
        coarse = Allocations(curves)
        monkeypatch.undo()
        assert coarse.least == exact.least
        span = exact.sizes[-1] - exact.least
        for budget in np.linspace(exact.least, exact.least + span, 7):
            size, loss = cost(tuple(coarse.within(budget).values()))
            assert size <= budget
            tighter = max(exact.least, budget - 2 * len(curves) * span / 500 - 1)
            assert loss <= cost(tuple(exact.within(tighter).values()))[1] + 1e-9


def test_refusals() -> None:
    with pytest.raises(ValueError, match="there is no choice for 'b'"):
        Allocations({"a": [Choice(2, 1, 0.0)], "b": []})
    best = Allocations({"a": [Choice(2, 700, 0.0), Choice(4, 900, 0.0)], "b": [Choice(2, 600, 1)]})
    with pytest.raises(ValueError, match="1,299 bytes do not hold the least, 1,300"):
        best.within(1299)
    assert best.within(1300)["a"].n_clusters == 2


def test_rescaled_keeps_numbers_and_losses() -> None:
    curves = {"a": [Choice(2, 100, 3.0), Choice(4, 200, 1.0)], "b": [Choice(None, 50, 0.0)]}
    chosen = {"a": curves["a"][1], "b": curves["b"][0]}
    assert rescaled(curves, chosen, {"a": 150, "b": 50}) == {
        "a": [Choice(2, 75, 3.0), Choice(4, 150, 1.0)],
        "b": [Choice(None, 50, 0.0)],
    }


def test_more_choices_than_a_byte_counts() -> None:
    choices = [Choice(k, 100 + k, 1.0 / k) for k in range(2, 600)]
    best = Allocations({"a": choices, "b": [Choice(2, 0, 0.0)]})
    assert best.within(100 + 500)["a"].n_clusters == 500
