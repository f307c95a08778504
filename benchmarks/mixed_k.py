"""A budget of flash shared among tensors against one number of clusters for all, Fashion-MNIST.

    python benchmarks/mixed_k.py [--seeds 0 1 2] [--budgets 86 131]
    python benchmarks/mixed_k.py --table

The network, the training and the measurements of benchmarks/flash_accuracy.py, BatchNorm on: base
networks and uniform points are taken from its folder where they are there (it measures the latter
with ``--points curve --batch-norm on``). Numbers of clusters are chosen as a recipe's
``cluster: {budget: ...}`` does, on training images. Written to benchmarks/results/mixed_k.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from torchclust import zoo
from torchclust.allocation.knapsack import Curves
from torchclust.export import to_tflite, vela
from torchclust.export.file_network import of_tflite
from torchclust.lightning.trees import installed
from torchclust.recipes import choice
from torchclust.recipes.classifier import Classifier, accuracy
from torchclust.recipes.load import parse_recipe
from torchclust.recipes.loaders import of_loaders
from torchclust.recipes.prepare import clustered_copy
from torchclust.recipes.schema import ClusterSection, Recipe, Schedule
from torchclust.recipes.training import fit
from torchclust.zoo import Data, fashion_mnist, loader, samples

ROOT = Path(__file__).parent.parent
FLASH_ACCURACY = ROOT / "runs" / "flash_accuracy"
RESULTS = ROOT / "benchmarks" / "results" / "mixed_k.json"
Row = dict[str, Any]
CURVES: dict[int, Curves] = {}


def recipe_of(seed: int, budget: float) -> Recipe:
    return parse_recipe(
        {
            "name": "mixed_k",
            "seed": seed,
            "data": {"name": "fashion_mnist", "batch_size": 250},
            "model": {"name": "seed_cnn", "batch_norm": True},
            "train": {"epochs": 6},
            "cluster": {"budget": budget, "codebook_dtype": "int8", "assignment": "nearest"},
            "finetune": {"epochs": 2, "lr_scale": 0.3, "schedule": "cosine"},
            "export": {},
            "vela": {},
        }
    )


def base(data: Data, seed: int) -> nn.Module:
    """The trained network, from its file if it is there."""
    path = FLASH_ACCURACY / f"base_{seed}_1.pt"
    torch.manual_seed(seed)
    model = zoo.seed_cnn(batch_norm=True)
    if path.exists():
        values = torch.load(path).values()  # in order: the layers were once called by number
        model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
        return model.eval()
    return trained(data, model, seed, epochs=6, lr=1e-3, schedule="constant")


def trained(
    data: Data, model: nn.Module, seed: int, *, epochs: int, lr: float, schedule: Schedule
) -> nn.Module:
    batches = of_loaders(installed()[0], train=loader(data.train, 250, seed=seed))
    module = Classifier(model, lr, schedule)
    return fit(module, batches, epochs=epochs, seed=seed, progress=False).model


def measure(data: Data, seed: int, budget: float) -> Row:
    recipe, start = recipe_of(seed, budget), base(data, seed)
    if seed not in CURVES:
        images = samples(data.train, choice.SAMPLES, seed=seed)
        CURVES[seed] = choice.curves_of(recipe, start, images)
    models: dict[str, nn.Module] = {}

    def train(section: ClusterSection) -> nn.Module:
        print("  ", section.rules, flush=True)
        same = recipe.model_copy(update={"cluster": section})
        model = trained(
            data, clustered_copy(same, start), seed, epochs=2, lr=3e-4, schedule="cosine"
        )
        models[json.dumps(section.rules)] = model
        return model

    chosen = choice.choose(recipe, start, CURVES[seed], lambda section: 0.0, train)
    model = models[json.dumps(chosen.section.rules)]
    calibration = samples(data.train, 200, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        done = to_tflite(copy.deepcopy(model), calibration[:1], path, calibration=[calibration])
        report = vela(path, output_dir=folder)
        percent = accuracy(of_tflite(done, model, [calibration]), loader(data.test, 1000))
    return {
        "seed": seed,
        "budget_kib": budget,
        "rules": chosen.section.rules,
        "rounds": len(models),
        "predicted_kib": chosen.n_bytes / 1024,
        "encoded_kib": report.encoded_weight_bytes / 1024,
        "flash_kib": report.flash_bytes / 1024,
        "accuracy": accuracy(model, loader(data.test, 1000)),
        "int8_accuracy": percent,
        "vela": report.vela_version,
        "torch": torch.__version__,
    }


def results() -> list[Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def uniform() -> list[Row]:
    """The points of benchmarks/flash_accuracy.py with one number of codes for all, and control."""
    path = ROOT / "benchmarks" / "results" / "flash_accuracy.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = ("control", "int8 codebook")
    return [row for row in rows if row["batch_norm"] and row["point"].startswith(kinds)]


def print_table() -> None:
    """Means over the seeds that every row has."""
    rows = [{**row, "point": f"mixed, budget {row['budget_kib']:g}"} for row in results()]
    rows += uniform()
    print("| point | seeds | flash KiB | int8 % | float % |\n|---|---|---:|---:|---:|")
    lines = []
    for point in {row["point"] for row in rows}:
        own = [row for row in rows if row["point"] == point]
        flash, int8, float_ = (
            mean(row[key] for row in own) for key in ("flash_kib", "int8_accuracy", "accuracy")
        )
        seeds = " ".join(str(row["seed"]) for row in own)
        lines.append((flash, f"| {point} | {seeds} | {flash:.1f} | {int8:.2f} | {float_:.2f} |"))
    print("\n".join(line for _, line in sorted(lines)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", type=float, nargs="+", default=[86, 131])
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    args = parser.parse_args()
    if args.table:
        print_table()
        return
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    data = fashion_mnist()
    for seed in args.seeds:
        for budget in args.budgets:
            rows = results()
            if any((row["seed"], row["budget_kib"]) == (seed, budget) for row in rows):
                continue
            print(f"seed {seed}, {budget:g} KiB", flush=True)
            rows.append(measure(data, seed, budget))
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
