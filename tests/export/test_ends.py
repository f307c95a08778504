"""Integers at both ends of a file: no float output, pixels as a camera gives them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import ExportError, TFLiteExport, to_tflite, vela
from torchclust.export.container import pack, unpack
from torchclust.export.editing import Editing
from torchclust.export.ends import with_integer_ends
from torchclust.export.file_network import of_tflite
from torchclust.export.graph import read_graph
from torchclust.export.layout import channels_last
from torchclust.export.runner import Runner

IMAGES = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return cluster_(nn.Sequential(*layers, nn.Linear(8, 4)), 8, codebook_dtype="int8")


def on_cpu(result: TFLiteExport, accelerator: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = vela(result.path, accelerator=accelerator)
    return [row.operator for row in report.cpu_operators]


def test_a_camera_writes_into_a_uint8_input(tmp_path: Path) -> None:
    results = [
        to_tflite(small(), IMAGES, tmp_path / kind, calibration=[IMAGES], input_dtype=kind)
        for kind in ("int8", "uint8")
    ]
    (signed,), (unsigned,) = (result.inputs for result in results)
    assert (signed.dtype, unsigned.dtype) == ("int8", "uint8")
    assert (unsigned.scale, unsigned.zero_point) == (signed.scale, signed.zero_point + 128)
    assert (signed.name, unsigned.name) == ("input", "input")
    assert results[1].operators == {"QUANTIZE": 1, **results[0].operators}
    assert results[1].sqnr_db == results[0].sqnr_db
    assert results[1].micro_difference == 0
    for accelerator in ("ethos-u55-128", "ethos-u85-256"):
        assert on_cpu(results[1], accelerator) == []


class Camera(nn.Module):
    """A model that takes bytes and normalizes them itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.body = how, small()

    def forward(self, x: Tensor) -> Tensor:
        x = x / 255 if self.how == "divided" else x.to(torch.float32) / 255
        return self.body((x - 0.5) * 2)


@pytest.mark.parametrize("how", ["divided", "converted"])
@pytest.mark.parametrize(("dtype", "zero"), [("int8", -128), ("uint8", 0)])
def test_pixels_need_no_cast(how: str, dtype: Any, zero: int, tmp_path: Path) -> None:
    pixels = (IMAGES * 200).to(torch.uint8)  # the brightest are not in the calibration data
    model, path = Camera(how), tmp_path / "a"
    result = to_tflite(model, pixels, path, calibration=[pixels], input_dtype=dtype)
    (port,) = result.inputs
    assert (port.dtype, port.scale, port.zero_point) == (dtype, 1.0, zero)
    assert "CAST" not in result.operators
    assert result.micro_difference == 0
    assert result.sqnr_db is not None
    assert result.sqnr_db > 28
    assert on_cpu(result, "ethos-u55-128") == []
    wanted, got = model(pixels).detach(), of_tflite(result, model, (pixels,))(pixels)
    assert (wanted - got).norm() < 0.05 * wanted.norm()


def test_a_network_keeps_its_modes_beside_its_file(tmp_path: Path) -> None:
    """Of each module its own: frozen norms stay frozen in a network that trains."""
    result = to_tflite(small(), IMAGES, tmp_path / "a", calibration=[IMAGES])
    network = small().train()
    network[1].eval()
    of_tflite(result, network, (IMAGES,))
    assert [module.training for module in network] == [True, False, True, True, True]
    network[4].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        of_tflite(result, network, (IMAGES,))
    assert [module.training for module in network] == [True, False, True, True, True]


def test_a_float_file_takes_pixels_as_floats(tmp_path: Path) -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    result = to_tflite(Camera("converted"), pixels, tmp_path / "a", calibration=None, float=True)
    assert [p.dtype for p in result.inputs] == ["float32"]
    assert "CAST" not in result.operators


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_dtype": "int16"}, "input_dtype must be one of 'int8', 'uint8', got 'int16'"),
        ({"input_dtype": "uint8", "float": True}, "a float file takes floats: leave input_dtype"),
    ],
)
def test_bad_input_types_are_refused(arguments: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        to_tflite(small(), IMAGES, tmp_path / "a", calibration=[IMAGES], **arguments)


def test_floats_do_not_calibrate_pixels(tmp_path: Path) -> None:
    pixels = (IMAGES * 255).to(torch.uint8)
    match = r"batch 0, input 0 holds torch.float32, the example input torch.uint8; calibrate on"
    with pytest.raises(TypeError, match=match):
        to_tflite(Camera("divided"), pixels, tmp_path / "a", calibration=[IMAGES])


class Heads(nn.Module):
    """Outputs that end in operators without an int8 form, and some that are not computed."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.how = nn.Conv2d(3, 8, 3, stride=2), how
        self.register_buffer("anchors", torch.linspace(0.5, 2, 8))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return {
            "exponential": lambda: (y, torch.exp(y)),
            "logarithm": lambda: (torch.log(y.relu() + 1), y),
            "twice": lambda: (torch.sin(y), torch.sin(y)),
            "passed through": lambda: (y, x),
            "of the input": lambda: (y, torch.sin(x)),
            "log softmax": lambda: torch.log_softmax(y.flatten(1), 1),
            "constant": lambda: (y, self.anchors * 2),
            "float throughout": lambda: (torch.sin(x), x, torch.sin(x)),
        }[self.how]()


@pytest.mark.parametrize(
    "how",
    [
        *("exponential", "logarithm", "twice", "passed through", "of the input", "log softmax"),
        *("constant", "float throughout"),
    ],
)
def test_every_output_is_int8(how: str, tmp_path: Path) -> None:
    result = to_tflite(Heads(how), IMAGES, tmp_path / "a", calibration=[IMAGES])
    assert {p.dtype for p in (*result.inputs, *result.outputs)} == {"int8"}
    assert all(p.scale > 0 for p in (*result.inputs, *result.outputs))
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25
    if how == "exponential":
        assert result.float_operators == ()
    model = Heads(how)
    network = of_tflite(result, model, (IMAGES,))
    wanted, got = model(IMAGES[:2]), network(IMAGES[:2])
    pairs = zip(wanted, got, strict=True) if isinstance(wanted, tuple) else [(wanted, got)]
    for want, y in pairs:
        y = y.view(2, *want.shape)[0] if want.ndim == 1 else y  # one for each sample
        assert (want - y).norm() < 0.1 * want.norm()


def a_float_file(folder: Path) -> tuple[bytes, dict[str, tuple[float, float]]]:
    path = to_tflite(small(), IMAGES, folder / "f", calibration=None, float=True).path
    content = path.read_bytes()
    (given,), (made,) = read_graph(content).inputs, read_graph(content).outputs
    outputs = Runner(content)([channels_last(IMAGES[:1])])[0]
    return content, {given.name: (0.0, 1.0), made.name: (outputs.min(), outputs.max())}


def test_float_ends_become_int8_whatever_is_between(tmp_path: Path) -> None:
    content, observed = a_float_file(tmp_path)
    for dtype, zero in (("int8", -128), ("uint8", 0)):
        changed = with_integer_ends(content, observed, dtype)  # type: ignore[arg-type]
        graph = read_graph(changed)
        (given,), (made,) = graph.inputs, graph.outputs
        assert (given.dtype, made.dtype) == (dtype, "int8")
        assert (given.scales, given.zero_points) == (np.float32(1 / 255), zero)
        kinds = [o.name for o in graph.operators]
        assert kinds[0] == ("QUANTIZE" if dtype == "uint8" else "DEQUANTIZE")
        assert kinds[-1] == "QUANTIZE"
        x = [channels_last(IMAGES[:1])]
        wanted, got = Runner(content)(x)[0], Runner(changed)(x)[0]
        assert np.abs(wanted - got).max() < 2 * made.scales[0]


def test_an_output_that_is_dequantized_last_is_what_it_was(tmp_path: Path) -> None:
    path = to_tflite(small(), IMAGES, tmp_path / "a", calibration=[IMAGES]).path
    model = unpack(path.read_bytes())
    editing = Editing(model, model.subgraphs[0])
    editing.operators = list(model.subgraphs[0].operators)
    (last,) = (int(i) for i in model.subgraphs[0].outputs)
    floats = editing.like(last, editing.shape(last))
    editing.tensor(floats).type = editing.schema.TensorType.FLOAT32
    editing.add("DEQUANTIZE", [last], floats)
    model.subgraphs[0].operators, model.subgraphs[0].outputs = editing.operators, [floats]
    content = pack(model, 0)
    assert read_graph(content).outputs[0].dtype == "float32"
    graph = read_graph(with_integer_ends(content, {}, "int8"))
    assert [t.index for t in graph.outputs] == [last]
    kinds = [o.name for o in graph.operators]
    assert kinds == [o.name for o in read_graph(path.read_bytes()).operators]


def test_indices_stay_indices_beside_a_camera(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), torch.randint(0, 9, (16, 3))
    result = to_tflite(model, ids, tmp_path / "a", calibration=[ids], input_dtype="uint8")
    assert result.inputs[0].dtype in ("int32", "int64")


@pytest.mark.parametrize(
    "layer", [nn.Conv3d(3, 4, 3), nn.Conv3d(3, 6, 3, groups=3), nn.MaxPool3d(2)]
)
def test_layers_over_frames_have_no_int8_form(layer: nn.Module, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Sequential(layer)), torch.randn(4, 3, 5, 8, 8)
    with pytest.raises(ExportError, match=r"'1\.0' calls '\w+3d', which has no int8 form: kernels"):
        to_tflite(model, x[:1], tmp_path / "a", calibration=[x])


def test_frames_of_a_film_keep_their_order(tmp_path: Path) -> None:
    """Five dimensions that no 3-D layer reads are no map whose channels move."""

    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(6, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.flatten(1, 2))

    x = torch.randn(16, 2, 3, 8, 8)
    result = to_tflite(Film(), x[:1], tmp_path / "a", calibration=[x])
    assert result.inputs[0].shape == (1, 2, 3, 8, 8)
    assert result.channels_last == ((False,), (True,))
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30
    assert result.outputs[0].shape == (1, 6, 6, 8)
