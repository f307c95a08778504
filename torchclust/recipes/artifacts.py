"""The files of a run: TFLite, float and int8, clustered and not, and what Vela makes of them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from torchclust.export import TFLiteExport, VelaReport, inspect_tflite, to_tflite, vela
from torchclust.export.runner import Runner
from torchclust.recipes.kept import Result, Stages, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.stages import EVALUATION_BATCH, Networks
from torchclust.zoo.dataset import Batch, loader, samples

TFLITE_FILES = ("float.tflite", "clustered_float.tflite", "int8.tflite", "baseline_int8.tflite")
VELA_FOLDER = "vela"


def export_files(prepared: Prepared, networks: Networks, output: Path, stages: Stages) -> Result:
    """Write the .tflite files into `output`: {file: sizes, tensors, accuracy, agreement}."""
    recipe, data = prepared.recipe, prepared.data
    assert recipe.export is not None
    calibration = samples(data.train, recipe.export.calibration_samples, seed=recipe.seed)
    models = (networks.trained, networks.compressed, networks.compressed, networks.control)

    def compute() -> Result:
        found: Result = {}
        for name, model in zip(TFLITE_FILES, models, strict=True):
            if model is None:
                continue
            stages.say(f"  {name}")
            path, is_float = output / name, "float" in name
            done = to_tflite(
                model, calibration[:1], path, calibration=[calibration], float=is_float
            )
            found[name] = _described(done)
            if not is_float:
                found[name]["accuracy"] = tflite_accuracy(path, loader(data.test, EVALUATION_BATCH))
        return found

    return stages.result(
        "export",
        [origin(prepared), recipe.to_dict()],
        compute,
        is_whole=lambda found: all((output / name).is_file() for name in found if "." in name),
    )


def compile_files(prepared: Prepared, output: Path, stages: Stages) -> Result:
    """Compile both int8 files with Vela into ``output/vela``: {file: VelaReport's fields}."""
    recipe = prepared.recipe
    section = recipe.vela
    assert section is not None
    options = section.model_dump(exclude_none=True)

    def compute() -> Result:
        found: Result = {}
        for name in TFLITE_FILES:
            path = output / name
            if "int8" in name and path.exists():
                stages.say(f"  {name} for {section.accelerator}")
                found[name] = _compiled(vela(path, output_dir=output / VELA_FOLDER, **options))
        return found

    return stages.result(
        "vela",
        [origin(prepared), recipe.to_dict()],
        compute,
        is_whole=lambda found: all(
            (output / VELA_FOLDER / f"{Path(name).stem}_vela.tflite").is_file()
            for name in found
            if "." in name
        ),
    )


def tflite_accuracy(path: Path, batches: Iterable[Batch]) -> float:
    """Return the percentage of images that a .tflite file classifies as labelled.

    On one thread of LiteRT's fast kernels: the reference kernels, which equal the
    microcontroller's to the bit, take minutes for 10,000 images, and single small images gain
    nothing from more threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where Runner takes its number from
    try:
        run = Runner(path.read_bytes(), reference=False)
    finally:
        torch.set_num_threads(threads)
    shape = inspect_tflite(path).inputs[0].shape
    right = total = 0
    for images, labels in batches:
        if images.shape[1:] != shape[1:]:
            images = images.permute(0, 2, 3, 1).contiguous()
        for image, label in zip(images, labels.tolist(), strict=True):
            right += int(run([image[None]])[0].argmax()) == label
            total += 1
    return 100 * right / total


def zipped_size(path: Path) -> int:
    """Return the bytes of a zip archive that holds this file alone, deflated."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, path.name)
    return len(buffer.getvalue())


def _described(done: TFLiteExport) -> Result:
    return {
        "bytes": done.size_bytes,
        "zip": zipped_size(done.path),
        "codes": {row.parameter: row.int8_codes for row in done.tensors},
        "sqnr_db": done.sqnr_db,
        "top1_agreement": done.top1_agreement,
        "float_operators": [row.operator for row in done.float_operators],
    }


def _compiled(report: VelaReport) -> Result:
    """Return a Vela report as plain values, without the per-layer table."""
    found = replace(report, layers=(), cpu_operators=()).to_dict()
    found["cpu_operators"] = [f"{op.operator}: {op.reason}" for op in report.cpu_operators]
    return {**found, "path": report.path.name, "layers": []}
