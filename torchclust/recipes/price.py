"""``cluster.budget`` with ``n_clusters``: the price of a bit at which a model fits, trained for it.

One price for all tensors is what a budget asks for: whatever is given up for a byte is then the
same everywhere. Bytes fall with the price, about as a power of it, so it is sought by the secant
method on logarithms. Every try clusters and fine-tunes the whole model, and counts what came out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torchclust.recipes.section import RecipeError

MOST_TRIES = 8
_CLOSE = 0.98  # of the budget: near enough
_AIM = 0.99
_LEAST, _HIGHEST = 1e-4, 2.0  # a bit is then worth next to nothing, or more than any weight
_LEAP = 10.0  # of the price, from one try to the next
_EXPONENT = -0.5  # of bytes in the price, until two tries tell


def within_budget(n_bytes: float, count: Callable[[float], int], start: float) -> float:
    """Return a rate at which the model takes at most `n_bytes`, and nearly as many.

    Args:
        n_bytes: the budget.
        count: clusters and trains at a rate, and counts the bytes.
        start: the rate to try first.

    Raises:
        RecipeError: no price that was tried is high enough.

    >>> round(within_budget(1000, lambda rate: round(300 / rate**0.4), 0.02), 3)
    0.051
    """
    tried: dict[float, int] = {}
    rate = start
    for _ in range(MOST_TRIES):
        tried[rate] = count(rate)
        if _CLOSE * n_bytes <= tried[rate] <= n_bytes:
            return rate
        rate = _next(tried, _AIM * n_bytes)
        if rate in tried:
            break
    fitting = [rate for rate, found in tried.items() if found <= n_bytes]
    if not fitting:
        least = min(tried.values()) / 1024
        raise RecipeError(
            f"cluster.budget: {n_bytes / 1024:g} KiB do not hold the model at any price of a bit "
            f"that was tried; the least was {least:.1f}:  --set cluster.budget={math.ceil(least)}"
        )
    return min(fitting)


def _next(tried: dict[float, int], aim: float) -> float:
    """The rate at which the two best tries, one on either side if there are, say it is right."""
    by_distance = sorted(tried, key=lambda rate: abs(math.log(tried[rate] / aim)))
    near, *others = by_distance
    across = [rate for rate in others if (tried[rate] > aim) != (tried[near] > aim)]
    exponent = _EXPONENT
    for other in (across or others)[:1]:
        exponent = math.log(tried[other] / tried[near]) / math.log(other / near)
    step = math.log(aim / tried[near]) / (exponent if exponent < 0 else _EXPONENT)
    leap = math.log(_LEAP)
    return min(_HIGHEST, max(_LEAST, near * math.exp(max(-leap, min(leap, step)))))
