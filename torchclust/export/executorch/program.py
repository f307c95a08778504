"""`to_pte`: a clustered model as an ExecuTorch program for Ethos-U, its codes verified.

The model is copied, stripped and laid out as for a .tflite file; so both files take and give the
same int8 values in the same layout. Then the two roads part: PyTorch's own quantization instead of
ai-edge-quantizer, TOSA instead of TFLite, the same Vela in the end.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from torchclust.export import calibration as calibrating
from torchclust.export import layout
from torchclust.export.accelerators import Configuration
from torchclust.export.clustered import find_clustered, trained_codes
from torchclust.export.executorch import packages
from torchclust.export.executorch.lowering import Lowered, compile_spec, lower, quantized
from torchclust.export.executorch.observed import layers, observe, other_sizes
from torchclust.export.executorch.read_back import check_codes
from torchclust.export.executorch.scales import calibrate, set_learned, set_weights
from torchclust.export.executorch.stream import unverified
from torchclust.export.inspect import Port
from torchclust.export.tflite import OperatorRow
from torchclust.export.vela import compile_with
from torchclust.export.vela_report import VelaReport
from torchclust.export.verify import Answering, Comparison, TensorRow, most_samples
from torchclust.export.whole_file import check_folder, write_whole


@dataclass(frozen=True)
class PTEExport:
    """What `to_pte` wrote.

    Fields that `TFLiteExport` has too mean the same here.

    Attributes:
        path: the file.
        size_bytes: its size, Vela's output for the NPU included.
        tensors: one `TensorRow` per clustered parameter that the model uses, read back from the
            TOSA files that Vela compiled.
        unverified: names of TOSA weights that Vela rearranged in a way that is not followed. All
            others were also read back, value by value, from the bytes that the NPU decodes.
        sqnr_db: signal to quantization noise of the outputs against the float model, in decibels,
            of the worst output. The NPU's parts ran on TOSA's reference model.
        top1_agreement: share of samples, 0..1, on which program and float model agree on the
            largest of the first output's values; None unless it is (1, classes).
        compared_samples: how many calibration samples stand behind these two.
        calibration_samples: how many inputs the activation ranges were observed on.
        calibrated: names of values whose range was so observed although the model learned ranges;
            None if it learned none.
        operators: how many of each TOSA operator run on the NPU, constants left out.
        cpu_operators: what is not delegated to the NPU: ExecuTorch's portable operators.
        inputs: names, shapes, types and quantization, in the order of the model's. int8, but where
            the NPU does not begin with it (the indices of an embedding).
        outputs: likewise.
        compiled: one `VelaReport` per part of the program that runs on the NPU.
        run: computes as the program does: a tuple of inputs in the file's layout, batch 1, to a
            list of outputs, both in float. For accuracies.
    """

    path: Path
    size_bytes: int
    tensors: tuple[TensorRow, ...]
    unverified: tuple[str, ...]
    sqnr_db: float | None
    top1_agreement: float | None
    compared_samples: int
    calibration_samples: int
    calibrated: tuple[str, ...] | None
    operators: dict[str, int]
    cpu_operators: tuple[OperatorRow, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    compiled: tuple[VelaReport, ...]
    run: Answering = field(repr=False, compare=False)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        lines = [f"{self.path} ({self.size_bytes:,} bytes)"]
        for way, ports in (("in ", self.inputs), ("out", self.outputs)):
            lines += [f"  {way}  {p.dtype} {'x'.join(map(str, p.shape))}" for p in ports]
        lines += [f"  {row.int8_codes:>3} codes  {row.parameter}" for row in self.tensors]
        lines += [f"  NPU: {counts}"]
        lines += [f"  CPU: {op.operator} ({op.module or '-'})" for op in self.cpu_operators]
        return "\n".join([*lines, *map(str, self.compiled)])

    def to_dict(self) -> dict[str, Any]:
        """Every figure in JSON's types."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "run"}
        plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
        return {**plain, "encoded_weight_bytes": self.encoded_weight_bytes, "cycles": self.cycles}

    @property
    def encoded_weight_bytes(self) -> int:
        """All weights as the accelerator decodes them, parts together."""
        return sum(report.encoded_weight_bytes for report in self.compiled)

    @property
    def cycles(self) -> int:
        """Cycles of one inference on the NPU in Vela's estimate, parts together."""
        return sum(report.cycles for report in self.compiled)


def to_pte(
    model: nn.Module,
    example_inputs: layout.Inputs,
    path: str | os.PathLike[str],
    *,
    calibration: Iterable[Any],
    target: str = "ethos-u55-128",
    system_config: str | None = None,
    memory_mode: str | None = None,
    channels_last: bool = True,
) -> PTEExport:
    """Write a model as an ExecuTorch program for Ethos-U, with the codes that were trained.

    The model may be clustered, stripped or neither, in training mode, on any device; it is copied
    and stays as it is. Every weight is read back from what Vela was given before the file appears.

    Args:
        model: the module to export.
        example_inputs: its inputs, as `to_tflite` takes them; the program's batch is 1.
        path: where to write; an existing file is replaced, and only by one that passed.
        calibration: an iterable of inputs, as `to_tflite` takes it.
        target: ``"ethos-u55-32"`` .. ``-256``, ``"ethos-u65-256"``, ``-512``, ``"ethos-u85-128"``
            .. ``-2048``. Unlike a .tflite file, a program is compiled for one accelerator.
        system_config: clocks and memories, by default those of `vela`.
        memory_mode: where weights and feature maps live, by default that of `vela`. It must be the
            one that the board's firmware was built with.
        channels_last: give image inputs and outputs the accelerator's layout, NHWC for NCHW.

    Returns:
        A `PTEExport`.

    Raises:
        ExportError: the model has shapes that depend on the data, or an operator that neither NPU
            nor CPU can run; a clustered tensor would get more than ``n_clusters`` codes, or is not
            on the NPU. The message names the layer and the remedy.
        VelaError: the backend or Vela could not compile it.
        ValueError, TypeError: an unknown target or configuration; calibration data that is missing,
            empty, holds NaN, or does not fit.
        ImportError: the executorch extra is not installed, or another version of it.

    Example:
        Where the extra is installed, in an environment of its own (``docs/executorch.md``):

        >>> done = to_pte(model, images[:1], "model.pte", calibration=[images])  # doctest: +SKIP
        >>> print(done.encoded_weight_bytes, done.cpu_operators)  # doctest: +SKIP
    """
    path = Path(path)
    chosen = Configuration.of(target, system_config, memory_mode)
    calibrating.check(calibration, "to_pte(model, inputs, path, calibration=loader)")
    check_folder(path)
    packages.check()
    prepared = layout.prepare(model, example_inputs, last=channels_last)
    samples = calibrating.draw(calibration, prepared.arguments, prepared.module.keys)
    comparison = Comparison(prepared, most_samples(0))
    inputs = calibrating.Counted(comparison.collect(samples))
    with tempfile.TemporaryDirectory() as folder:
        spec = compile_spec(chosen, Path(folder))
        observed = observe(prepared, spec)
        trained = trained_codes(model, prepared)
        placed = find_clustered(layers(observed), trained, prepared.used, other_sizes(observed))
        calibrate(observed, inputs)
        learned = set_learned(observed, model, prepared, comparison.first)
        set_weights(observed, placed)
        lowered = lower(quantized(observed), prepared.example, spec)
        rows = check_codes([w for part in lowered.parts for w in part.tosa.weights], placed)
        reports = _compiled(lowered, chosen, path, Path(folder))
    comparison.keep(most_samples(sum(report.macs for report in reports)))
    agreement = comparison.run(lambda: lowered)
    write_whole(path, lowered.content)
    return PTEExport(
        path=path,
        size_bytes=len(lowered.content),
        tensors=rows,
        unverified=sum((unverified(p.compiled, p.tosa.weights) for p in lowered.parts), ()),
        sqnr_db=agreement.sqnr_db,
        top1_agreement=agreement.top1,
        compared_samples=agreement.samples,
        calibration_samples=inputs.count,
        calibrated=None if learned is None else learned.missed,
        operators=dict(sum((Counter(p.tosa.operators) for p in lowered.parts), Counter[str]())),
        cpu_operators=tuple(OperatorRow(name, module) for name, module in lowered.cpu),
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        compiled=reports,
        run=lowered,
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else asdict(value)


def _compiled(
    lowered: Lowered, chosen: Configuration, path: Path, folder: Path
) -> tuple[VelaReport, ...]:
    """Vela's figures for each part. Compiled anew: the backend keeps only the last one's."""
    reports = []
    for number, part in enumerate(lowered.parts):
        file = folder / f"part{number}.tosa"
        file.write_bytes(part.tosa.content)
        report = compile_with(file, chosen, folder / f"part{number}", output_format="raw")
        reports.append(replace(report, path=path))
    return tuple(reports)
