"""Time coremltools' DKM palettizer: its training step beside the plain one, and its k-means.

    python -m venv /tmp/coreml
    /tmp/coreml/bin/pip install -r benchmarks/peers/coremltools-requirements.txt
    /tmp/coreml/bin/python benchmarks/peers/coremltools_step.py [ROUNDS]

The networks and batches of benchmarks/step.py. Each round runs the plain step and the clustered
one in turn; printed are medians and their ratio. DKM (Cho et al., 2022) holds attention from every
weight to every centroid, so its memory grows with both.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from statistics import median

import coremltools
import torch
from coremltools.optimize.torch.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)
from torch import nn

BITS = 4  # 16 centroids


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)),
        *(nn.Flatten(), nn.Linear(1600, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 4096), nn.ReLU()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)),
    )


def stepper(model: nn.Module) -> Callable[[], None]:
    x, y = torch.randn(250, 1, 28, 28), torch.randint(10, (250,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(name: str, model: nn.Module, rounds: int) -> None:
    plain = stepper(copy.deepcopy(model).train())
    config = DKMPalettizerConfig.from_dict({"global_config": {"n_bits": BITS, "milestone": 0}})
    palettizer = DKMPalettizer(copy.deepcopy(model).train(), config)
    clustered_model = palettizer.prepare()
    clustered = stepper(clustered_model)
    palettizer.step()
    times: dict[str, list[float]] = {"plain": [], "DKM": []}
    for round_ in range(rounds + 1):
        for label, function in (("plain", plain), ("DKM", clustered)):
            found = seconds(function)
            if round_:
                times[label].append(found)
    base = median(times["plain"])
    for label, found_times in times.items():
        milliseconds = 1e3 * median(found_times)
        print(f"{name} {label:6} {milliseconds:9.1f} ms {milliseconds / base / 1e3:.2f}x")


def post_training(rounds: int) -> None:
    config = PostTrainingPalettizerConfig.from_dict(
        {"global_config": {"n_bits": BITS, "granularity": "per_tensor"}}
    )
    for n in (100_000, 1_000_000):
        model = nn.Sequential(nn.Linear(n // 100, 100, bias=False))
        times = [
            seconds(lambda m=model: PostTrainingPalettizer(copy.deepcopy(m), config).compress())
            for _ in range(rounds)
        ]
        print(f"k-means of {n} weights into {2**BITS}: {median(times):.3f} s")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"coremltools {coremltools.__version__}, torch {torch.__version__}")
    torch.manual_seed(0)
    compare("cnn", cnn(), rounds)
    post_training(rounds)
    compare("mlp", mlp(), rounds)


if __name__ == "__main__":
    main()
