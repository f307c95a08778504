"""The faults that people's situations showed: what they measured then, and what they measure now.

    python benchmarks/field.py            # measures, runs the tests, writes docs/situations.md
    python benchmarks/field.py 17 25      # prints the figures of these

Each row is a sample of a kind. Some have a figure, which is measured here anew; all have tests.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchclust import cluster_, fit_codebook, named_clusterings, strip_
from torchclust.export import ExportError, TFLiteExport, to_tflite, vela

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/situations.md"
MARKS = "## The faults, before and after", "## Reports from other trackers"


def exported(model: nn.Module, x: Tensor, **options: Any) -> TFLiteExport:
    path = Path(tempfile.mkdtemp()) / "a.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return to_tflite(model.eval(), x[:1], path, calibration=[x], **options)


def on_cpu(result: TFLiteExport) -> str:
    report = vela(result.path)
    names = sorted({row.operator for row in report.cpu_operators})
    return f"{report.cpu_ops} CPU operators" + (f" ({', '.join(names)})" if names else "")


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (16, 3, 16, 16)), generator=torch.Generator().manual_seed(0))


def around(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), layer, nn.Conv2d(8, 4, 1))


def decibels(layer: nn.Module) -> str:
    return f"{exported(around(layer), images()).sqnr_db:.1f} dB"


def averaged() -> str:
    torch.manual_seed(0)
    model, x = cluster_(nn.Linear(32, 32), 16), images(8, 32)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    with torch.no_grad():
        return f"outputs differ by {float((ema(x) - model(x)).abs().max()):.2g}"


def embedding() -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(96, 4))
    result = exported(model, torch.randint(0, 50, (16, 6)))
    return f"{result.sqnr_db:.1f} dB, tflite-micro {result.micro_difference} codes away"


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.Linear(12, 8)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.cell(torch.cat([x, state], 1)))


def zero_state() -> str:
    given, path = (images(64, 4), torch.zeros(64, 8)), Path(tempfile.mkdtemp()) / "a.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f"{to_tflite(Cell(), given, path, calibration=[given]).sqnr_db:.1f} dB"


def edited() -> str:
    torch.manual_seed(0)
    model, x = cluster_(nn.Linear(32, 32), 16), images(8, 32)
    with torch.no_grad():
        before = model(x)
        model.weight.data.mul_(torch.rand(32, 32) < 0.5)
        return f"outputs differ by {float((model(x) - before).abs().max()):.2g}"


def live() -> str:
    torch.manual_seed(0)
    model, x = cluster_(nn.Linear(32, 32), 16), images(8, 32)
    loss = model(x).square().mean()
    loss.backward()
    strip_(model)
    model(x).square().mean().backward()
    assert model.weight.grad is not None
    return f"a gradient of {tuple(model.weight.grad.shape)}"


def transposed() -> str:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1, groups=2)
    result = exported(cluster_(around(layer), 8, codebook_dtype="int8"), images())
    codes = {row.int8_codes for row in result.tensors if row.parameter == "1.weight"}
    return f"{result.sqnr_db:.1f} dB, {codes} codes in each group"


def curves() -> str:
    layers = (nn.LeakyReLU(0.1), nn.Hardtanh(0, 1), nn.ELU(), nn.Mish(), nn.Softplus())
    model = around(nn.Sequential(*layers, nn.AdaptiveMaxPool2d(2)))
    result = exported(model, images())
    return f"{on_cpu(result)}, {result.sqnr_db:.1f} dB"


def norm() -> str:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(32)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    result = exported(nn.Sequential(nn.ReLU(), layer), images(8, 32, 64, 64))
    return f"{', '.join(result.operators)}: {vela(result.path).cycles:,} cycles"


class Camera(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = around(nn.ReLU())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.body(x / 255 - 0.5)
        return y, torch.exp(y)


def ends() -> str:
    pixels = (images().sigmoid() * 255).to(torch.uint8)
    result = exported(Camera(), pixels, input_dtype="uint8")
    (port,) = result.inputs
    types = ", ".join(p.dtype for p in result.outputs)
    cast = "a CAST" if "CAST" in result.operators else "no CAST"
    return f"{port.dtype} of zero point {port.zero_point}, {cast}, outputs {types}"


def frames() -> str:
    try:
        exported(nn.Conv3d(3, 4, 3), images(4, 3, 5, 8, 8))
    except ExportError as error:
        return str(error).partition(":")[0]
    return "exports"


def seconds(model: nn.Module, **options: Any) -> float:
    start = time.process_time()
    cluster_(model, 16, **options)
    return time.process_time() - start


def cost() -> str:
    torch.set_num_threads(1)
    found = [seconds(nn.Linear(n, 4096), granularity="channel") for n in (64, 1024)]
    for dtype in ("float32", "int8"):
        layers = nn.Sequential(*(nn.Linear(32, 32) for _ in range(2000)))
        found += [seconds(layers, codebook_dtype=dtype)]
    return " / ".join(f"{s:.1f}" for s in found) + " s of one core"


def linear() -> str:
    values = torch.tensor([-3.0, -2, -1, 0, 1.1, 2, 3, 4, 5, 6, 7, 8, 9])
    book = fit_codebook(values, 6, init="linear", max_iter=0, preserve_sparsity=True)
    return f"first centroid {float(book.centroids[0]):g}"


def merged() -> str:
    torch.manual_seed(0)
    model = cluster_(nn.Linear(32, 32), 16, codebook_dtype="int8")
    original = model.parametrizations.weight.original
    original.data[1] = original.data[0]
    ((_, found),) = named_clusterings(model)
    assert found.codes is not None
    assert found.scale is not None
    weight = found.scale[:, None] * found.codes[found.indices.int()]
    return f"off by {float((weight - model.weight).abs().max()):.1g}"


# number: what, what it measured, what it measures, what holds it
ROWS: dict[int, tuple[str, str, Callable[[], str] | None, str]] = {
    1: (
        "errors of the converter pass: `Upsample(scale_factor=1.5)`",
        "1.1 dB, no word",
        lambda: decibels(nn.Upsample(scale_factor=1.5)),
        "export/test_faithful.py::test_the_first_wrong_operator_is_named "
        "export/test_rewrites.py::test_nearest_resizing_is_right_at_any_ratio",
    ),
    2: (
        "averaging with buffers truncates indices",
        "outputs differ by 0.10",
        averaged,
        "weight/test_stored.py model/test_situations.py::test_an_ema_handler_that_averages_buffers",
    ),
    3: (
        "an embedding on tflite-micro; MUL off by one code",
        "40.6 dB, tflite-micro 10.0 dB",
        embedding,
        "export/test_faithful.py::test_tflite_micro_reads_tables_of_embeddings export/"
        "test_faithful.py::test_operators_that_tflite_micro_rounds_otherwise_are_named",
    ),
    4: (
        "an input or a branch that calibration leaves at zero",
        "9.8 to 12.8 dB",
        zero_state,
        "export/test_faithful.py::test_a_state_that_is_always_zero_gets_a_range",
    ),
    5: (
        "requests to the callback that are ignored",
        "all in silence",
        None,
        "lightning/test_requests.py::test_two_callbacks_for_different_layers "
        "lightning/test_requests.py::test_a_clustered_module_and_another_request",
    ),
    6: (
        '`strategy="ddp_spawn"` with `strip=False`',
        "the untrained weights",
        None,
        "lightning/test_preconditions.py",
    ),
    7: (
        "edits in place under `no_grad`",
        "they stay in a cache",
        edited,
        "weight/test_evaluation_cache.py",
    ),
    8: (
        "`cluster_` that clusters nothing",
        "no word",
        None,
        "model/test_refusals.py::test_says_what_to_type_where_little_is_clustered",
    ),
    9: (
        "`lr_find`, hyperparameters, decay groups",
        "wrong or late",
        None,
        "lightning/test_requests.py::test_a_rate_found_while_clustered_is_not_lowered_again "
        "lightning/test_preconditions.py",
    ),
    10: (
        "parameters named `w_g` and `w_v`",
        "taken for weight_norm",
        None,
        "model/test_refusals.py::test_parameters_with_names_of_old_weight_norm_and_pruning",
    ),
    11: ("`strip_` while a loss lives", "invalid gradient", live, "model/test_live_losses.py"),
    12: (
        "one thread evaluates, another trains",
        "AttributeError",
        None,
        "weight/test_evaluation_cache.py::test_one_thread_evaluates_while_another_trains",
    ),
    13: (
        "double and half precision, `vmap`, tracing, devices, second derivatives",
        "crashes, NaN",
        None,
        "weight/test_transforms.py",
    ),
    14: (
        "averaging and validating, saving after `fit`, pruning a clustered layer",
        "crashes",
        None,
        "lightning/test_requests.py::test_averaging_keeps_indices_and_validates_afterwards "
        "model/test_refusals.py::test_a_clustered_layer_cannot_be_pruned",
    ),
    15: (
        "a training that diverged",
        '"4096 distinct values"',
        None,
        "model/test_clustering.py::test_a_diverged_training_is_called_that",
    ),
    16: (
        "sharded, quantized, scripted modules; views; Hugging Face's ties",
        "crashes, half clustered",
        None,
        "model/test_refusals.py::test_refused_in_one_line "
        "model/test_refusals.py::test_tied_weights_that_a_model_seeks_by_name",
    ),
    17: (
        "`MaxPool2d(3, 2, 1)` on even sizes",
        '"made an activation infinite"',
        lambda: decibels(nn.MaxPool2d(3, 2, 1)),
        "export/test_rewrites.py::test_the_npu_runs_all_of_it[maximum]",
    ),
    18: (
        "`ConvTranspose2d(output_padding=1)`, in groups",
        "fails; groups not clustered",
        transposed,
        "export/test_rewrites.py::test_transposed_convolutions_keep_their_codes",
    ),
    19: (
        "`AvgPool2d(count_include_pad=False)`",
        "an index error",
        lambda: decibels(nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        "export/test_rewrites.py::test_the_npu_runs_all_of_it[maximum]",
    ),
    20: (
        "LeakyReLU, Hardtanh, ELU, Mish, Softplus, AdaptiveMaxPool",
        "6 CPU operators for two LeakyReLU",
        curves,
        "export/test_rewrites.py::test_curves_are_within_two_codes "
        "export/test_rewrites.py::test_the_npu_runs_all_of_it",
    ),
    21: (
        "a BatchNorm on its own",
        "RELU, MUL: 1,180,096 cycles",
        norm,
        "export/test_rewrites.py::test_a_normalization_is_one_depthwise_convolution",
    ),
    22: (
        "bytes of a camera, a second output in float",
        "a CAST, float32",
        ends,
        "export/test_ends.py",
    ),
    23: (
        "errors without a layer, SQNR on calibration data",
        "40.4 claimed, 15.1 held out",
        None,
        "export/test_faithful.py::test_the_converters_error_names_the_layer "
        "export/test_vela.py::test_velas_failure_is_one_error_with_its_last_line",
    ),
    24: (
        "names of inputs, sequences, five dimensions",
        "raw MLIR, TRANSPOSE at one end",
        frames,
        "export/test_names.py export/test_ends.py::test_layers_over_frames_have_no_int8_form",
    ),
    25: (
        "4,096 channels of 64 / of 1,024 / 2,000 small layers / with int8 codebooks",
        "6.9 / 24.6 / 16.1 / 52 s of one core",
        cost,
        "fitting/test_stacked.py model/test_alike.py",
    ),
    26: (
        '`init="linear"`, one centroid left of 0',
        "first centroid -1",
        linear,
        "fitting/test_codebook.py",
    ),
    27: (
        "`codes[indices]` of merged codes",
        "another weight",
        merged,
        "model/test_clustering.py::test_codes_of_indices_are_the_weight",
    ),
    28: ("under `FakeTensorMode`", "fails", None, "weight/test_transforms.py::test_fake_tensors"),
}


def measured(number: int) -> str:
    """The figure of a row, where it has one."""
    measure = ROWS[number][2]
    return measure() if measure else "right, or one clear line"


def passing(tests: str) -> str:
    """Run the tests of a row and say how many passed."""
    nodes = [str(ROOT / "tests" / name) for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nodes]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    return (done.stdout.strip().splitlines() or ["nothing"])[-1].partition(" in ")[0]


def row(number: int, found: str, tests: str) -> str:
    what, before, _, names = ROWS[number]
    links = ", ".join(f"`{name.rpartition('/')[2]}`" for name in names.split())
    return f"| {number} | {what} | {before} | {found} | {links}{f': {tests}' if tests else ''} |"


def main() -> None:
    asked = [int(n) for n in sys.argv[1:]]
    lines = []
    for number in asked or ROWS:
        line = row(number, measured(number), "" if asked else passing(ROWS[number][3]))
        print(line, flush=True)
        lines.append(line)
    if not asked:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
        head = "| | situation | then | now | held by |\n|---|---|---|---|---|"
        intro = (
            "Each is a sample of a kind, and the kind was mended. `benchmarks/field.py` measures "
            "the figures and runs\nthe tests; the rows without a figure are right now, or one "
            "clear line says what to do."
        )
        table = "\n".join([MARKS[0], "", intro, "", head, *lines, "", MARKS[1]])
        PAGE.write_text(before + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
