"""Share bytes among tensors so that the model suffers least: how many clusters each one gets.

For every tensor a few numbers of clusters were tried (`torchclust.allocation.sensitivity`): each
costs some bytes and some loss, and losses of different tensors are taken to add up. Choosing one
per tensor within a budget is the multiple-choice knapsack. It is solved exactly, by dynamic
programming over bytes: the convex hull and one multiplier, the classical way for hundreds of
tensors, would waste up to one step of the largest tensor, and in small networks one tensor holds
nearly everything.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchclust.weight.config import CodebookDtype

_STEPS = 1 << 17  # of the table; where choices span more than 128 KiB, a step is several bytes


@dataclass(frozen=True)
class Choice:
    """One way to encode one tensor.

    Attributes:
        n_clusters: most distinct values; None for a tensor that is not clustered.
        n_bytes: encoded.
        loss: how much the model's output suffers from it alone, in any unit that adds up.
        codebook_dtype: of the codebook; None for a tensor that is not clustered.
    """

    n_clusters: int | None
    n_bytes: int
    loss: float
    codebook_dtype: CodebookDtype | None = None


Curves = Mapping[str, Sequence[Choice]]
Allocation = dict[str, Choice]


class Allocations:
    """The best choices for every budget at once.

    Args:
        curves: for every tensor the choices that there are, in any order, at least one.

    Attributes:
        least: the fewest bytes that any choices come to.
        sizes: ascending budgets in bytes from `least` on, at each of which a better allocation
            becomes possible.

    Raises:
        ValueError: a tensor without a choice.

    Example:
        >>> a, b = [Choice(4, 10, 3.0), Choice(16, 20, 0.5)], [Choice(4, 100, 9.0)]
        >>> best = Allocations({"a": a, "b": b})
        >>> best.sizes, best.within(115)["a"].n_clusters
        ([110, 120], 4)
    """

    def __init__(self, curves: Curves) -> None:
        self._curves = {
            name: sorted(choices, key=lambda choice: (choice.n_bytes, choice.loss))
            for name, choices in curves.items()
        }
        for name, choices in self._curves.items():
            if not choices:
                raise ValueError(f"there is no choice for {name!r}")
        self.least = sum(choices[0].n_bytes for choices in self._curves.values())
        most = sum(choices[-1].n_bytes for choices in self._curves.values())
        self._unit = max(1, -(-(most - self.least) // _STEPS))
        loss = np.zeros(sum(steps[-1] for steps in self._steps().values()) + 1)
        self._taken: dict[str, npt.NDArray[np.uint16]] = {}
        for name, steps in self._steps().items():
            tried = np.full((len(steps), len(loss)), np.inf)
            for row, step, choice in zip(tried, steps, self._curves[name], strict=True):
                row[step:] = loss[: len(loss) - step] + choice.loss
            self._taken[name] = tried.argmin(axis=0).astype(np.uint16)
            loss = tried.min(axis=0)
        self._falls = np.flatnonzero(np.diff(loss, prepend=np.inf) < 0)
        self.sizes = [self.least + int(step) * self._unit for step in self._falls]

    def within(self, budget: float) -> Allocation:
        """Return the choices of least total loss that come to at most `budget` bytes.

        Raises:
            ValueError: `budget` is below `least`.
        """
        if budget < self.least:
            raise ValueError(f"{budget:,.0f} bytes do not hold the least, {self.least:,}")
        step = int(self._falls[np.searchsorted(self._falls, self._step(budget), "right") - 1])
        found: Allocation = {}
        for name, steps in reversed(self._steps().items()):
            index = int(self._taken[name][step])
            found[name] = self._curves[name][index]
            step -= steps[index]
        return {name: found[name] for name in self._curves}

    def _step(self, budget: float) -> int:
        return int((budget - self.least) // self._unit)

    def _steps(self) -> dict[str, list[int]]:
        """How many steps every choice costs beyond the tensor's cheapest, rounded up."""
        return {
            name: [-(-(choice.n_bytes - choices[0].n_bytes) // self._unit) for choice in choices]
            for name, choices in self._curves.items()
        }


def rescaled(curves: Curves, chosen: Allocation, n_bytes: Mapping[str, int]) -> Curves:
    """Return the curves with each tensor's bytes in the ratio of `n_bytes` to what was `chosen`."""
    return {
        name: [
            dataclasses.replace(c, n_bytes=round(c.n_bytes * n_bytes[name] / chosen[name].n_bytes))
            for c in choices
        ]
        for name, choices in curves.items()
    }
