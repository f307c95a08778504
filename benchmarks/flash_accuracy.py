"""Flash against accuracy on Fashion-MNIST: int8 codebooks, other ways, and no clustering.

    python benchmarks/flash_accuracy.py [--seeds 0 1 2] [--batch-norm off on]
                                        [--points mixed even curve cqat priced]
    python benchmarks/flash_accuracy.py --table          # means over the seeds measured so far
    python benchmarks/flash_accuracy.py --plot docs/flash_accuracy.png

The network and training of recipes/fashion_cnn.yaml: 6 epochs of Adam at 1e-3, batches of 250, then
2 epochs from 3e-4 down to 0 along a cosine, the unclustered control too. Points that train at a
price of bits, and a control of their own, take 12 epochs from 1e-3 down instead, and leave out
5,000 training images on which a price can be chosen (`val_accuracy`, of the int8 file). Every point
goes through export, LiteRT's kernels on all 10,000 test images, and Vela for ethos-u55-128
(Ethos_U55_High_End_Embedded, Shared_Sram). Results are appended to
benchmarks/results/flash_accuracy.jsonl, so an interrupted run goes on; trained networks are kept in
runs/flash_accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rows import keep
from torch import Tensor, nn

from torchclust import cluster_, strip_, zoo
from torchclust.export import to_tflite, vela
from torchclust.export.file_network import of_tflite
from torchclust.lightning import WeightClustering
from torchclust.lightning.trees import Callback, installed
from torchclust.recipes.classifier import Classifier, accuracy
from torchclust.recipes.loaders import of_loaders
from torchclust.recipes.schema import Schedule
from torchclust.recipes.training import fit
from torchclust.zoo import Data, fashion_mnist, loader, samples
from torchclust.zoo.dataset import ImageArrays

FOLDER = Path("runs/flash_accuracy")
RESULTS = Path(__file__).parent / "results" / "flash_accuracy.jsonl"
INT8 = {"codebook_dtype": "int8", "assignment": "nearest"}
FLOAT = {"assignment": "nearest"}
CQAT = "int8 codebook and quantized activations, 3 codes"
KINDS = ("mixed", "even", "curve", "cqat", "priced")
EVEN = (4, 6, 8, 12)
RATES = (0.03, 0.05, 0.1)  # of the priced points
PRICED_CONTROL = "control, 12 epochs"
HELD_OUT = 5000
CODES = {4: 3, 6: 5, 8: 7, 16: 15, 32: 31}


def mixed(second: int, dense: Any) -> dict[str, Any]:
    """31 codes for the first and the last layer, which hold 0.7 % of the weights."""
    return {"conv1.weight": 32, "conv2.weight": second, "dense1.weight": dense, "dense2.weight": 32}


def points() -> dict[str, tuple[Any, Mapping[str, str]]]:
    """Every point by name: rules and options; None is the unclustered control."""
    found: dict[str, tuple[Any, Mapping[str, str]]] = {
        "control": (None, {}),
        "mixed 15/9": (mixed(16, 10), INT8),
        "mixed 5/3": (mixed(6, 4), INT8),
        CQAT: (4, INT8),
    }
    found[PRICED_CONTROL] = (None, {})
    for rate in RATES:
        found[f"priced {rate}"] = (31, {**FLOAT, "rate": rate})
        found[f"priced int8 {rate}"] = (31, {**INT8, "rate": rate})
    for k in EVEN:  # evenly spaced at first, so most weights share a few of the values
        dense = {"n_clusters": k, "init": "linear", "max_iter": 0, **FLOAT}
        found[f"even {k}"] = (mixed(24, dense), FLOAT)
    for k, codes in CODES.items():
        found[f"int8 codebook, {codes} codes"] = (k, INT8)
    for k in CODES:
        found[f"float codebook, then quantized, {k} clusters"] = (k, FLOAT)
    return found


def kind(name: str) -> str:
    """Which of `KINDS` a point belongs to; the control goes with the mixed ones."""
    if name == CQAT:
        return "cqat"
    if name.startswith("priced") or name == PRICED_CONTROL:
        return "priced"
    return "curve" if "codebook" in name else "even" if name.startswith("even") else "mixed"


def without_held_out(data: Data) -> tuple[Data, ImageArrays]:
    """The data with fewer training images, and those that were taken out."""
    assert isinstance(data.train, ImageArrays)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    held, kept = (
        ImageArrays(data.train.images[part].numpy(), data.train.labels[part].numpy())
        for part in (order[:HELD_OUT], order[HELD_OUT:])
    )
    return replace(data, train=kept), held


def base(data: Data, seed: int, batch_norm: bool) -> nn.Module:
    """The trained network, from its file if it is there."""
    part = "" if len(data.train) == 60_000 else "_held_out"
    path = FOLDER / f"base_{seed}_{int(batch_norm)}{part}.pt"
    torch.manual_seed(seed)
    model = zoo.seed_cnn(batch_norm=batch_norm)
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model.eval()
    train_(model, data, seed, epochs=6)
    torch.save(model.state_dict(), path)
    return model


def as_others_do(model: nn.Module) -> nn.Module:
    """A stripped model whose values are no longer equal.

    The exporter recognises a stripped model's codebook by its few values and keeps its codes; this
    hides them, so that weights are quantized per channel by minimum and maximum. Much less than
    1e-4, and float32 leaves a few neighbours of each value, which the exporter still recognises.
    """
    strip_(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-4 * torch.rand_like(parameter))
    return model


def train_(
    model: nn.Module,
    data: Data,
    seed: int,
    *,
    epochs: int,
    lr: float = 1e-3,
    schedule: Schedule = "constant",
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train in place, with Adam."""
    batches = of_loaders(installed()[0], train=loader(data.train, 250, seed=seed))
    module = Classifier(model, lr, schedule)
    fit(module, batches, epochs=epochs, seed=seed, callbacks=callbacks, progress=False)


def measure(data: Data, seed: int, batch_norm: bool, name: str) -> dict[str, Any]:
    rules, options = points()[name]
    priced = kind(name) == "priced"
    data, held_out = without_held_out(data) if priced else (data, None)
    model = base(data, seed, batch_norm)
    if rules is not None:
        cluster_(model, rules, **options)
    callback = WeightClustering(lr_scale=1.0, strip=False, quantize_activations=name == CQAT)
    callbacks = [callback] if name == CQAT or (priced and rules is not None) else []
    epochs, lr = (12, 1e-3) if priced else (2, 3e-4)
    train_(model, data, seed, epochs=epochs, lr=lr, schedule="cosine", callbacks=callbacks)
    reached = accuracy(model, loader(data.test, 1000))
    if name.startswith("float"):
        model = as_others_do(model)
    calibration: Tensor = samples(data.train, 200, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        done = to_tflite(model, calibration[:1], path, calibration=[calibration])
        report = vela(path, output_dir=folder)
        file = of_tflite(done, model, [calibration])
        percent = accuracy(file, loader(data.test, 1000))
        chosen_on = {"val_accuracy": accuracy(file, loader(held_out, 1000))} if held_out else {}
    return {
        "point": name,
        "seed": seed,
        "batch_norm": batch_norm,
        "accuracy": reached,
        **chosen_on,
        "int8_accuracy": percent,
        "flash_kib": report.flash_bytes / 1024,
        "encoded_kib": report.encoded_weight_bytes / 1024,
        "torch": torch.__version__,
    }


def results() -> list[dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def averages() -> dict[tuple[bool, str], dict[str, float]]:
    """Means over seeds; ``loss`` is against the control of the same seed and network."""
    by_run = {(r["batch_norm"], r["seed"], r["point"]): r for r in results()}
    grouped = defaultdict(list)
    for (batch_norm, seed, name), row in by_run.items():
        own_control = PRICED_CONTROL if kind(name) == "priced" else "control"
        control = by_run.get((batch_norm, seed, own_control))
        if control is not None:
            loss = control["int8_accuracy"] - row["int8_accuracy"]
            grouped[batch_norm, name].append({**row, "loss": loss})
    keys = ("accuracy", "int8_accuracy", "loss", "flash_kib", "encoded_kib")
    return {
        key: {"seeds": len(rows), **{k: mean(row[k] for row in rows) for k in keys}}
        for key, rows in grouped.items()
    }


def print_table() -> None:
    print(
        "| BatchNorm | point | seeds | float % | int8 % | points lost | flash KiB | weights KiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (batch_norm, name), row in sorted(averages().items()):
        print(
            f"| {'on' if batch_norm else 'off'} | {name} | {row['seeds']:.0f} "
            f"| {row['accuracy']:.2f} | {row['int8_accuracy']:.2f} | {row['loss']:+.2f} "
            f"| {row['flash_kib']:.1f} | {row['encoded_kib']:.1f} |"
        )


def plot(path: Path) -> None:
    """Points gained or lost against the control of the same seed, over flash; with BatchNorm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    found = {name: row for (batch_norm, name), row in averages().items() if batch_norm}
    for prefix, label, style, side in (
        ("int8 codebook,", "int8 codebook, one number of codes for all layers", "o-", "right"),
        ("float codebook,", "float codebook, rounded channel by channel", "s--", "left"),
        ("mixed", "int8 codebook, more codes for the first and last layer", "*", "center"),
        ("priced int8", "int8 codebook, trained at a price, 1 seed", "D-", "right"),
        ("even", "float codebook, 4 to 12 evenly spaced in the big layer", "v-", "right"),
    ):
        own = [(name, found[name]) for name in points() if prefix in name and name in found]
        rows = sorted((r["flash_kib"], -r["loss"], name) for name, r in own)
        flash, gained = [r[0] for r in rows], [r[1] for r in rows]
        axes.plot(flash, gained, style, label=label, markersize=11 if style == "*" else 6)
        if side != "center":
            for x, y, name in rows:
                words = name.removeprefix("even ").replace("priced int8", "rate").split(", ")[-1]
                offset = (-6, 4) if side == "right" else (8, -14)
                axes.annotate(words, (x, y), offset, textcoords="offset points", size=7, ha=side)
    axes.plot(found["control"]["flash_kib"], 0, "kD", label="not clustered, int8")
    axes.axhline(0, color="k", linewidth=0.5, linestyle=":")
    axes.set_xlabel("flash, KiB (Vela, Ethos-U55-128)")
    axes.set_ylabel("int8 accuracy against not clustered, points")
    axes.set_title("Fashion-MNIST, CNN with BatchNorm, 431,000 weights", fontsize=10)
    axes.set_xlim(0, 440)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-norm", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--points", nargs="+", choices=KINDS, default=["mixed"])
    parser.add_argument("--table", action="store_true", help="print what has been measured")
    parser.add_argument("--plot", type=Path, help="draw what has been measured with BatchNorm")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if args.table or args.plot:
        print_table() if args.table else plot(args.plot)
        return
    data = fashion_mnist()
    done = {(r["batch_norm"], r["seed"], r["point"]) for r in results()}
    for seed in args.seeds:
        for batch_norm in (choice == "on" for choice in args.batch_norm):
            for name in points():
                if kind(name) in args.points and (batch_norm, seed, name) not in done:
                    keep(RESULTS, **measure(data, seed, batch_norm, name))


if __name__ == "__main__":
    main()
