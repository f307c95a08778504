"""What clustering does to the files of the MobileNets at full size, without ImageNet.

    python benchmarks/mobilenet_sizes.py [--networks mobilenet_v1 mobilenet_v2]

Sizes depend on how weights are distributed and not on what they compute. So every tensor of the
full-size network (1,000 classes, 224 x 224) is drawn from the same layer of the narrow network that
recipes/NETWORK_fashion.yaml trained: for each output channel a trained one is chosen, and the
weights are drawn from its own, each changed by some percent so that no two are equal. Then the
recipe's clustering is fitted to them, and to the last three layers alone as in TFMOT's table; files
are written and zipped, and the first is compiled. Results go to
benchmarks/results/NETWORK*_full.0.json, with the keys of report.json; there is no accuracy.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from results_table import FOLDER, LAST_THREE, RESULTS, ROOT, RUNS, selective
from torch import Tensor, nn

from torchclust import zoo
from torchclust.export import to_tflite, vela
from torchclust.recipes.artifacts import zipped_size
from torchclust.recipes.kept import Stages, versions
from torchclust.recipes.load import load_recipe
from torchclust.recipes.prepare import clustered_copy, prepare
from torchclust.recipes.schema import Recipe
from torchclust.recipes.stages import train_networks


def trained(network: str) -> nn.Module:
    """The narrow network, trained as its recipe says (or as its stored stages have it)."""
    recipe = load_recipe(ROOT / "recipes" / f"{RUNS[network][0]}.yaml")
    stages = Stages(FOLDER / "stages", print, progress=False)
    return train_networks(prepare(recipe), stages).control


def resampled(narrow: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` whose rows are drawn from rows of `narrow`, at the new fan-in's scale."""
    rows = narrow.detach().flatten(1)
    outputs, fan_in = shape[0], shape[1:].numel()
    chosen = torch.randint(len(rows), (outputs, 1))
    drawn = rows[chosen, torch.randint(rows.shape[1], (outputs, fan_in))]
    jitter = torch.exp(0.05 * torch.randn(outputs, fan_in))
    return (drawn * jitter * (rows.shape[1] / fan_in) ** 0.5).reshape(shape)


def full_size(network: str, narrow: nn.Module) -> nn.Module:
    """The network at its full size, with BatchNorm statistics of noise images."""
    torch.manual_seed(0)
    model: nn.Module = zoo.MODELS[network]()
    pairs = zip(model.parameters(), narrow.parameters(), strict=True)
    with torch.no_grad():
        for parameter, source in pairs:
            if parameter.ndim > 1:
                parameter.copy_(resampled(source, parameter.shape))
            else:
                parameter.copy_(source[torch.randint(len(source), parameter.shape)])
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain mean
        model.train()(images())
    return model.eval()


def images() -> Tensor:
    return torch.rand(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def written(model: nn.Module, folder: Path, *, is_float: bool) -> Path:
    path = folder / "model.tflite"
    calibration = None if is_float else [images()[:1]]
    to_tflite(model, images()[:1], path, calibration=calibration, float=is_float)
    return path


def compiled(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The int8 file's zipped bytes, and Vela's figures."""
    path = written(model, folder, is_float=False)
    report = vela(path, output_dir=folder)
    return {
        "zip": zipped_size(path),
        "encoded_weight_bytes": report.encoded_weight_bytes,
        "flash_bytes": report.flash_bytes,
        "cycles": report.cycles,
        "cpu_ops": report.cpu_ops,
    }


def measure(network: str) -> None:
    model = full_size(network, trained(network))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = zipped_size(written(model, folder, is_float=True))
        baseline = compiled(model, folder)
        for suffix, settings in points(network).items():
            recipe = load_recipe(ROOT / "recipes" / f"{network}.yaml", settings)
            clustered = clustered_copy(recipe, copy.deepcopy(model))
            zipped = zipped_size(written(clustered, folder, is_float=True))
            ours = dict.fromkeys(baseline) if suffix else compiled(clustered, folder)
            found = report(recipe, plain, zipped, baseline, ours)
            (RESULTS / f"{network}{suffix}_full.0.json").write_text(json.dumps(found, indent=2))
            print(network, suffix, found["bytes"], found["vela"], flush=True)


def points(network: str) -> dict[str, list[str]]:
    """The recipe's settings, by what they add to the name."""
    return {"": [], **{f"_last3_k{k}": [selective(network, k)] for k in (16, 32)}}


def report(
    recipe: Recipe, plain: int, zipped: int, baseline: dict[str, Any], ours: dict[str, Any]
) -> dict[str, Any]:
    """The keys of report.json that sizes have."""
    keys = ("encoded_weight_bytes", "flash_bytes", "cycles")
    return {
        "name": recipe.name,
        "recipe": recipe.to_dict(),
        "versions": versions(),
        "bytes": {
            "float_tflite_zip": plain,
            "clustered_float_tflite_zip": zipped,
            "int8_tflite_zip": ours["zip"],
            "baseline_int8_tflite_zip": baseline["zip"],
        },
        "vela": {
            **{key: ours[key] for key in (*keys, "cpu_ops")},
            **{f"baseline_{key}": baseline[key] for key in keys},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=LAST_THREE, default=list(LAST_THREE))
    for network in parser.parse_args().networks:
        measure(network)


if __name__ == "__main__":
    main()
