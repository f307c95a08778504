"""Deep Compression's LeNets and Arm's MLP: three seeds, each beside a control with equal training.

    python benchmarks/deep_compression.py [--networks lenet_300_100 lenet_5 arm_mlp] [--seeds 0 1 2]
    python benchmarks/deep_compression.py --table > docs/deep-compression.md

Runs recipes/lenet_300_100.yaml and recipes/lenet_5.yaml as they are, and recipes/arm_mlp.yaml
pruned and clustered, clustered, and pruned, on mnist5k. What was measured is written to
benchmarks/results/deep_compression.json after every run, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from torchclust.packing.size import PackedRow, packed_size
from torchclust.recipes.load import load_recipe
from torchclust.recipes.run import run_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "deep_compression"
RESULTS = ROOT / "benchmarks" / "results" / "deep_compression.json"
Row = dict[str, Any]

# (recipe, settings) by the name of the run
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lenet_300_100": ("lenet_300_100", ()),
    "lenet_5": ("lenet_5", ()),
    "arm_mlp": ("arm_mlp", ()),
    "arm_mlp_clustered": ("arm_mlp", ("prune=null",)),
    "arm_mlp_pruned": ("arm_mlp", ("cluster=null", "finetune=null")),
}

# Han, Mao, Dally, "Deep Compression" (ICLR 2016), Tables 1, 2 and 3: the ratio and the errors
# before and after; per layer the weights kept (%), bits of a kept weight and of its position after
# Huffman coding, and the share of the float32 size (%).
PAPER: dict[str, tuple[str, list[tuple[str, int, float, float, float]]]] = {
    "lenet_300_100": (
        "40x, error 1.64 -> 1.58 %",
        [("ip1", 8, 4.4, 3.7, 2.32), ("ip2", 9, 4.4, 4.3, 3.04), ("ip3", 26, 4.3, 3.2, 12.70)],
    ),
    "lenet_5": (
        "39x, error 0.80 -> 0.74 %",
        [
            ("conv1", 66, 7.2, 1.5, 67.45),
            ("conv2", 12, 7.2, 3.9, 5.28),
            ("ip1", 8, 4.5, 4.5, 2.45),
            ("ip2", 19, 5.2, 3.7, 6.13),
        ],
    ),
}
ARM = {
    "arm_mlp": ("80 % pruned and clustered", "22.22 (plain 93.17)"),
    "arm_mlp_clustered": ("clustered", "54.86"),
    "arm_mlp_pruned": ("80 % pruned", "30.12"),
}

HEAD = """# Deep Compression, reproduced

The pipeline of Han, Mao and Dally (ICLR 2016): prune, share weights, entropy-code. Three seeds
each, on `mnist5k` (4,000 training and 1,000 test images; the paper trained on all 60,000 of MNIST),
every one beside a *control*: the dense network, trained on for as many epochs at the same rates.
Made by `python benchmarks/deep_compression.py` from [the recipes](../recipes); the figures are in
[benchmarks/results/deep_compression.json](../benchmarks/results/deep_compression.json).

## LeNet-300-100 and LeNet-5

Means (and single seeds) of test accuracy; the size is that of the whole `model.packed`, with
biases, codebooks and checksums, against float32.

| | dense control | compressed | bytes | smaller | the paper |
|---|---|---|---:|---:|---|"""
LAYER_HEAD = [
    "| layer | weights | kept: paper | ours | bits per kept weight: paper | ours "
    "| of float32: paper | ours |",
    "|---|---:|---:|---:|---:|---:|---:|---:|",
]
ARM_HEAD = """
The paper stores a kept weight's value and the distance to the next one, each Huffman-coded; a
packed file codes zeros as one more symbol, and its bits per kept weight hold both. All layers share
one threshold of magnitude here, so each keeps the share that it needs.

## Arm's MLP for the Ethos-U55

784-128-64-10, int8, compiled by Vela for `ethos-u55-128`; encoded weights in KiB. Arm's figures are
those of its study on MNIST, at 97 % throughout. *Plain* is the control, quantized to int8.

| | plain int8 | compressed int8 | plain, KiB | compressed, KiB | Arm's, KiB |
|---|---|---|---:|---:|---:|"""


def measure(name: str, seed: int) -> Row:
    """Run one recipe with one seed and keep the figures."""
    recipe, settings = RUNS[name]
    output = FOLDER / f"{name}_{seed}"
    report = run_recipe(
        load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*settings, f"seed={seed}"]),
        output,
        resume=True,
        stage_folder=FOLDER / "stages",
        say=lambda line: print(f"  {line}", flush=True),
        progress=False,
    )
    rows = packed_size(output / "model.packed").rows
    return {
        "run": name,
        "seed": seed,
        **{key: report[key] for key in ("accuracy", "bytes", "vela", "versions")},
        "dense_bytes": sum(row.n_elements * 4 for row in rows),
        "tensors": [_tensor(row) for row in rows],
    }


def _tensor(row: PackedRow) -> Row:
    kept = ("name", "shape", "n_clusters", "bytes", "bits_per_weight", "entropy_bits", "zeros")
    return {"n_elements": row.n_elements, **{key: getattr(row, key) for key in kept}}


def results() -> list[Row]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def document() -> str:
    """Return docs/deep-compression.md, from what was measured."""
    by_run = {name: [row for row in results() if row["run"] == name] for name in RUNS}
    lenets = {name: by_run[name] for name in PAPER}
    arm = {name: rows for name, rows in by_run.items() if name not in PAPER}
    layers = [line for name, rows in lenets.items() for line in _layers(name, rows)]
    return "\n".join([HEAD, *_lenets(lenets), *layers, ARM_HEAD, *_arm(arm), ""])


def _lenets(runs: dict[str, list[Row]]) -> list[str]:
    lines = []
    for name, rows in runs.items():
        ratio = mean(row["dense_bytes"] / row["bytes"]["packed"] for row in rows)
        n_bytes = mean(row["bytes"]["packed"] for row in rows)
        figures = (
            _accuracies(rows, "control"),
            _accuracies(rows, "clustered"),
            f"{n_bytes:,.0f}",
            f"**{ratio:.1f}x**",
            PAPER[name][0],
        )
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def _layers(name: str, rows: list[Row]) -> list[str]:
    """The paper's table of one network, our means over seeds beside it."""
    lines = ["", f"### {name}", "", *LAYER_HEAD]
    places = [i for i, t in enumerate(rows[0]["tensors"]) if t["name"].endswith("weight")]
    for place, (layer, kept, weight_bits, index_bits, share) in zip(
        places, PAPER[name][1], strict=True
    ):
        tensors = [row["tensors"][place] for row in rows]
        ours = mean(1 - t["zeros"] for t in tensors)
        each = mean(t["bits_per_weight"] / (1 - t["zeros"]) for t in tensors)
        size = mean(t["bits_per_weight"] / 32 for t in tensors)
        lines.append(
            f"| {layer} | {tensors[0]['n_elements']:,} | {kept} % | {100 * ours:.1f} % "
            f"| {weight_bits} + {index_bits} = {weight_bits + index_bits:.1f} | {each:.1f} "
            f"| {share} % | {100 * size:.2f} % |"
        )
    return lines


def _arm(runs: dict[str, list[Row]]) -> list[str]:
    lines = []
    for name, rows in runs.items():
        plain, ours = (
            mean(row["vela"][key] for row in rows) / 1024
            for key in ("baseline_encoded_weight_bytes", "encoded_weight_bytes")
        )
        what, cited = ARM[name]
        lines.append(
            f"| {what} | {_accuracies(rows, 'baseline_int8')} | {_accuracies(rows, 'int8')} "
            f"| {plain:.1f} | **{ours:.1f}** | {cited} |"
        )
    return lines


def _accuracies(rows: list[Row], key: str) -> str:
    """The mean, then every seed's."""
    values = [row["accuracy"][key] for row in rows]
    return f"{mean(values):.2f} % ({', '.join(f'{value:.1f}' for value in values)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=sorted({r for r, _ in RUNS.values()}),
                        default=["lenet_300_100", "lenet_5", "arm_mlp"])  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print docs/deep-compression.md")
    args = parser.parse_args()
    if args.table:
        print(document(), end="")
        return
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in (n for n, (recipe, _) in RUNS.items() if recipe in args.networks):
            rows = results()
            if any((row["run"], row["seed"]) == (name, seed) for row in rows):
                continue
            print(f"{name}, seed {seed}", flush=True)
            rows.append(measure(name, seed))
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
