"""Flash, arena and time of lookup tables in tflite-micro, for networks and numbers of clusters.

    python benchmarks/lookup_tables.py [--seed 0]

Indices have a fixed width, so sizes follow from shapes and numbers of codes alone; the weights here
are random. Accuracies are the recipes' (README.md).
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import tflm, to_tflite
from torchclust.zoo.networks import ds_cnn_l, mobilenet_v1, seed_cnn

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "seed CNN (mnist_cnn, fashion_cnn)": (seed_cnn, (1, 28, 28)),
    "DS-CNN-L": (ds_cnn_l, (1, 49, 10)),
    "MobileNetV1 0.25, 96 x 96": (
        lambda: mobilenet_v1((3, 96, 96), 2, width=0.25),
        (3, 96, 96),
    ),
}
CLUSTERS = ((4, "int8"), (8, "int8"), (16, "int8"))


def file_size(model: nn.Module, images: torch.Tensor, path: Path) -> int:
    return to_tflite(model, images[:1], path, calibration=[images]).size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="networks whose name holds this")
    args = parser.parse_args()
    print("| network | clusters | codes | flash, KiB | ratio | arena, KiB | time | compared |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (build, shape) in NETWORKS.items():
        if args.only not in name:
            continue
        torch.manual_seed(args.seed)
        network, images = build(), torch.randn(8, *shape)
        with torch.no_grad():  # statistics of the norms, so that activations keep their size
            for _ in range(40):
                network(images)
        network.eval()
        with tempfile.TemporaryDirectory() as folder:
            plain = file_size(copy.deepcopy(network), images, Path(folder, "plain.tflite"))
            for k, dtype in CLUSTERS:
                model = cluster_(copy.deepcopy(network), k, codebook_dtype=dtype)
                file_size(model, images, Path(folder, "int8.tflite"))
                report = tflm(Path(folder, "int8.tflite"), Path(folder, "t.tflite"), inputs=images)
                rows = [row for row in report.rows if row.left is None]
                cells = (
                    name,
                    k,
                    max(row.codes for row in rows),
                    f"{plain / 1024:.1f} -> {report.flash_after / 1024:.1f}",
                    f"{report.flash_after / plain:.3f}",
                    f"{report.arena_before / 1024:.1f} -> {report.arena_after / 1024:.1f}",
                    f"{report.time_ratio:.2f}",
                    report.compared,
                )
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
