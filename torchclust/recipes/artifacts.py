"""The files of a run: TFLite, float and int8, clustered and not, and what Vela makes of them."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torchclust.export.file_network import of_tflite
from torchclust.export.tflite import TFLiteExport, to_tflite
from torchclust.export.vela import vela
from torchclust.export.vela_config import ARM
from torchclust.export.vela_report import VelaReport
from torchclust.recipes.kept import Result, Stages, digest_of_file, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.stages import Networks

TFLITE_FILES = {
    "float.tflite": "trained",
    "clustered_float.tflite": "compressed",
    "int8.tflite": "compressed",
    "baseline_int8.tflite": "control",
}
VELA_FOLDER = "vela"


def export_files(prepared: Prepared, networks: Networks, output: Path, stages: Stages) -> Result:
    """Write the .tflite files into `output`: {file: sizes, tensors, metric, agreement}."""
    recipe, task = prepared.recipe, prepared.task
    assert recipe.export is not None
    count, modules = recipe.export.calibration_samples, networks.modules

    def compute() -> Result:
        found: Result = {
            "files": [name for name, which in TFLITE_FILES.items() if which in modules]
        }
        inputs = task.inputs(modules["trained"], count, recipe.seed)
        example = tuple(column[:1] for column in inputs)
        for name in found["files"]:
            which = TFLITE_FILES[name]
            stages.say(f"  {name}")
            path, is_float, module = output / name, "float" in name, modules[which]
            network = task.network(module)
            done = to_tflite(network, example, path, calibration=[inputs], float=is_float)
            found[name] = _described(done)
            if not is_float:
                file = of_tflite(done, network, example)
                found[name]["accuracy"] = task.score(module, forward=file)
        return found

    depends = [origin(prepared), networks.digest, recipe.sections("export")]
    return stages.result("export", depends, compute, folder=output)


def compile_files(
    prepared: Prepared, exported: Sequence[str], output: Path, stages: Stages
) -> Result:
    """Compile the int8 files among these with Vela into ``output/vela``: {file: a report's fields}.

    Other files in the folder may be another recipe's.
    """
    recipe = prepared.recipe
    section = recipe.vela
    assert section is not None
    options = section.model_dump(exclude_none=True)
    paths = [output / name for name in exported if "int8" in name]

    def compute() -> Result:
        found: Result = {"files": []}
        for path in paths:
            stages.say(f"  {path.name} for {section.accelerator}")
            compiled = vela(path, output_dir=output / VELA_FOLDER, **options)
            found["files"].append(f"{VELA_FOLDER}/{compiled.path.name}")
            found[path.name] = _compiled(compiled)
        return found

    is_velas = section.config is None or os.fspath(section.config) == ARM
    needed = paths if is_velas else [*paths, Path(section.config or "")]
    depends = [{path.name: digest_of_file(path) for path in needed}, recipe.sections("vela")]
    return stages.result("vela", depends, compute, folder=output)


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
