"""MLPerf Tiny's networks with their own weights: clustered must never be larger than unclustered.

    python benchmarks/real_networks.py --models MODELS --data DATA --networks kws vww --clusters 16

MODELS holds the reference weights (mlperf_tiny_kws_bn.safetensors ...), DATA the folders that the
data sets of the zoo read (docs/real-networks.md). For every network, number of clusters, kind of
codebook, with and without inputs: Vela's encoded weights, the zipped int8 file and the packed model
as shares of the unclustered network's, and the test accuracy. One line of JSON each. Where there is
no data (anomaly detection, wake word) inputs are noise and no accuracy is given.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchclust import cluster_, save_packed
from torchclust.export import to_tflite, vela
from torchclust.recipes.artifacts import zipped_size
from torchclust.recipes.prepare import load_checkpoint_
from torchclust.zoo import Data, loader, mlperf_ad, mlperf_ic, mlperf_kws, mlperf_sww, mlperf_vww
from torchclust.zoo.data import DATASETS
from torchclust.zoo.dataset import samples

INPUTS, CALIBRATION = 256, 128


@dataclass(frozen=True)
class Network:
    """How a network is built, its data set and that one's folder; its input's shape without one."""

    build: Callable[[], nn.Module]
    data: str | None
    folder: str
    shape: tuple[int, ...] = ()


NETWORKS = {
    "kws": Network(mlperf_kws, "speech_commands", "speech_commands"),
    "vww": Network(mlperf_vww, "visual_wake_words", "coco_vww96"),
    "ic": Network(mlperf_ic, "cifar10", "."),
    "ad": Network(mlperf_ad, None, "", (640,)),
    "sww": Network(mlperf_sww, None, "", (40, 30, 1)),
}


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


def measure(name: str, args: argparse.Namespace) -> None:
    network = NETWORKS[name]
    file = args.models / f"mlperf_tiny_{name}_bn.safetensors"
    model = load_checkpoint_(network.build(), file).eval()
    data = None
    if network.data is not None:
        data = DATASETS[network.data](args.data / network.folder)
        images = samples(data.train, INPUTS, seed=0)
    else:
        images = torch.rand(INPUTS, *network.shape, generator=torch.Generator().manual_seed(0))
    before = sizes(model, images, args.accelerator)
    say(network=name, accuracy=accuracy(model, data), **before)
    for k in args.clusters:
        for dtype in ("float32", "int8"):
            for inputs in (None, images):
                clustered = copy.deepcopy(model)
                rules: dict[str, Any] = {"*": k}
                if args.depthwise and name != "ic":
                    rules["dw.*.conv.weight"] = max(k, args.depthwise)
                cluster_(clustered, rules, codebook_dtype=dtype, inputs=inputs)
                after = sizes(clustered, images, args.accelerator)
                shares = {
                    key: round(after[key] / before[key], 3) for key in ("vela", "zip", "packed")
                }
                say(
                    network=name,
                    clusters=k,
                    codebook=dtype,
                    inputs=inputs is not None,
                    accuracy=accuracy(clustered, data),
                    cpu_ops=after["cpu_ops"],
                    **shares,
                )


def say(**found: Any) -> None:
    print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--clusters", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--depthwise", type=int, default=0, help="cluster depthwise kernels too")
    parser.add_argument("--accelerator", default="ethos-u55-128")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.networks:
        measure(name, args)


if __name__ == "__main__":
    main()
