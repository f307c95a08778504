"""The Deep Compression authors' SqueezeNet, compressed again from their weights, without labels.

    python benchmarks/squeezenet_bytes.py --weights squeezenet_deep_compression.safetensors \
        --images FOLDER --rates 0.02 0.05

Their file has 675,763 bytes. FOLDER holds a folder of images for each of ImageNet's 1,000 classes,
in the usual order; 256 of them are what `inputs=` sees, without labels, and top 1 and top 5 are
judged on all 1,000 and on the other 744, paired with the authors' weights. Sizes are those of whole
packed files, read back before they are judged. One line of JSON for each setting, into
benchmarks/results/squeezenet_bytes.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rows import keep
from safetensors.torch import load_file
from torch import Tensor, nn

from torchclust import cluster_, load_packed_, save_packed

RESULTS = Path(__file__).parent / "results" / "squeezenet_bytes.jsonl"
AUTHORS = 675_763  # bytes
INPUTS, SIZE = 256, 227
MEAN = (104.0, 117.0, 123.0)  # blue, green, red
PLAN = (
    *((96, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128)),
    *((256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)),
)


class Fire(nn.Module):
    """1x1 down to few channels, then 1x1 and 3x3 up, side by side."""

    def __init__(self, inputs: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.0 as its authors' prototxt has it, the padded last convolution included."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, 2)
        for number, plan in enumerate(PLAN, start=2):
            self.add_module(f"fire{number}", Fire(*plan))
        self.conv_final = nn.Conv2d(512, 1000, 1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 227, 227), blue first, less the mean of each colour, to logits."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2, ceil_mode=True)
        for number in range(2, 10):
            x = self.get_submodule(f"fire{number}")(x)
            if number in (4, 8):
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        return F.relu(self.conv_final(x)).mean((2, 3))


def read(folder: Path) -> Tensor:
    """One image of each class: the centre of the shorter side 256, as uint8, blue first."""
    images = []
    for kind in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        with Image.open(sorted(kind.iterdir())[0]) as opened:
            image = opened.convert("RGB")
        scale = 256 / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (width - SIZE) // 2, (height - SIZE) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        images.append(np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).flip(1)


def centred(images: Tensor) -> Tensor:
    return images.float() - torch.tensor(MEAN).view(-1, 1, 1)


@torch.no_grad()
def hits(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each image's class is the first, and among the first five."""
    best = torch.cat([net(centred(part)).topk(5).indices for part in images.split(50)])
    right = best == torch.arange(len(images))[:, None]
    return right[:, 0].float() * 100, right.any(1).float() * 100


def judged(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], at: Tensor) -> list[Any]:
    """For top 1 and top 5: before, after, and the standard error of the difference."""
    found = []
    for first, second in zip(before, after, strict=True):
        difference = (second - first)[at]
        error = float(difference.std()) / len(at) ** 0.5
        found.append([float(first[at].mean()), float(second[at].mean()), round(error, 3)])
    return found


def compressed(net: nn.Module, images: Tensor, args: argparse.Namespace, rate: float) -> nn.Module:
    """Weights fitted to what the layers see, at a price; then the biases, by value."""
    net = copy.deepcopy(net)
    first = {"n_clusters": args.clusters, "rate": rate * args.first}
    cluster_(net, {"*": args.clusters, "conv1.weight": first}, rate=rate, inputs=centred(images))
    if args.bias_clusters:
        biases = [n for n, p in net.named_parameters() if n.endswith("bias")]
        worth = [n for n in biases if net.get_parameter(n).numel() >= 4 * args.bias_clusters]
        cluster_(net, {"*": None, **dict.fromkeys(worth, args.bias_clusters)})
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--clusters", type=int, default=32)
    parser.add_argument("--bias-clusters", type=int, default=32)
    parser.add_argument("--first", type=float, default=0.2, help="the first layer's share of rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02])
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = SqueezeNet()
    net.load_state_dict(load_file(args.weights))
    images = read(args.images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    before = hits(net.eval(), images)
    for rate in args.rates:
        began = time.process_time()
        smaller = compressed(net, images[order[:INPUTS]], args, rate)
        seconds = time.process_time() - began
        with tempfile.TemporaryDirectory() as folder:
            size = save_packed(smaller, Path(folder) / "net.packed").bytes
            packed = load_packed_(SqueezeNet(), Path(folder) / "net.packed").eval()
        after = hits(packed, images)
        found = {
            "clusters": args.clusters,
            "bias_clusters": args.bias_clusters,
            "rate": rate,
            "bytes": size,
            "share": round(size / AUTHORS, 4),
            "unseen": judged(before, after, order[INPUTS:]),
            "all": judged(before, after, order),
            "cpu_s": round(seconds, 1),
        }
        keep(RESULTS, **found)


if __name__ == "__main__":
    main()
