"""What a clustered training step, its evaluation and its memory cost against the plain ones.

    python benchmarks/step.py [--device cuda] [--model cnn mlp resnet50] [--repeats 15]
                              [--keep-freed]
    python benchmarks/step.py --memory

Each variant has a process of its own with the plain network, as large tensors of others would
disturb the allocator. Their steps take turns, so that a disturbance hits both; printed are medians
over the rounds and the ratio to the plain step. With --keep-freed glibc's allocator
keeps what is freed. As it comes, large tensors go back to the kernel and return as page faults: a
quarter of the MLP's plain step, and, 5,000 to 12,000 a step by chance, the scatter of the CNN's.
Memory is the peak resident size of a process of its own that takes five steps (CPU), less what it
held after its imports.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from torchclust import cluster_, zoo

KEEP_FREED = {  # glibc: serve large blocks from the heap too, and never shrink it
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
VARIANTS: dict[str, dict[str, str] | None] = {
    "plain": None,  # beside itself: how far apart equals lie
    "fixed": {},
    "fixed int8": {"codebook_dtype": "int8"},
    "nearest": {"assignment": "nearest"},
    "nearest int8": {"assignment": "nearest", "codebook_dtype": "int8"},
}


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 4096), nn.ReLU()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10)),
    )


def resnet50_weights() -> nn.Module:
    """The 53 convolutions and the classifier of ResNet-50 (25.5M weights), one after the other.

    Shapes and spatial sizes are ResNet-50's; the residual additions, which no clustering touches,
    are left out.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            for cin, cout, kernel, step in (
                (inputs, width, 1, 1),
                (width, width, 3, stride if block == 0 else 1),
                (width, 4 * width, 1, 1),
            ):
                conv = nn.Conv2d(cin, cout, kernel, step, kernel // 2, bias=False)
                layers += [conv, nn.BatchNorm2d(cout), nn.ReLU()]
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "cnn": (zoo.seed_cnn, (250, 1, 28, 28), 10),
    "mlp": (mlp, (250, 1, 28, 28), 10),
    "resnet50": (resnet50_weights, (64, 3, 224, 224), 1000),
}


def stepper(model: nn.Module, shape: tuple[int, ...], classes: int) -> Callable[[], object]:
    device = next(model.parameters()).device
    x, y = torch.randn(shape, device=device), torch.randint(classes, shape[:1], device=device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def evaluator(model: nn.Module, shape: tuple[int, ...], _: int) -> Callable[[], object]:
    x = torch.randn(shape, device=next(model.parameters()).device)

    def evaluate() -> Tensor:
        with torch.inference_mode():
            return model(x)  # type: ignore[no-any-return]

    return evaluate


def variant(plain: nn.Module, options: dict[str, str] | None, k: int) -> nn.Module:
    model = copy.deepcopy(plain)
    return model if options is None else cluster_(model, k, **options)


def time_once(function: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, label: str, device: str, repeats: int, k: int) -> None:
    make, shape, classes = MODELS[name]
    torch.manual_seed(0)
    plain = make().to(device)
    models = (plain, variant(plain, VARIANTS[label], k))
    for title, prepare, train in (("step", stepper, True), ("evaluation", evaluator, False)):
        functions = [prepare(model.train(train), shape, classes) for model in models]
        rounds = [[time_once(f, device) for f in functions] for _ in range(repeats + 2)][2:]
        base, seen = (median(times) for times in zip(*rounds, strict=True))
        times = f"{1e3 * base:9.2f} -> {1e3 * seen:9.2f} ms"
        print(f"{name:9} {title:11} {label:13} {times} {seen / base:6.3f}x", flush=True)


def peak_memory(label: str) -> float:
    """Peak resident MiB of five steps on the MLP, above what the imports hold."""
    before = resident("VmRSS")
    make, shape, classes = MODELS["mlp"]
    step = stepper(variant(make(), VARIANTS[label], 16), shape, classes)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(5):
        step()
    return (resident("VmHWM") - before) / 1024


def resident(what: str) -> int:
    """KiB, by the kernel's name for it (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def compare_memory() -> None:
    found = {}
    for label in VARIANTS:
        command = [sys.executable, __file__, "--peak", label]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[label] = float(output)
        print(f"mlp peak {label:13} {found[label]:8.1f} MiB  {found[label] / found['plain']:.3f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["cnn", "mlp"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--keep-freed", action="store_true", help="without page faults (glibc)")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(peak_memory(args.peak))
        return
    if args.keep_freed and KEEP_FREED.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED})
    if args.variant:
        for name in args.model:
            compare(name, args.variant, args.device, args.repeats, args.clusters)
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    if args.memory:
        compare_memory()
        return
    for name, label in itertools.product(args.model, VARIANTS):
        alone = ["--model", name, "--variant", label]
        subprocess.run([sys.executable, *sys.argv, *alone], check=True)


if __name__ == "__main__":
    main()
