"""Values to fit codebooks to, of many shapes."""

from typing import Any

import numpy as np


def draw(kind: str, n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(n)
    drawn = {
        "gauss": normal,
        "uniform": rng.random(n),
        "laplace": rng.laplace(size=n),
        "cauchy": rng.standard_cauchy(n),
        "mixed": normal * np.exp(1.5 * rng.standard_normal(n)),
        "pruned": np.where(rng.random(n) < 0.8, 0.0, normal),
        "tied": rng.integers(0, max(n // 5, 3), n).astype(np.float64) ** 2,
        "two modes": np.where(rng.random(n) < 0.5, -1 + 0.01 * normal, 1 + 0.3 * normal),
        "far from 0": 1000 + normal,
        "one outlier": np.concatenate([normal[1:], [1e6]]),
    }
    return drawn[kind]
