"""The ExecuTorch programs of a run: the clustered network and its control, for one Ethos-U."""

from __future__ import annotations

from pathlib import Path

from torchclust.export.executorch import packages
from torchclust.export.executorch.program import PTEExport, to_pte
from torchclust.recipes.kept import Result, Stages, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.schema import ExportSection
from torchclust.recipes.stages import Networks
from torchclust.zoo.dataset import ImageArrays, ImageFolder, Spectrograms, samples

PROGRAM_FILES = ("model.pte", "baseline.pte")


def check_packages(prepared: Prepared) -> None:
    """Find out before any training whether programs can be written here.

    Raises:
        ImportError: the executorch extra is missing.
    """
    if prepared.recipe.executorch is not None:
        packages.check()


def write_programs(prepared: Prepared, networks: Networks, output: Path, stages: Stages) -> Result:
    """Write the .pte files into `output`: {file: figures, codes, accuracy}."""
    recipe, data = prepared.recipe, prepared.data
    assert recipe.executorch is not None
    options = recipe.executorch.options
    count = (recipe.export or ExportSection()).calibration_samples  # type: ignore[call-arg]
    calibration = samples(data.train, count, seed=recipe.seed)

    def compute() -> Result:
        found: Result = {}
        for name, model in zip(PROGRAM_FILES, (networks.compressed, networks.control), strict=True):
            if model is None:
                continue
            stages.say(f"  {name} for {options['target']}")
            path = output / name
            done = to_pte(model, calibration[:1], path, calibration=[calibration], **options)
            found[name] = {**_described(done), "accuracy": _accuracy(done, data.test)}
        return found

    return stages.result(
        "executorch",
        [origin(prepared), recipe.to_dict()],
        compute,
        is_whole=lambda found: all((output / name).is_file() for name in found if "." in name),
    )


def _described(done: PTEExport) -> Result:
    (first, *_) = done.compiled or (None,)
    return {
        "bytes": done.size_bytes,
        "codes": {row.parameter: row.int8_codes for row in done.tensors},
        "encoded_weight_bytes": done.encoded_weight_bytes,
        "cycles": done.cycles,
        "vela_version": first.vela_version if first else None,
        "cpu_operators": [f"{op.operator}: {op.module}" for op in done.cpu_operators],
    }


def _accuracy(done: PTEExport, test: ImageArrays | ImageFolder | Spectrograms) -> float:
    """The percentage of test images that the program classifies as labelled, one by one."""
    right = 0
    for index in range(len(test)):
        image, label = test[[index]]
        (scores,) = done.run((image.permute(0, 2, 3, 1).contiguous(),))
        right += int(scores[0].argmax()) == int(label)
    return 100 * right / len(test)
