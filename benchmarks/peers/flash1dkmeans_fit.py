"""Time flash1dkmeans beside numpy.sort, in an environment of its own.

    python -m venv /tmp/flash
    /tmp/flash/bin/pip install -r benchmarks/peers/flash1dkmeans-requirements.txt
    /tmp/flash/bin/python benchmarks/peers/flash1dkmeans_fit.py weights.npy CLUSTERS ROUNDS

Prints one JSON object: seconds of every round for the peer and for the sort, and the peer's error.
benchmarks/fit.py calls this with ``--flash /tmp/flash/bin/python``.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from flash1dkmeans import kmeans_1d


def main() -> None:
    weights, k, rounds = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    kmeans_1d(weights[:10_000], k, random_state=0)  # compiles
    times: dict[str, list[float]] = {"peer": [], "sort": []}
    for _ in range(rounds):
        start = time.perf_counter()
        np.sort(weights)
        times["sort"].append(time.perf_counter() - start)
        start = time.perf_counter()
        centroids, labels = kmeans_1d(weights, k, random_state=0)
        times["peer"].append(time.perf_counter() - start)
    error = float(np.square(weights.astype(np.float64) - np.asarray(centroids)[labels]).sum())
    print(json.dumps({**times, "error": error}))


if __name__ == "__main__":
    main()
