"""The ExecuTorch programs of a run: the clustered network and its control, for one Ethos-U."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchclust.export.executorch import packages
from torchclust.export.executorch.program import PTEExport, to_pte
from torchclust.export.file_network import FileNetwork
from torchclust.recipes.kept import Result, Stages, origin
from torchclust.recipes.prepare import Prepared
from torchclust.recipes.schema import ExportSection
from torchclust.recipes.stages import Networks

PROGRAM_FILES = {"model.pte": "compressed", "baseline.pte": "control"}


def check_packages(prepared: Prepared) -> None:
    """Find out before any training whether programs can be written here.

    Raises:
        ImportError: the executorch extra is missing.
    """
    if prepared.recipe.executorch is not None:
        packages.check()


def write_programs(prepared: Prepared, networks: Networks, output: Path, stages: Stages) -> Result:
    """Write the .pte files into `output`: {file: figures, codes, accuracy}."""
    recipe, task = prepared.recipe, prepared.task
    assert recipe.executorch is not None
    options, modules = recipe.executorch.options, networks.modules
    count = (recipe.export or ExportSection()).calibration_samples  # type: ignore[call-arg]

    def compute() -> Result:
        found: Result = {
            "files": [name for name, which in PROGRAM_FILES.items() if which in modules]
        }
        inputs = task.inputs(modules["trained"], count, recipe.seed)
        example = tuple(column[:1] for column in inputs)
        for name in found["files"]:
            which = PROGRAM_FILES[name]
            stages.say(f"  {name} for {options['target']}")
            network = task.network(modules[which])
            done = to_pte(network, example, output / name, calibration=[inputs], **options)
            program = _in_place_of(network, done, example)
            score = task.score(modules[which], forward=program)
            found[name] = {**_described(done), "accuracy": score}
        return found

    sections = recipe.sections("export", "executorch")
    depends = [origin(prepared), networks.digest, sections]
    return stages.result("executorch", depends, compute, folder=output)


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


def _in_place_of(network: nn.Module, done: PTEExport, example: tuple[Tensor, ...]) -> FileNetwork:
    """Return what runs the program; its maps have their channels last."""
    with torch.no_grad():
        outputs = [y for y in tree_leaves(network.eval()(*example)) if isinstance(y, Tensor)]
    moved = (tuple(x.ndim == 4 for x in example), tuple(y.ndim == 4 for y in outputs))
    return FileNetwork(done.run, moved, network, example)
