"""Published networks, and all of the zoo: clustered must never be larger than unclustered.

    python benchmarks/real_networks.py --models MODELS --data DATA --networks kws vww --clusters 16
    python benchmarks/real_networks.py --networks arm_mlp resnet8 --clusters 64 --without-inputs
    python benchmarks/real_networks.py --table

MODELS holds published weights (mlperf_tiny_kws_bn.safetensors ...), DATA the folders that the data
sets of the zoo read (docs/real-networks.md); networks of the zoo have random weights. For every
network, number of clusters, kind of codebook, with and without inputs: Vela's encoded weights, the
zipped int8 file and the packed model as shares of the unclustered network's, and the test accuracy.
One line of JSON each, in benchmarks/results/real_networks.jsonl too. Without DATA, or where there
is none (anomaly detection, wake word, the zoo), inputs are noise and no accuracy is given.
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import keep, measure_or_print, published
from squeezenet_bytes import SqueezeNet
from torch import Tensor, nn

from torchclust import cluster_, save_packed
from torchclust.export import to_tflite, vela
from torchclust.recipes.artifacts import zipped_size
from torchclust.recipes.prepare import load_checkpoint_
from torchclust.zoo import Data, loader, mlperf_ad, mlperf_ic, mlperf_kws, mlperf_sww, mlperf_vww
from torchclust.zoo.data import DATASETS
from torchclust.zoo.dataset import samples
from torchclust.zoo.networks import MODELS

RESULTS = Path(__file__).parent / "results" / "real_networks.jsonl"
INPUTS, CALIBRATION = 256, 128
MEASURES = ("vela", "zip", "packed")


@dataclass(frozen=True)
class Network:
    """How a network is built, its input, the file of its weights, and its data set, if any."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    file: str = ""
    data: str = ""
    folder: str = ""


PUBLISHED = {
    "kws": Network(
        mlperf_kws, (1, 49, 10), "mlperf_tiny_kws_bn", "speech_commands", "speech_commands"
    ),
    "kws_older": Network(
        functools.partial(mlperf_kws, batch_norm=False),
        (1, 49, 10),
        "mlperf_tiny_kws_older",
        "speech_commands",
        "speech_commands",
    ),
    "vww": Network(
        mlperf_vww, (3, 96, 96), "mlperf_tiny_vww_bn", "visual_wake_words", "coco_vww96"
    ),
    "ic": Network(mlperf_ic, (3, 32, 32), "mlperf_tiny_ic_bn", "cifar10", "."),
    "ic_large": Network(
        functools.partial(mlperf_ic, filters=40, batch_norm=False),
        (3, 32, 32),
        "mlperf_tiny_ic_large",
        "cifar10",
        ".",
    ),
    "ic_jpeg": Network(mlperf_ic, (3, 32, 32), "cifar10jpeg_resnet8_bn", "cifar10", "."),
    "ad": Network(mlperf_ad, (640,), "mlperf_tiny_ad_bn"),
    "sww": Network(mlperf_sww, (40, 30, 1), "mlperf_tiny_sww_bn"),
    "squeezenet": Network(SqueezeNet, (3, 227, 227), "squeezenet_deep_compression"),
}
NARROW = {"mobilenet_v1": 0.25, "mobilenet_v2": 0.25}
ZOO = {
    name: Network(
        functools.partial(build, **({"width": NARROW[name]} if name in NARROW else {})),
        inspect.signature(build).parameters["input_shape"].default,
    )
    for name, build in MODELS.items()
}
NETWORKS = PUBLISHED | ZOO


def accuracy(model: nn.Module, data: Data | None) -> float | None:
    if data is None:
        return None
    with torch.no_grad():
        hits = [model(x).argmax(1) == y for x, y in loader(data.test, 250)]
    return 100 * float(torch.cat(hits).float().mean())


def sizes(model: nn.Module, images: Tensor, accelerator: str) -> dict[str, float]:
    """Bytes of one network, by what stores them, and what is left to the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        file, packed = Path(folder) / "net.tflite", Path(folder) / "net.packed"
        to_tflite(model, images[:1], file, calibration=[images[:CALIBRATION]])
        compiled = vela(file, accelerator=accelerator)
        save_packed(model, packed)
        return {
            "vela": compiled.encoded_weight_bytes,
            "zip": zipped_size(file),
            "packed": packed.stat().st_size,
            "cpu_ops": compiled.cpu_ops,
        }


def given(network: Network, args: argparse.Namespace) -> tuple[nn.Module, Data | None, Tensor]:
    """The network with its weights, its data set, and inputs: training samples, or noise."""
    torch.manual_seed(0)
    model, data = network.build(), None
    if network.file:
        load_checkpoint_(model, args.models / f"{network.file}.safetensors")
    if network.data and args.data:
        data = DATASETS[network.data](args.data / network.folder)
        return model.eval(), data, samples(data.train, INPUTS, seed=0)
    count = INPUTS if args.with_inputs else CALIBRATION
    count = min(count, max(2, 4_000_000 // torch.Size(network.shape).numel()))
    noise = torch.rand(count, *network.shape, generator=torch.Generator().manual_seed(0))
    return model.eval(), data, noise


def measure(name: str, args: argparse.Namespace) -> None:
    model, data, images = given(NETWORKS[name], args)
    before = sizes(model, images, args.accelerator)
    keep(RESULTS, network=name, accuracy=accuracy(model, data), **before)
    for k in args.clusters:
        for dtype in ("float32", "int8"):
            for inputs in (None, images) if args.with_inputs else (None,):
                clustered = copy.deepcopy(model)
                rules: dict[str, Any] = {"*": k}
                if args.depthwise and hasattr(model, "dw"):
                    rules["dw.*.conv.weight"] = max(k, args.depthwise)
                cluster_(clustered, rules, codebook_dtype=dtype, inputs=inputs)
                after = sizes(clustered, images, args.accelerator)
                shares = {key: round(after[key] / before[key], 3) for key in MEASURES}
                keep(
                    RESULTS,
                    network=name,
                    clusters=k,
                    codebook=dtype,
                    inputs=inputs is not None,
                    accuracy=accuracy(clustered, data),
                    cpu_ops=after["cpu_ops"],
                    **shares,
                )


def table() -> str:
    """Each network's largest shares of all that was measured, with clusters and codebook."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    rows = [row for row in rows if "clusters" in row]
    lines = [f"| network | clusters | {' | '.join(MEASURES)} |", "|---|---|" + "---:|" * 3]
    for name in dict.fromkeys(row["network"] for row in rows):
        found = [row for row in rows if row["network"] == name]
        worst = [max(found, key=lambda row, key=key: row[key]) for key in MEASURES]
        cells = [
            f"{row[key]:.3f} ({row['clusters']}, {row['codebook']})"
            for key, row in zip(MEASURES, worst, strict=True)
        ]
        numbers = ", ".join(str(k) for k in sorted({row["clusters"] for row in found}))
        lines.append(f"| {name} | {numbers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure_all(args: argparse.Namespace) -> None:
    for name in args.networks:
        measure(name, args)


def main() -> None:
    parser = published(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--clusters", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--depthwise", type=int, default=0, help="cluster depthwise kernels too")
    parser.add_argument("--accelerator", default="ethos-u55-128")
    parser.add_argument("--without-inputs", dest="with_inputs", action="store_false")
    measure_or_print(parser, measure_all, table)


if __name__ == "__main__":
    main()
