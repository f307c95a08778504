"""What clustering costs without training: nothing, importance, data-aware, distilled, fine-tuned.

    python benchmarks/post_training.py                      # three seeds
    python benchmarks/post_training.py --seeds 1 --clusters 16 --methods nothing data_aware
    python benchmarks/post_training.py --priced             # bytes at a price, as close as k = 16
    python benchmarks/post_training.py --scale              # time and memory at 224 x 224

Networks are trained on Fashion-MNIST first and kept under ``runs/post_training``. Every method but
"fine-tuned" sees 512 training images without labels. Codebooks are int8. Accuracies are of the
weights that the int8 file holds, with activations in float; "int8" is the model with its weights
rounded to 255 codes per channel instead of clustered.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rows import keep
from torch import Tensor, nn

import torchclust
from torchclust.allocation.encoded_size import encoded_bytes, vela_bytes
from torchclust.allocation.sensitivity import _outputs, class_divergence
from torchclust.recipes.classifier import accuracy
from torchclust.zoo import Data, fashion_mnist, loader, mobilenet_v2, resnet8, samples
from torchclust.zoo.networks import Residual

FOLDER = Path("runs/post_training")
RESULTS = Path(__file__).parent / "results" / "post_training_priced.jsonl"
IMAGES = 512
RATES = (0.002, 0.003, 0.005, 0.01, 0.02, 0.05)


def conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution and BatchNorm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


def inverted(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Module:
    """MobileNetV2's block."""
    hidden = inputs * expansion
    widen = [*conv(inputs, hidden, 1), nn.ReLU6()] if expansion > 1 else []
    depthwise = [*conv(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
    body = nn.Sequential(*widen, *depthwise, *conv(hidden, outputs, 1))
    return Residual(body) if stride == 1 and inputs == outputs else body


def small_mobilenet_v2() -> nn.Module:
    """MobileNetV2's structure at 28 x 28: seven inverted residuals, 16 to 64 channels."""
    layers: list[nn.Module] = [*conv(1, 16, 3, 2), nn.ReLU6()]
    channels = 16
    for expansion, outputs, repeats, stride in [
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 2, 2),
        (6, 64, 2, 2),
    ]:
        for i in range(repeats):
            layers.append(inverted(channels, outputs, stride if i == 0 else 1, expansion))
            channels = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, 10)]
    return nn.Sequential(*layers, *conv(channels, 256, 1), nn.ReLU6(), *head)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": small_mobilenet_v2,
    "resnet8": lambda: resnet8((1, 28, 28), 10),
}


def train_(model: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> nn.Module:
    """AdamW, one cycle, images mirrored at random."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-3)
    total = epochs * -(-len(data.train) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    model.train()
    for epoch in range(epochs):
        for images, labels in loader(data.train, 128, seed=100 * seed + epoch):
            mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def trained(name: str, seed: int, epochs: int, data: Data) -> nn.Module:
    """A network trained here, or read from where it was kept."""
    torch.manual_seed(seed)
    model, file = NETWORKS[name](), FOLDER / f"{name}-{seed}-{epochs}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    train_(model, data, epochs, 6e-3, seed)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model


def rounded_to_int8(model: nn.Module) -> nn.Module:
    """A copy with every weight matrix rounded to 255 codes per output channel."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            scale = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
            shaped = scale.view(-1, *[1] * (weight.dim() - 1))
            weight.copy_((weight / shaped).round() * shaped)
    return model


def own_fisher(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Fisher information under the model's own answers: no labels."""
    with torch.no_grad():
        pairs = [(x, model(x).argmax(1)) for x in images.split(1)]
    return torchclust.fisher_information(model, pairs, nn.functional.cross_entropy)


def clustered(
    method: str, model: nn.Module, k: int, images: Tensor, data: Data, args: argparse.Namespace
) -> nn.Module:
    """A clustered copy of a model, by one of the methods that are compared."""
    student = copy.deepcopy(model)
    options = {"codebook_dtype": "int8", "assignment": "nearest"}
    if method == "importance":
        fisher = own_fisher(model, images)
        torchclust.cluster_(student, k, importance=fisher, **options)
    else:
        inputs = images if method in ("data_aware", "distilled") else None
        torchclust.cluster_(student, k, inputs=inputs, **options)
    if method == "distilled":
        torchclust.distill_(student, model, images, steps=args.steps, lr=args.lr)
    if method == "finetuned":
        train_(student, data, 1, 6e-4, 0)
    return torchclust.strip_(rounded_(student))


def rounded_(model: nn.Module) -> nn.Module:
    """Round what is not clustered to int8 as well: the depthwise convolutions."""
    with torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() > 1:
                scale = weight.abs().flatten(1).amax(1).clamp_min(1e-12) / 127
                shaped = scale.view(-1, *[1] * (weight.dim() - 1))
                weight.copy_((weight / shaped).round() * shaped)
    return model


def compare(args: argparse.Namespace) -> None:
    """Print one line per k and method: mean accuracy, and points below the int8 model."""
    data = fashion_mnist()
    test = list(loader(data.test, 250))
    results: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        model = trained(args.network, seed, args.epochs, data)
        images = samples(data.train, IMAGES, seed=seed)
        results.setdefault("float", []).append(accuracy(model, test))
        reference = accuracy(rounded_to_int8(model), test)
        results.setdefault("int8", []).append(reference)
        print(f"seed {seed}: float {results['float'][-1]:.2f}, int8 {reference:.2f}", flush=True)
        for k in args.clusters:
            for method in args.methods:
                started = time.process_time()
                student = clustered(method, model, k, images, data, args)
                seconds = time.process_time() - started
                found = accuracy(student, test)
                results.setdefault(f"k={k} {method}", []).append(found)
                lost = f"{found:6.2f} ({found - reference:+.2f})"
                print(f"  k={k:<3} {method:<11} {lost} {seconds:.0f} CPU-s", flush=True)
    base = mean(results["int8"])
    print(f"\n{args.network}, mean of {args.seeds}")
    for name, values in results.items():
        print(f"{name:<18} {mean(values):6.2f}  {mean(values) - base:+.2f}")
    (FOLDER / f"{args.network}.json").write_text(json.dumps(results, indent=1))


def priced(args: argparse.Namespace) -> None:
    """One line for every seed: k = 16, and the fewest bytes at a price that are as close."""
    data = fashion_mnist()
    for seed in range(args.seeds):
        row = priced_row(trained(args.network, seed, args.epochs, data), data, seed)
        keep(RESULTS, network=args.network, seed=seed, **row)


def priced_row(model: nn.Module, data: Data, seed: int) -> dict[str, Any]:
    """Fewest bytes whose outputs are as close to the float model's as those of k = 16.

    The price is chosen on 2,000 more training images, by divergence, without their labels.
    """
    test = list(loader(data.test, 250))
    images = samples(data.train, IMAGES, seed=seed)
    others = samples(data.train, 2000, seed=1000 + seed)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    wanted = _outputs(model, others)

    def at(k: int, rate: float) -> dict[str, float]:
        student = copy.deepcopy(model)
        torchclust.cluster_(student, k, codebook_dtype="int8", rate=rate, inputs=images)
        n_bytes = sum(encoded_bytes(student, vela_bytes, names).values())
        apart = float(class_divergence(_outputs(student, others), wanted))
        found = accuracy(torchclust.strip_(rounded_(student)), test)
        return {"k": k, "rate": rate, "bytes": n_bytes, "divergence": apart, "accuracy": found}

    plain, tried = at(16, 0), [at(32, rate) for rate in RATES]
    close = [t for t in tried if t["divergence"] <= plain["divergence"]]
    chosen = min(close or tried[:1], key=lambda t: t["bytes"])
    return {
        "int8": accuracy(rounded_to_int8(model), test),
        "int8_bytes": sum(encoded_bytes(model, vela_bytes, names).values()),
        "k16": plain,
        "priced": chosen,
        "ratio": chosen["bytes"] / plain["bytes"],
        "tried": tried,
    }


def print_priced() -> None:
    """Print what each rate gave beside k = 16, means over the seeds and what each seed lost."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("| network | rate | seeds | bytes | divergence | points, by seed |")
    print("|---|---:|---:|---:|---:|---|")
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        for i, rate in enumerate(RATES):
            pairs = [(row["tried"][i], row["k16"]) for row in own]
            n_bytes, apart = (mean(t[k] / p[k] for t, p in pairs) for k in ("bytes", "divergence"))
            points = ", ".join(f"{t['accuracy'] - p['accuracy']:+.2f}" for t, p in pairs)
            print(
                f"| {network} | {rate:g} | {len(own)} | {n_bytes:.2f}x | {apart:.2f}x | {points} |"
            )


def scale(args: argparse.Namespace) -> None:
    """Time and peak memory of both calls on MobileNetV2 of 5M weights at 224 x 224."""
    torch.manual_seed(0)
    model = mobilenet_v2(width=1.25).eval()
    images = torch.randn(args.images, 3, 224, 224)
    teacher = copy.deepcopy(model)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {args.images} images"
    )
    options = {"codebook_dtype": "int8", "assignment": "nearest"}
    for name, call in {
        "data-aware": lambda: torchclust.cluster_(model, 16, inputs=images, **options),
        "distilled": lambda: torchclust.distill_(
            model, teacher, images, steps=args.steps, lr=args.lr
        ),
    }.items():
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"{name}: {wall:.0f} s, {cpu:.0f} CPU-s, peak {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="mobilenet_v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 16, 32])
    methods = ["nothing", "importance", "data_aware", "distilled", "finetuned"]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--priced", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what --priced has measured")
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--images", type=int, default=IMAGES)
    args = parser.parse_args()
    if args.table:
        print_priced()
        return
    (scale if args.scale else priced if args.priced else compare)(args)


if __name__ == "__main__":
    main()
