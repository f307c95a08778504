"""LeNets on the whole of MNIST, trained for bytes: how small at which error, whole files on disk.

    python benchmarks/rate_lenets.py lenet_300_100 --mnist FOLDER --rates 0 0.3 --seeds 0 1 2
    python benchmarks/rate_lenets.py lenet_5 --mnist FOLDER --rates 0 0.3 --shift 1

    python benchmarks/rate_lenets.py --table

FOLDER holds the four IDX files, gzipped. 5,000 of the training images are left out to choose on
(`val_error`); the 10,000 test images are only reported. Every run is a line of
benchmarks/results/rate_lenets.jsonl, beside a control of rate 0 that is not clustered and has equal
training. A run that was cut off goes on at the epoch it had come to.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import keep
from torch import Tensor, nn

from torchclust.model.charge import charge_
from torchclust.model.cluster import cluster_, strip_
from torchclust.model.restore import restore_
from torchclust.packing.pack import load_packed_, save_packed
from torchclust.packing.sections import VERSION
from torchclust.zoo.networks import lenet_5, lenet_300_100

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rate_lenets.jsonl"
FOLDER = ROOT / "runs" / "rate_lenets"
NETWORKS = {"lenet_300_100": lenet_300_100, "lenet_5": lenet_5}
HELD_OUT = 5000
Split = tuple[Tensor, Tensor]


def read_mnist(folder: Path) -> dict[str, Split]:
    """Training images without those held out, these, and the test images."""

    def read(kind: str) -> Split:
        images = gzip.decompress((folder / f"{kind}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{kind}-labels-idx1-ubyte.gz").read_bytes())[8:]
        pixels = torch.from_numpy(np.frombuffer(images, np.uint8).copy()).view(-1, 1, 28, 28)
        return pixels.float() / 255, torch.from_numpy(np.frombuffer(labels, np.uint8).copy()).long()

    images, labels = read("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, held = order[HELD_OUT:], order[:HELD_OUT]
    return {
        "train": (images[kept], labels[kept]),
        "val": (images[held], labels[held]),
        "test": read("t10k"),
    }


@torch.no_grad()
def error(net: nn.Module, split: Split) -> float:
    """Per cent of the images that are taken for another digit."""
    net.eval()
    wrong = sum(
        int((net(x).argmax(1) != y).sum())
        for x, y in zip(split[0].split(1000), split[1].split(1000), strict=True)
    )
    net.train()
    return 100 * wrong / len(split[1])


def rules_for(settings: argparse.Namespace, rate: float) -> dict[str, Any]:
    """All weights at one price; biases too, at a tenth of it, for they are a part of the file."""
    nearest = {"assignment": "nearest", "n_clusters": settings.clusters}
    return {
        "*": {**nearest, "rate": rate},
        "*.bias": {**nearest, "n_clusters": 9, "rate": rate / 10},
    }


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to so many pixels either way, what comes in being black."""
    if not most:
        return images
    padded = nn.functional.pad(images[:, 0], (most, most, most, most))
    down, right = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator)
    place, image = torch.arange(28), torch.arange(len(images))[:, None, None]
    rows, columns = (down + place)[:, :, None], (right + place)[:, None, :]
    return padded[image, rows, columns][:, None]


def train(
    net: nn.Module, data: dict[str, Split], settings: argparse.Namespace, rate: float, path: Path
) -> None:
    """Plain epochs, then clustered ones with a price that rises over their first half."""
    images, labels = data["train"]
    steps = len(labels) // settings.batch
    optimizer, epoch = None, 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        restore_(net, saved["net"])
        epoch = saved["epoch"]
        optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr)
        optimizer.load_state_dict(saved["optimizer"])
    while epoch < settings.plain + settings.epochs:
        if epoch == settings.plain and rate:
            cluster_(net, rules_for(settings, rate))
            optimizer = None
        optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=settings.lr)
        began = time.time()
        shuffle = torch.Generator().manual_seed(1000 * settings.seed + epoch)
        for i, at in enumerate(
            torch.randperm(len(labels), generator=shuffle).split(settings.batch)
        ):
            if i == steps:
                break
            done = (epoch + i / steps - settings.plain) / settings.epochs
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, 0.5 + 0.5 * math.cos(math.pi * max(0, done)))
            optimizer.zero_grad()
            moved = shifted(images[at], settings.shift, shuffle)
            nn.functional.cross_entropy(net(moved), labels[at]).backward()
            if epoch >= settings.plain and rate:
                charge_(net, min(1.0, done / settings.rise))
            optimizer.step()
        epoch += 1
        state = {"net": net.state_dict(), "epoch": epoch, "optimizer": optimizer.state_dict()}
        torch.save(state, path)
        if epoch % settings.every == 0:
            print(
                f"  epoch {epoch}: validation error {error(net, data['val']):.2f} %, "
                f"{packed_bytes(net, path)} bytes, {time.time() - began:.0f} s",
                flush=True,
            )


def packed_bytes(net: nn.Module, path: Path) -> int:
    """Size of the whole file as it would be now."""
    return save_packed(net, path.with_suffix(".packed")).bytes


def run(
    name: str, data: dict[str, Split], settings: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """Train one network, write its file, read it back and measure what was read."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    net = NETWORKS[name]()
    stem = f"{name}_{rate:g}_{settings.epochs}_{settings.shift}_{settings.seed}"
    train(net, data, settings, rate, FOLDER / f"{stem}.pt")
    strip_(net)
    size = save_packed(net, FOLDER / f"{stem}.packed")
    read = load_packed_(NETWORKS[name](), FOLDER / f"{stem}.packed")
    dense = 4 * sum(parameter.numel() for parameter in read.parameters())
    return {
        "network": name,
        "rate": rate,
        "seed": settings.seed,
        "epochs": [settings.plain, settings.epochs],
        "batch": settings.batch,
        "lr": settings.lr,
        "shift": settings.shift,
        "versions": {"torch": torch.__version__, "torchclust": version("torchclust")},
        "val_error": error(read, data["val"]),
        "test_error": error(read, data["test"]),
        "bytes": size.bytes,
        "format": VERSION,
        "ratio": dense / size.bytes,
        "tensors": {row.name: [row.bytes, row.kind, row.n_clusters] for row in size.rows},
    }


def print_table() -> None:
    """What has been measured: means over the seeds, beside controls of equal training."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["network"], row["shift"], sum(row["epochs"]), row["rate"], row.get("format", 1)
        groups.setdefault(key, {})[row["seed"]] = row
    print(
        "| network | images moved | epochs | rate | format | seeds | test error | smaller | bytes |"
    )
    print("|---|---|---:|---:|---:|---:|---|---|---|")
    for (network, shift, epochs, rate, format_), by_seed in sorted(groups.items()):
        runs = [by_seed[seed] for seed in sorted(by_seed)]
        tests = ", ".join(f"{run['test_error']:.2f}" for run in runs)
        sizes = ", ".join(f"{run['bytes']:,}" for run in runs)
        smaller = ", ".join(f"{run['ratio']:.0f}x" for run in runs) if rate else "control"
        moved = f"{shift} pixel" if shift else "no"
        named = f"{format_}" if rate else ""
        print(f"| {network} | {moved} | {epochs} | {rate:g} | {named} | ", end="")
        print(f"{len(runs)} | {tests} % | ", end="")
        print(f"{smaller} | {sizes} |")


def main() -> None:
    """Run what the command line names."""
    if sys.argv[1:] == ["--table"]:
        print_table()
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.02])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plain", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--rise", type=float, default=0.25)
    parser.add_argument("--shift", type=int, default=0, help="pixels, of the training images")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=31)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--every", type=int, default=5)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = read_mnist(settings.mnist)
    for seed in settings.seeds:
        settings.seed = seed
        for rate in settings.rates:
            keep(RESULTS, **run(settings.network, data, settings, rate))


if __name__ == "__main__":
    main()
