"""Where an int8 file loses the float file's values."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from torchclust.export.graph import Graph
from torchclust.export.layout import Prepared, module_of
from torchclust.export.runner import Runner
from torchclust.export.verify import sqnr

_LEAST_DB = 15.0


def warn_if_noisy(
    prepared: Prepared,
    files: tuple[bytes, bytes],
    graphs: tuple[Graph, Graph],
    sample: Sequence[Tensor],
    sqnr_db: float | None,
) -> None:
    """Warn of outputs that are mostly noise, and name the layer where they become it.

    Args:
        prepared: the model.
        files, graphs: the float file and the int8 file; they name tensors alike.
        sample: in the model's layout.
        sqnr_db: of the int8 file's worst output.
    """
    if sqnr_db is None or sqnr_db >= _LEAST_DB:
        return
    name, before, after = _steepest(files, graphs, prepared.to_file_layout(sample))
    where = module_of(name, prepared.module) or name
    warnings.warn(
        f"the int8 file's outputs agree with the float model's to {sqnr_db:.1f} dB only. It "
        f"happens at {where!r}, from {before:.1f} to {after:.1f} dB. Usual causes are a range that "
        f'a few outliers stretch (try ranges="mse") and calibration data unlike the real',
        stacklevel=3,
    )


def _steepest(
    files: tuple[bytes, bytes], graphs: tuple[Graph, Graph], inputs: Sequence[Tensor]
) -> tuple[str, float, float]:
    """The operator's output that agrees least compared with the operator's inputs."""
    runs = [Runner(f, keep_all=True, reference=False) for f in files]
    for run in runs:
        run(inputs)
    wanted = {t.name: t.index for t in graphs[0].computed}
    quality = {
        t.index: sqnr([(runs[0].tensor(wanted[t.name]), runs[1].values(t.index))])
        for t in graphs[1].computed
        if t.name in wanted and t.dtype in ("int8", "float32")
    }
    steps = [(math.inf, "", math.inf, -math.inf)]
    for operator in graphs[1].operators:
        before = min((quality.get(i, math.inf) for i in operator.inputs), default=math.inf)
        for output in operator.outputs:
            after = quality.get(output, math.inf)
            if before > after:
                rise = after - min(before, 60.0)
                steps.append((rise, graphs[1].tensors[output].name, before, after))
    _, name, before, after = min(steps)
    return name, before, after
