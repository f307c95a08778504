"""README's table: every figure that others published, and ours beside it, from committed reports.

    python benchmarks/results_table.py --run kws_k8 --seeds 0 1 2   # measure a row again
    python benchmarks/results_table.py --write                      # the table, into README.md

Each of `RUNS` is a recipe with settings; its report.json of a seed is kept as
benchmarks/results/NAME.SEED.json. The two LeNets and Arm's network are in deep_compression.json,
which benchmarks/deep_compression.py makes; MobileNets of full size, NAME_full.0.json, are
benchmarks/mobilenet_sizes.py's. The table stands in README.md between two comments and is made of
these files alone, so it cannot drift; tests/test_results_table.py compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = Path("runs/results_table")
BEGIN, END = "<!-- results -->", "<!-- /results -->"
Report = dict[str, Any]

TENTH = "finetune={epochs: 2, lr_scale: 0.1}"
FLOAT_CODEBOOK = "cluster={{n_clusters: {}, init: {}, max_iter: {}, assignment: nearest}}"
LAST_THREE = {  # the last convolutions and the classifier, which is one too in Keras's MobileNetV1
    "mobilenet_v1": ("14.3.weight", "15.3.weight", "19.weight"),
    "mobilenet_v2": ("19.6.weight", "20.weight", "26.weight"),
}


def selective(network: str, k: int) -> str:
    """The setting that clusters the last three layers only."""
    rules = ", ".join(f"{name}: {k}" for name in LAST_THREE[network])
    return f'cluster.rules={{"*": null, {rules}}}'


# The recipe and the settings of a row, by its name.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "mlperf_kws": ("mlperf_tiny/kws", ()),
    "mlperf_kws_fine_tuned": ("mlperf_tiny/kws_fine_tuned", ()),
    "mlperf_vww": ("mlperf_tiny/vww", ()),
    "mlperf_ic_label_free": ("mlperf_tiny/ic_label_free", ()),
    "mlperf_ic": ("mlperf_tiny/ic", ()),
    "seed_article_priced": ("mnist_cnn_small", ()),
    "seed_article": ("mnist_cnn", (FLOAT_CODEBOOK.format(14, "linear", 0),)),
    "mnist_convnet": ("mnist_convnet", ()),
    "mnist_convnet_k16": ("mnist_convnet", ("cluster.n_clusters=16",)),
    "fashion_small": ("fashion_cnn", ()),
    "fashion_pruned": ("fashion_cnn_pruned", ()),
    "fashion_k14": ("fashion_cnn", (FLOAT_CODEBOOK.format(14, "linear", 0), TENTH)),
    "fashion_k16": ("fashion_cnn", (FLOAT_CODEBOOK.format(16, "optimal", 300), TENTH)),
    "fashion_k32": ("fashion_cnn", (FLOAT_CODEBOOK.format(32, "linear", 0), TENTH)),
    "kws_k32": ("kws_ds_cnn_l", ()),
    "kws_k8": ("kws_ds_cnn_l", ("cluster.n_clusters=8",)),
    **{network: (f"{network}_fashion", ()) for network in LAST_THREE},
    **{
        f"{network}_last3_k{k}": (f"{network}_fashion", (selective(network, k),))
        for network in LAST_THREE
        for k in (16, 32)
    },
}


@dataclass(frozen=True)
class Row:
    """A line of the table: what others published, and the results of ours that stand beside it.

    Attributes:
        label: network and number of clusters.
        published: whose figure, from shared TARGETS: data, accuracies, sizes; in words.
        run: name of our reports, for accuracy.
        sizes: name of our reports for sizes, where those are of another model; empty: `run`.
        data: ours, in words.
        size: which bytes the size column compares: "zip" (float .tflite), "packed", or "vela".
    """

    label: str
    published: tuple[str, str]
    run: str
    data: str
    sizes: str = ""
    size: str = "zip"


def kb(before: float, after: float) -> str:
    """Two sizes in bytes and their ratio.

    >>> kb(1_602_422, 196_180)
    '1,602 → 196 kB (8.2x)'
    """
    return f"{before / 1000:,.0f} → {after / 1000:,.0f} kB ({before / after:.1f}x)"


MOBILE = "Fashion-MNIST, a quarter wide; sizes of the full network, resampled weights"
TFMOT = "TFMOT, "
WHOLE_MNIST = "MNIST, 55,000 images, moved by up to a pixel, and 10,000 for the test"

# Sources: the seed article (MNIST, TensorFlow); TFMOT's table of results in its clustering guide,
# sizes of zipped float .tflite files; TFMOT 0.8.1 measured on the seed article's network; Arm's
# clustering study for the Ethos-U55; Deep Compression, Table 1; D. Oktay, J. Balle, S. Singh and
# A. Shrivastava, "Scalable model compression by entropy penalized reparameterization", ICLR 2020.
ROWS = (
    Row("MLPerf Tiny keyword spotting, k=16, no labels", ("reference weights, 92 %", ""),
        "mlperf_kws", "Speech Commands, 1,908 test clips", size="vela"),
    Row("MLPerf Tiny keyword spotting, k=16", ("reference weights, 92 %", ""),
        "mlperf_kws_fine_tuned", "Speech Commands, 2,982 clips and 1,908 for the test",
        size="vela"),
    Row("MLPerf Tiny visual wake words, k=16, no labels", ("reference weights, 86 %", ""),
        "mlperf_vww", "COCO, 118 validation images", size="vela"),
    Row("ResNet-8, at a price of bits, no labels", ("reference, CIFAR-10, 87 %", ""),
        "mlperf_ic_label_free", "CIFAR-10 as JPEG, 10,000 test images", size="vela"),
    Row("ResNet-8, at a price of bits", ("reference, CIFAR-10, 87 %", ""),
        "mlperf_ic", "CIFAR-10 as JPEG, 10,000 test images", size="vela"),
    Row("LeNet-300-100, at a price of bits", ("Oktay et al. 2020, MNIST, 98.1", "124x, coded"),
        "priced lenet_300_100 0.3", WHOLE_MNIST, size="packed"),
    Row("LeNet-5, at a price of bits", ("Havasi et al. 2019, MNIST, 99.3", "555x, coded"),
        "priced lenet_5 0.5", WHOLE_MNIST, size="packed"),
    Row("LeNet-5, at a higher one", ("Oktay et al. 2020, MNIST, 99.0", "606x, coded"),
        "priced lenet_5 0.65", WHOLE_MNIST, size="packed"),
    Row("seed CNN, at a price of bits",
        ("seed article, MNIST 99.20 → 99.19", kb(1_602_422, 196_180)),
        "seed_article_priced", "MNIST, 60,000 and 10,000 images"),
    Row("seed CNN, k=14", ("seed article, MNIST 99.20 → 99.19", kb(1_602_422, 196_180)),
        "seed_article", "5,000 of MNIST"),
    Row("ConvNet, k=32", (TFMOT + "MNIST 99.40 → 98.78", kb(570_000, 90_000)),
        "mnist_convnet", "5,000 of MNIST"),
    Row("ConvNet, k=16", ("TFMOT (k=32), MNIST 99.40 → 98.78", kb(570_000, 90_000)),
        "mnist_convnet_k16", "5,000 of MNIST"),
    Row("seed CNN, k=14", ("TFMOT measured, Fashion-MNIST 90.06 → 89.54", kb(1_599_984, 185_924)),
        "fashion_k14", "Fashion-MNIST"),
    Row("seed CNN, k=16", ("TFMOT measured, Fashion-MNIST 90.06 → 90.00", kb(1_599_984, 294_139)),
        "fashion_k16", "Fashion-MNIST"),
    Row("seed CNN, k=32", ("TFMOT measured, Fashion-MNIST 90.06 → 90.04", kb(1_599_984, 271_540)),
        "fashion_k32", "Fashion-MNIST"),
    Row("seed CNN, k=32/24/12/32 by layer",
        ("TFMOT measured (k=14), Fashion-MNIST 90.06 → 89.54", kb(1_599_984, 185_924)),
        "fashion_small", "Fashion-MNIST"),
    Row("seed CNN with BatchNorm, 87 % zeros, k=16",
        ("TFMOT measured (k=14), Fashion-MNIST 90.06 → 89.54", kb(1_599_984, 185_924)),
        "fashion_pruned", "Fashion-MNIST"),
    Row("DS-CNN-L, k=32", (TFMOT + "Speech Commands 95.23 → 95.09", kb(1_460_000, 390_000)),
        "kws_k32", "12 synthetic keywords"),
    Row("DS-CNN-L, k=8", (TFMOT + "Speech Commands 95.23 → 94.27", kb(1_460_000, 270_000)),
        "kws_k8", "12 synthetic keywords"),
    Row("MobileNetV1, k=32", (TFMOT + "ImageNet 70.98 → 69.40", kb(14_970_000, 4_430_000)),
        "mobilenet_v1", MOBILE, "mobilenet_v1_full"),
    Row("MobileNetV1, last three k=16", (TFMOT + "ImageNet 70.98 → 70.29",
                                         kb(14_970_000, 7_690_000)),
        "mobilenet_v1_last3_k16", MOBILE, "mobilenet_v1_last3_k16_full"),
    Row("MobileNetV1, last three k=32", (TFMOT + "ImageNet 70.98 → 70.69",
                                         kb(14_970_000, 8_220_000)),
        "mobilenet_v1_last3_k32", MOBILE, "mobilenet_v1_last3_k32_full"),
    Row("MobileNetV2, k=32", (TFMOT + "ImageNet 71.78 → 69.74", kb(12_380_000, 4_050_000)),
        "mobilenet_v2", MOBILE, "mobilenet_v2_full"),
    Row("MobileNetV2, last three k=16", (TFMOT + "ImageNet 71.78 → 70.74",
                                         kb(12_380_000, 6_680_000)),
        "mobilenet_v2_last3_k16", MOBILE, "mobilenet_v2_last3_k16_full"),
    Row("MobileNetV2, last three k=32", (TFMOT + "ImageNet 71.78 → 70.93",
                                         kb(12_380_000, 7_030_000)),
        "mobilenet_v2_last3_k32", MOBILE, "mobilenet_v2_last3_k32_full"),
    Row("784-128-64-10, pruned and k=8", ("Arm (k=32), MNIST 97 throughout",
                                          kb(93.17 * 1024, 22.22 * 1024) + ", Vela"),
        "arm_mlp", "5,000 of MNIST", size="vela"),
    Row("784-128-64-10, k=8", ("Arm (k=32), MNIST 97 throughout",
                               kb(93.17 * 1024, 54.86 * 1024) + ", Vela"),
        "arm_mlp_clustered", "5,000 of MNIST", size="vela"),
    Row("LeNet-300-100, pruned and k=16", ("Deep Compression, MNIST 98.36 → 98.42", "40x, coded"),
        "lenet_300_100", "5,000 of MNIST", size="packed"),
    Row("LeNet-5, pruned and k=16", ("Deep Compression, MNIST 99.20 → 99.26", "39x, coded"),
        "lenet_5", "5,000 of MNIST", size="packed"),
)  # fmt: skip

HEAD = ("network, clusters", "published: accuracy, %", "published: size", "our data",
        "our accuracy, %: control → clustered", "our size", "int8 file, %: control → clustered",
        "Vela's encoded weights")  # fmt: skip


def reports(name: str) -> list[Report]:
    """The committed results of a run, one for each seed."""
    if name.startswith("priced "):
        _, network, rate = name.split()
        return priced(network, float(rate))
    files = sorted(RESULTS.glob(f"{name}.[0-9]*.json"))
    collected = RESULTS / "deep_compression.json"
    if files or not collected.exists():
        return [json.loads(file.read_text()) for file in files]
    return [found for found in json.loads(collected.read_text()) if found["run"] == name]


def priced(network: str, rate: float) -> list[Report]:
    """What benchmarks/rate_lenets.py measured with moved images, newest format, by seed."""
    path = RESULTS / "rate_lenets.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["network"] == network and row["shift"]]
    controls = {(row["seed"], *row["epochs"]): row for row in rows if not row["rate"]}
    found = {}
    for row in sorted(rows, key=lambda row: row.get("format", 1)):
        control = controls.get((row["seed"], *row["epochs"]))
        if row["rate"] == rate and control is not None:
            found[row["seed"]] = {
                "accuracy": {
                    "control": 100 - control["test_error"],
                    "clustered": 100 - row["test_error"],
                    **dict.fromkeys(("baseline_int8", "int8")),
                },
                "dense_bytes": round(row["bytes"] * row["ratio"]),
                "bytes": {"packed": row["bytes"]},
                "vela": dict.fromkeys(("baseline_encoded_weight_bytes", "encoded_weight_bytes")),
            }
    return [found[seed] for seed in sorted(found)]


def average(found: Sequence[Report], section: str, key: str) -> float | None:
    """The mean over seeds of a figure; None where it was not measured."""
    values = [report[section][key] for report in found]
    return None if not values or None in values else mean(values)


def cells(row: Row) -> tuple[str, ...] | None:
    """A row's cells, or None where nothing has been measured."""
    ours, sized = reports(row.run), reports(row.sizes or row.run)
    if not ours and not sized:
        return None
    seeds = f"{len(ours)} seed{'s' if len(ours) != 1 else ''}" if ours else "sizes only"
    return (
        row.label,
        *row.published,
        f"{row.data} ({seeds})",
        _change(ours, "control", "clustered"),
        _size(row, sized),
        _change(ours, "baseline_int8", "int8"),
        _ratio(sized, "vela", "baseline_encoded_weight_bytes", "encoded_weight_bytes"),
    )


def _change(found: Sequence[Report], before: str, after: str) -> str:
    values = [average(found, "accuracy", key) for key in (before, after)]
    return "" if None in values else f"{values[0]:.2f} → {values[1]:.2f}"


def _ratio(found: Sequence[Report], section: str, before: str, after: str) -> str:
    first, second = average(found, section, before), average(found, section, after)
    return kb(first, second) if first and second else ""


def _size(row: Row, found: Sequence[Report]) -> str:
    if row.size == "packed":
        return f"{mean(r['dense_bytes'] / r['bytes']['packed'] for r in found):.1f}x, coded"
    if row.size == "vela":
        size = _ratio(found, "vela", "baseline_encoded_weight_bytes", "encoded_weight_bytes")
        return f"{size}, Vela"
    return _ratio(found, "bytes", "float_tflite_zip", "clustered_float_tflite_zip")


def table() -> str:
    """The table with its caption, as Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += [f"| {' | '.join(found)} |" for row in ROWS if (found := cells(row)) is not None]
    return "\n".join([*CAPTION, "", *lines])


CAPTION = (
    "Sizes are of zipped float .tflite files unless they say otherwise. *Control* is the same",
    "trained model, trained on for as long without clustering. Vela 5.2 for ethos-u55-128; means",
    "over the seeds, 1 kB is 1,000 bytes. *No labels*: the published weights, clustered to 512 (or",
    "111) unlabelled inputs and never trained, so one seed; a difference has a standard error of",
    "about 0.3 points on 1,908 clips and 1.5 on 118 images, which the network may have seen.",
    "Made by `benchmarks/results_table.py`.",
)


def inserted(readme: str) -> str:
    """A README with the table between its two comments, of which the second may be missing."""
    before, begin, after = readme.partition(BEGIN)
    if not begin:
        raise ValueError(f"README.md has no line {BEGIN}")
    rest = after.partition(END)[2] if END in after else after
    return f"{before}{BEGIN}\n{table()}\n{END}{rest}"


def run(name: str, seed: int) -> None:
    """Run a row's recipe with one seed and keep its report."""
    from torchclust.recipes.load import load_recipe
    from torchclust.recipes.run import run_recipe

    recipe, settings = RUNS[name]
    output = FOLDER / f"{name}_{seed}"
    run_recipe(
        load_recipe(ROOT / "recipes" / f"{recipe}.yaml", [*settings, f"seed={seed}"]),
        output,
        resume=True,
        stage_folder=FOLDER / "stages",
        say=lambda line: print(f"  {line}", flush=True),
        progress=False,
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.{seed}.json").write_text((output / "report.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="+", choices=RUNS, default=[], help="rows to measure")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    args = parser.parse_args()
    for name in args.run:
        for seed in args.seeds:
            run(name, seed)
    if args.write:
        README.write_text(inserted(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
