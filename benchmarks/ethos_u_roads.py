"""One network, two roads to an Ethos-U: a .tflite file, and an ExecuTorch program.

    .venv-executorch/bin/python benchmarks/ethos_u_roads.py DATA MODELS [--networks NAME ...]
                                                         [--images N] [--output FILE]

DATA holds ``mnist`` (IDX files), ``cifar-10-batches-bin`` and ``coco_vww96``; MODELS holds
``nets.py`` with trained networks. A network is clustered into int8 codebooks of 16 without any
fine-tuning, depthwise convolutions included, then exported on both roads and, for the control, on
ExecuTorch's with the observers that the backend brings. Half of the BatchNorm channels are mirrored
first (gamma, mean and weights change sign), which leaves the function as it is. Accuracy is that of
the first N test images on both roads; Vela is the same on both.
"""

from __future__ import annotations

import argparse
import copy
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchclust import cluster_, zoo
from torchclust.export import inspect_tflite, layout, to_pte, to_tflite, vela
from torchclust.export.accelerators import Configuration
from torchclust.export.executorch import lowering, packages
from torchclust.export.executorch.observed import trace
from torchclust.export.runner import Runner
from torchclust.export.vela import compile_with
from torchclust.weight.config import ClusterConfig

TARGETS = ("ethos-u55-128", "ethos-u85-256")
Images = tuple[Tensor, Tensor, Tensor]  # to calibrate with, to test on, labels


def mnist(root: Path, count: int) -> Images:
    data = zoo.fashion_mnist(root / "mnist")
    images, labels = data.test[list(range(count))]
    return data.train[list(range(200))][0], images, labels


def cifar10(root: Path, count: int) -> Images:
    def read(name: str, n: int) -> tuple[Tensor, Tensor]:
        raw = np.fromfile(root / "cifar-10-batches-bin" / name, np.uint8, n * 3073)
        rows = torch.from_numpy(raw.reshape(n, 3073))
        return rows[:, 1:].reshape(n, 3, 32, 32).float(), rows[:, 0].long()

    images, labels = read("test_batch.bin", count)
    return read("data_batch_1.bin", 200)[0], images, labels


def wake_words(root: Path, count: int) -> Images:
    from PIL import Image

    def read(part: str) -> tuple[Tensor, Tensor]:
        files = sorted((root / "coco_vww96" / part).rglob("*.png"))
        pixels = np.stack([np.array(Image.open(f).convert("RGB")) for f in files])
        labels = torch.tensor([int("no" not in f.parent.name.lower()) for f in files])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, labels

    images, labels = read("val2017")
    return read("train2017")[0], images[:count], labels[:count]


def trained(model: nn.Module, root: Path, steps: int) -> nn.Module:
    """A network of the zoo, trained briefly on MNIST's training images."""
    data = zoo.fashion_mnist(root / "mnist")
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(data.train), (128,), generator=generator)
        images, labels = data.train[chosen.tolist()]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def networks(root: Path, models: Path) -> dict[str, tuple[Callable[[], nn.Module], Callable]]:
    shape = (1, 28, 28)

    def small(build: Callable, **options: object) -> nn.Module:
        return trained(build(shape, 10, **options), root, 300)

    def load(name: str) -> nn.Module:
        net: nn.Module = runpy.run_path(str(models / "nets.py"))["load"](name, bn=True)
        return net

    return {
        "cnn": (lambda: trained(zoo.seed_cnn(shape, batch_norm=True), root, 300), mnist),
        "mobilenet_v2": (
            lambda: trained(zoo.mobilenet_v2(shape, 10, width=0.25), root, 300),
            mnist,
        ),
        "resnet8": (lambda: load("cifar10jpeg_resnet8"), cifar10),
        "mobilenet_v1_0.25": (lambda: load("mlperf_tiny_vww"), wake_words),
    }


@torch.no_grad()
def mirror_(model: nn.Module) -> nn.Module:
    """Change the signs of every second BatchNorm channel and of what it reads."""
    layer = None
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layer = module
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer is not None:
            changed = [layer.weight, module.running_mean, module.weight]
            for tensor in (*changed, *([] if layer.bias is None else [layer.bias])):
                tensor[::2] *= -1
    return model


def clustered(model: nn.Module) -> nn.Module:
    config = ClusterConfig(n_clusters=16, codebook_dtype="int8")
    depthwise = {
        f"{name}.weight": config
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    return cluster_(copy.deepcopy(model), {"*": config, **depthwise})


def accuracy(run: Callable, images: Tensor, labels: Tensor) -> tuple[float, np.ndarray]:
    """In percent, and all outputs."""
    outputs = np.stack([run((x[None].permute(0, 2, 3, 1).contiguous(),))[0][0] for x in images])
    return 100 * float((outputs.argmax(1) == labels.numpy()).mean()), outputs


def paired(one: np.ndarray, other: np.ndarray, labels: Tensor) -> dict[str, float]:
    """By how many points the first is right more often, and the standard error of that."""
    right = [(outputs.argmax(1) == labels.numpy()).astype(float) for outputs in (one, other)]
    difference = 100 * (right[0] - right[1])
    return {"points": difference.mean(), "error": difference.std() / len(difference) ** 0.5}


def by_tflite(model: nn.Module, data: Images, folder: Path) -> tuple[dict, np.ndarray, float]:
    calibration, images, labels = data
    done = to_tflite(model, calibration[:1], folder / "a.tflite", calibration=[calibration])
    right, outputs = accuracy(Runner(done.path.read_bytes(), reference=False), images, labels)
    found = {"codes": [row.codes for row in inspect_tflite(done.path)], "accuracy": right}
    for target in TARGETS:
        report = vela(done.path, accelerator=target, output_dir=folder / target)
        found[target] = {"encoded": report.encoded_weight_bytes, "cycles": report.cycles}
    return found, outputs, done.outputs[0].scale


def by_executorch(model: nn.Module, data: Images, folder: Path) -> tuple[dict, np.ndarray]:
    calibration, images, labels = data
    found: dict = {}
    for target in TARGETS:
        path = folder / f"{target}.pte"
        done = to_pte(model, calibration[:1], path, calibration=[calibration], target=target)
        assert all(row.codes_match for row in done.tensors)
        assert done.unverified == ()
        found[target] = {"encoded": done.encoded_weight_bytes, "cycles": done.cycles,
                         "bytes": done.size_bytes, "cpu": len(done.cpu_operators)}  # fmt: skip
        found["codes"] = [row.int8_codes for row in done.tensors]
        if target == TARGETS[0]:
            found["accuracy"], outputs = accuracy(done.run, images, labels)
    return found, outputs


def by_default(model: nn.Module, data: Images, folder: Path) -> dict:
    """The backend's own recipe, step by step: its observers, its ranges."""
    calibration, images, labels = data
    pt2e = packages.load("torchao.quantization.pt2e.quantize_pt2e")
    arm = packages.load("executorch.backends.arm.quantizer")
    prepared = layout.prepare(model, calibration[:1], last=True)
    found: dict = {}
    seen = None  # by the observers: histograms take long, and both targets have the same ones
    for target in TARGETS:
        chosen, where = Configuration.of(target, None, None), folder / f"default-{target}"
        spec = lowering.compile_spec(chosen, where)
        quantizer = arm.EthosUQuantizer(spec)
        quantizer.set_global(arm.get_symmetric_quantization_config())
        graph = trace(prepared.module, prepared.example).module(check_guards=False)
        observed = pt2e.prepare_pt2e(graph, quantizer)
        with torch.no_grad():
            for x in calibration if seen is None else ():
                observed(*prepared.to_file_layout([x[None]]))
        seen = seen or copy.deepcopy(observed.state_dict())
        observed.load_state_dict(seen)
        done = lowering.lower(lowering.quantized(observed), prepared.example, spec)
        weights = [w for part in done.parts for w in part.tosa.weights]
        found["codes"] = [len(np.unique(w.matrix)) for w in weights]
        (where / "again.tosa").write_bytes(done.parts[0].tosa.content)
        report = compile_with(where / "again.tosa", chosen, where / "again", output_format="raw")
        found[target] = {"encoded": report.encoded_weight_bytes, "cycles": report.cycles}
        if target == TARGETS[0]:
            found["accuracy"], _ = accuracy(done, images, labels)
    return found


def measure(name: str, model: nn.Module, data: Images) -> dict:
    images, labels = data[1:]
    with torch.no_grad():
        logits = torch.cat([model(x) for x in images.split(100)])
    right = 100 * float((logits.argmax(1) == labels).float().mean())
    mirrored = clustered(mirror_(model))
    with tempfile.TemporaryDirectory() as folder:
        plain, _, _ = by_tflite(model, data, Path(folder))
        tflite, left, step = by_tflite(mirrored, data, Path(folder))
        pte, other = by_executorch(mirrored, data, Path(folder))
        default = by_default(mirrored, data, Path(folder))
    apart = np.abs(left - other) / step
    better = paired(other, left, data[2])
    return {
        "network": name, "images": len(labels), "float_accuracy": right,
        "unclustered_tflite": plain, "tflite": tflite, "executorch": pte, "default": default,
        "executorch_minus_tflite": better,
        "output_steps_apart": {"mean": float(apart.mean()), "most": float(apart.max())},
    }  # fmt: skip


TITLES = {
    "cnn": "CNN, MNIST",
    "mobilenet_v2": "MobileNetV2 0.25, MNIST",
    "resnet8": "ResNet-8, CIFAR-10",
    "mobilenet_v1_0.25": "MobileNetV1 0.25, wake words",
}
ROADS = {
    "unclustered_tflite": "`.tflite`, not clustered",
    "tflite": "`.tflite`",
    "executorch": "`.pte`",
    "default": "`.pte`, the backend's observers",
}


def table(found: Sequence[dict]) -> str:
    """The rows of docs/executorch.md."""
    rows = []
    for network in found:
        for road, name in ROADS.items():
            row = network[road]
            figures = [
                f"{row[target]['encoded'] / 1024:.1f} | {row[target]['cycles']:,}"
                for target in TARGETS
            ]
            right = f"{row['accuracy']:.1f} %"
            if road == "executorch":
                better = network["executorch_minus_tflite"]
                right += f" ({better['points']:+.2f} ± {better['error']:.2f})"
            cells = [TITLES[network["network"]], name, str(max(row["codes"])), *figures, right]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("--networks", nargs="*")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = []
    for name, (build, read) in networks(args.data, args.models).items():
        if args.networks and name not in args.networks:
            continue
        start = time.perf_counter()
        found.append(measure(name, build(), read(args.data, args.images)))
        print(json.dumps(found[-1]), f"{time.perf_counter() - start:.0f} s", flush=True)
        if args.output:
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main(sys.argv[1:])
