"""Writing a clustered model as a full-int8 TFLite file whose weights keep their codes.

In: a model, example inputs, calibration data. The route: a stripped float32 copy, channels last
(`layout`); litert-torch makes a float file of it, BatchNorm folded; every clustered parameter is
found again in it by value (`clustered`, `codes`); the quantizer is told each weight's scale instead
of guessing it from minimum and maximum (`quantize`); the result is read back and compared with what
was trained (`verify`) before it gets its name. Out: the file, and a `TFLiteExport` that says what
is in it.
"""

from __future__ import annotations

import builtins
import itertools
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchclust.export import backends, layout
from torchclust.export import calibration as calibrating
from torchclust.export.backends import ExportError
from torchclust.export.clustered import Placed, find_clustered, trained_codes
from torchclust.export.ends import INPUT_DTYPES, InputDtype
from torchclust.export.faithful import check_float, check_layers, check_operators, layer_of
from torchclust.export.graph import Graph, Weight, read_graph
from torchclust.export.inspect import Port, count_operators, float_operators, port
from torchclust.export.learned import find_learned
from torchclust.export.micro_agreement import MicroAgreement, compare_micro
from torchclust.export.names import with_names
from torchclust.export.noise import warn_if_noisy
from torchclust.export.pointwise import convolutions_for_linears
from torchclust.export.quantize import quantize, within_range
from torchclust.export.runner import Runner
from torchclust.export.sums import means_for_sums
from torchclust.export.transposes import without_transposes
from torchclust.export.verify import (
    Agreement,
    Comparison,
    TensorRow,
    check_codes,
    most_samples,
    multiplications,
)
from torchclust.export.whole_file import check_folder, write_whole


@dataclass(frozen=True)
class OperatorRow:
    """An operator that stays on the CPU: its name, and the torch module that made it, if known."""

    operator: str
    module: str | None


@dataclass(frozen=True)
class TFLiteExport:
    """What `to_tflite` wrote, read back from the file.

    Attributes:
        path: the file.
        size_bytes: its size.
        tensors: one `TensorRow` per clustered parameter that the model uses.
        sqnr_db: signal to quantization noise of the outputs against the float model, in decibels,
            of the worst output; None if nothing was compared.
        top1_agreement: share of samples, 0..1, on which file and float model agree on the largest
            of the first output's values; None unless it is (1, classes).
        compared_samples: how many samples stand behind these two, on LiteRT's reference kernels:
            every eighth of the calibration data, held out of it; the first ones where there are
            fewer than eight.
        micro_difference: the largest difference in codes between tflite-micro's and these kernels'
            answers, over every operator on one sample: 0 means equal to the bit. None if the
            package is not installed or cannot run the file.
        micro_differs: the operators that answer equal inputs otherwise there, and by how many
            codes: a MUL's product may be rounded in two steps instead of one.
        calibration_samples: how many inputs the activation ranges were observed on.
        calibrated: names of the tensors whose range was so observed although the model learned
            ranges (`torchclust.activations`): what the converter computes in other steps than
            torch. None if the model learned none, or the file is float.
        operators: how many of each operator.
        float_operators: operators left in float, which an int8 accelerator leaves to the CPU.
        inputs: names, shapes, types and quantization, in the order of the model's.
        outputs: likewise.
        channels_last: per input, and per output, whether the file's has its channels last where
            the model's has them first.
    """

    path: Path
    size_bytes: int
    tensors: tuple[TensorRow, ...]
    sqnr_db: builtins.float | None
    top1_agreement: builtins.float | None
    compared_samples: int
    micro_difference: int | None
    micro_differs: dict[str, int]
    calibration_samples: int
    calibrated: tuple[str, ...] | None
    operators: dict[str, int]
    float_operators: tuple[OperatorRow, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    channels_last: tuple[tuple[bool, ...], tuple[bool, ...]]


def to_tflite(
    model: nn.Module,
    example_inputs: layout.Inputs,
    path: str | os.PathLike[str],
    *,
    calibration: Iterable[Any] | None,
    channels_last: bool = True,
    float: bool = False,
    ranges: calibrating.Ranges = "minmax",
    input_dtype: InputDtype = "int8",
) -> TFLiteExport:
    """Write a model as a TFLite file: int8 in and out, at most ``n_clusters`` codes per tensor.

    The model may be clustered, stripped or neither, in training mode, on any device; it is copied
    and stays as it is. The file is read back and checked before it appears at ``path``.

    Args:
        model: the module to export.
        example_inputs: its inputs, floating or integer: a tensor, a tuple of tensors, or a dict by
            argument name. The first dimension is the batch; the file's batch is 1. A model that
            takes pixels as uint8 gets an input of scale 1 over 0..255, and no CAST.
        path: where to write; an existing file is replaced, and only by a file that passed.
        calibration: an iterable of inputs like the examples: tensors, tuples, dicts, or a
            DataLoader's batches, labels included; of a tensor, its first dimension are the samples.
            One to a few hundred samples are enough. May be None with ``float=True``.
        channels_last: give image inputs and outputs the accelerator's layout, NHWC for NCHW. False
            keeps the model's own, at the price of a TRANSPOSE.
        float: write float32 without quantization, BatchNorm folded but for one behind a
            convolution with one float codebook: as a depthwise 1x1 convolution it leaves the shared
            values as they are, so that the file zips well.
        ranges: how activation ranges follow from the calibration data: ``"minmax"`` covers all of
            it, ``"percentile"`` leaves out 0.01 % on each side, ``"mse"`` clips where the squared
            error is smallest. Ranges that the model learned itself (`torchclust.activations`) come
            first.
        input_dtype: ``"uint8"`` for a camera: inputs have the same steps from a zero point that is
            128 higher, and one QUANTIZE, which the NPU runs, makes int8 of them.

    Returns:
        A `TFLiteExport`, measured on the file as written.

    Raises:
        ExportError: the converter cannot take the model, or makes another function of it; a
            clustered tensor would get more than ``n_clusters`` codes; the message names the layer
            and the remedy.
        ValueError, TypeError: calibration data that is empty, holds NaN, or does not fit; unknown
            ``ranges`` or ``input_dtype``.
        ImportError: the export extra is not installed.

    Warns:
        UserWarning: the file's outputs are mostly noise, with the layer where they become it; the
            calibration data leave a tensor at zero.
    """
    _check_arguments(Path(path), calibration, float, ranges, input_dtype)
    prepared = layout.prepare(model, example_inputs, last=channels_last, float_file=float)
    if not float:
        check_layers(prepared)
    first, samples = _samples(calibration, prepared)
    float_file = _convert(prepared)
    if float:
        float_file = without_transposes(float_file)
    else:
        float_file = convolutions_for_linears(without_transposes(means_for_sums(float_file)))
    content = bytearray(float_file)
    graph = read_graph(content)
    if not float:
        check_operators(prepared, graph)
    check_float(prepared, float_file, graph, first)
    placed = find_clustered(graph.weights(), trained_codes(model, prepared), prepared.used)
    comparison = Comparison(prepared, most_samples(multiplications(graph)))
    inputs = calibrating.Counted(comparison.collect(samples))
    learned = None
    if float:
        rows = tuple(_float_row(p) for p in placed)
        for _ in inputs:
            pass
    else:
        observed = calibrating.observe(float_file, graph, inputs, ranges)
        learned = find_learned(model, prepared, float_file, graph, first)
        if learned is not None:
            observed |= learned.ranges
        observed = calibrating.widen_dead(observed, graph, prepared.names[0])
        observed = calibrating.limit_roots(observed, graph)
        observed |= _pixel_ranges(prepared, graph)
        placed = within_range(graph, placed, observed)
        content = bytearray(quantize(content, graph, placed, observed, input_dtype))
        graphs = graph, read_graph(content)
        rows, graph = check_codes(graphs[1], placed), graphs[1]
    agreement = comparison.run(lambda: Runner(bytes(content)))
    if not float:
        warn_if_noisy(prepared, (float_file, bytes(content)), graphs, first, agreement.sqnr_db)
    content = bytearray(with_names(bytes(content), *prepared.names))
    graph = read_graph(content)
    write_whole(Path(path), content)
    missed = None if learned is None else learned.missed
    sample = prepared.to_file_layout(first)
    micro = None if float else compare_micro(bytes(content), graph, sample)
    counts = len(content), inputs.count
    return _result(Path(path), counts, prepared, graph, rows, agreement, missed, micro)


def _check_arguments(
    path: Path, calibration: object, float_: bool, ranges: str, input_dtype: str
) -> None:
    if ranges not in calibrating.RANGES:
        valid = ", ".join(map(repr, calibrating.RANGES))
        raise ValueError(f"ranges must be one of {valid}, got {ranges!r}")
    if input_dtype not in INPUT_DTYPES:
        valid = ", ".join(map(repr, INPUT_DTYPES))
        raise ValueError(f"input_dtype must be one of {valid}, got {input_dtype!r}")
    if float_ and input_dtype != "int8":
        raise ValueError(f"a float file takes floats: leave input_dtype={input_dtype!r} out")
    if calibration is not None or not float_:
        calibrating.check(calibration, "to_tflite(model, inputs, path, calibration=loader)")
    check_folder(path)
    backends.litert_torch()  # a missing package shows before any work
    backends.quantizer()


def _pixel_ranges(prepared: layout.Prepared, graph: Graph) -> dict[str, calibrating.Range]:
    """Of inputs that the model takes as uint8: a step is one, whatever the data hold."""
    given = zip(graph.inputs, prepared.arguments, strict=True)
    return {tensor.name: (0.0, 255.0) for tensor, x in given if x.dtype == layout.PIXELS}


def _samples(
    calibration: Iterable[Any] | None, prepared: layout.Prepared
) -> tuple[calibrating.Sample, Iterable[calibrating.Sample]]:
    """One sample, and all that calibrate."""
    if calibration is None:
        return prepared.arguments, ()
    samples = iter(calibrating.draw(calibration, prepared.arguments, prepared.module.keys))
    first = next(samples)
    return first, itertools.chain([first], samples)


def _convert(prepared: layout.Prepared) -> bytes:
    """The float file. BatchNorm is folded and activations are fused by the converter."""
    litert = backends.litert_torch()
    try:
        with backends.quietly(), backends.uncollected(), torch.no_grad():
            return bytes(litert.convert(prepared.module, prepared.example).model_content())
    except Exception as error:
        layer = layer_of(str(error), prepared)
        whose = f", module {layer!r}" if layer else ""
        raise ExportError(
            f"litert-torch cannot convert {type(prepared.original).__name__}{whose}: "
            f"{backends.first_line(error)}"
        ) from error


def _float_row(placed: Placed[Weight]) -> TensorRow:
    tensor, trained = placed.weight.tensor, placed.matched.trained
    return TensorRow(trained.name, tensor.name, tensor.shape, trained.n_clusters, None, None)


def _result(
    path: Path,
    counts: tuple[int, int],
    prepared: layout.Prepared,
    graph: Graph,
    rows: tuple[TensorRow, ...],
    agreement: Agreement,
    calibrated: tuple[str, ...] | None,
    micro: MicroAgreement | None,
) -> TFLiteExport:
    return TFLiteExport(
        path=path,
        size_bytes=counts[0],
        tensors=rows,
        sqnr_db=agreement.sqnr_db,
        top1_agreement=agreement.top1,
        compared_samples=agreement.samples,
        micro_difference=None if micro is None else micro.difference,
        micro_differs={} if micro is None else micro.operators,
        calibration_samples=counts[1],
        calibrated=calibrated,
        operators=count_operators(graph),
        float_operators=tuple(
            OperatorRow(graph.operators[i].name, _made_by(graph, i, prepared))
            for i in float_operators(graph)
        ),
        inputs=tuple(port(t) for t in graph.inputs),
        outputs=tuple(port(t) for t in graph.outputs),
        channels_last=(prepared.module.moved, prepared.module.moved_outputs),
    )


def _made_by(graph: Graph, number: int, prepared: layout.Prepared) -> str | None:
    """The torch module behind an operator: by its output's name, else by one of its inputs'."""
    operator = graph.operators[number]
    for index in (*operator.outputs, *(i for i in operator.inputs if i >= 0)):
        module = layout.module_of(graph.tensors[index].name, prepared.module)
        if module is not None:
            return module
    return None
