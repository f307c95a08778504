"""How long VGG-16-sized weights take to pack and to load, how small they get, in what memory.

    python benchmarks/packing.py [--codebook-dtype int8] [--repeats 3]

The 138M weights are Gaussian, pruned and clustered as Deep Compression's Table 5 says (7.5 % left;
8 bits in convolutions, 5 in fully connected layers; it packs the real ones into 11.3 MB, 49x).
Printed are medians over the repetitions, the file beside its entropy, and the peak of resident
memory above what the model holds (Linux), in units of the largest tensor. On a machine that does
other things meanwhile, processor time is the figure to look at.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from torchclust import cluster_, strip_
from torchclust.packing import load_packed_, save_packed

KEPT = (58, 22, 34, 36, 53, 24, 42, 32, 27, 34, 35, 29, 36, 4, 4, 23)
"""Percent of each layer's weights that pruning leaves: Table 5, first column."""


def vgg16() -> nn.Module:
    """VGG-16's 13 convolutions and 3 fully connected layers; only the weights matter."""
    layers: list[nn.Module] = []
    inputs = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers.append(nn.Conv2d(inputs, width, 3, padding=1))
            inputs = width
    layers += [nn.Linear(512 * 7 * 7, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 1000)]
    return nn.Sequential(*layers)


def prune_(model: nn.Module) -> None:
    """Gaussian weights; all but the largest set to zero."""
    for layer, percent in zip(model.children(), KEPT, strict=True):
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        with torch.no_grad():
            fan_in = weight[0].numel()
            weight.normal_(0, fan_in**-0.5)
            quantile = torch.distributions.Normal(0, fan_in**-0.5).icdf(
                torch.tensor(1 - percent / 200)
            )
            weight.masked_fill_(weight.abs() < quantile, 0)


def peak_above(act: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds, seconds of processor time, and bytes of resident memory at the peak above before."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if clear.exists():
        clear.write_text("5")  # the peak starts anew from the present size
    before = _resident(status, "VmRSS")
    start, start_cpu = time.perf_counter(), time.process_time()
    act()
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return seconds, cpu, _resident(status, "VmHWM") - before


def _resident(status: Path, field: str) -> float:
    if not status.exists():
        return 0.0
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024.0 * int(lines[field].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--codebook-dtype", choices=("float32", "int8"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = vgg16()
    prune_(model)
    options = {"preserve_sparsity": True, "codebook_dtype": args.codebook_dtype}
    cluster_(model, {"Conv2d": 256, "Linear": 32}, **options)
    fresh = vgg16()
    largest = 4 * max(p.numel() for p in fresh.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vgg16.packed"
        save_packed(nn.Linear(2, 2), file)  # imports what it imports
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, ", end="")
        print(f"{torch.get_num_threads()} threads; codebook {args.codebook_dtype}\n")
        for form in ("clustered", "stripped"):
            if form == "stripped":
                strip_(model)
            pack = [peak_above(lambda: save_packed(model, file)) for _ in range(args.repeats)]
            load = [peak_above(lambda: load_packed_(fresh, file)) for _ in range(args.repeats)]
            for what, runs in (("pack", pack), ("load", load)):
                seconds, cpu, memory = (median(run[i] for run in runs) for i in range(3))
                times = f"{seconds:6.1f} s, {cpu:6.1f} s of processor"
                print(
                    f"{form:10} {what}  {times}  peak {memory / largest:.2f}x largest", flush=True
                )
        expected = model.state_dict()
        assert all(torch.equal(t, expected[name]) for name, t in fresh.state_dict().items())
        size = save_packed(model, file)
        print(f"\n{size}\n\n{size.rate:.1f}x; file / bound {size.bytes / size.entropy_bound:.4f}")


if __name__ == "__main__":
    main()
