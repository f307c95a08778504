"""Learned ranges in the file, and the file's answers against the model that rounds in training."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from export_networks import CASES
from learned_networks import NETWORKS, trained
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchclust import strip_
from torchclust.activations.quantized import activation_ranges, quantize_activations_
from torchclust.export import TFLiteExport, to_tflite

Array = npt.NDArray[Any]


# What the converter computes in steps that torch does not have: half of hard-sigmoid.
IN_STEPS = {"squeeze_excite": 1}


@dataclasses.dataclass(frozen=True)
class Exported:
    model: nn.Module
    inputs: list[tuple[Tensor, ...]]
    result: TFLiteExport

    def in_file(self) -> Interpreter:
        return Interpreter(
            str(self.result.path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF
        )


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    model, inputs = trained(NETWORKS[request.param])
    path = tmp_path_factory.mktemp("learned") / f"{request.param}.tflite"
    return Exported(model, inputs, to_tflite(model, inputs[0], path, calibration=inputs))


def channels_last(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == tuple(shape) else np.moveaxis(x, 1, -1)


def test_the_file_answers_as_the_model_that_rounds(exported: Exported) -> None:
    runtime = exported.in_file()
    runtime.allocate_tensors()
    steps: list[Array] = []
    for sample in exported.inputs:
        for detail, x in zip(runtime.get_input_details(), sample, strict=True):
            scale, zero_point = detail["quantization"]
            codes = np.rint(channels_last(x.numpy(), detail["shape"]) / scale) + zero_point
            runtime.set_tensor(detail["index"], codes.clip(-128, 127).astype(np.int8))
        runtime.invoke()
        with torch.no_grad():
            outputs = tree_leaves(exported.model(*sample))
        for detail, y in zip(runtime.get_output_details(), outputs, strict=True):
            scale, zero_point = detail["quantization"]
            codes = np.rint(channels_last(y.numpy(), detail["shape"]) / scale) + zero_point
            difference = codes - runtime.get_tensor(detail["index"])
            steps.append(np.abs(difference).reshape(-1))
    found = np.concatenate(steps)
    assert (found <= 1).mean() >= 0.98
    assert found.max() <= 3


def test_every_scale_in_the_file_is_a_learned_one(
    exported: Exported, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["exported"]
    learned = {
        (np.float32(high) - np.float32(low)) / np.float32(255)
        for low, high in activation_ranges(exported.model).values()
    } | {np.float32(1 / 256)}
    runtime = exported.in_file()
    scales = {
        float(detail["quantization"][0])
        for detail in runtime.get_tensor_details()
        if detail["dtype"] is np.int8
        and len(detail["quantization_parameters"]["scales"]) == 1
        and detail["shape"].prod() > 1  # not a constant factor
    }
    known = np.array(sorted(learned), np.float64)
    others = [s for s in scales if np.abs(known / s - 1).min() > 1e-5]
    assert exported.result.calibrated is not None
    assert len(others) <= len(exported.result.calibrated) == IN_STEPS.get(name, 0)
    assert len(scales) - len(others) >= len({*activation_ranges(exported.model).values()}) - 2


def test_ranges_without_a_model_that_learned_them_come_from_calibration(tmp_path: Path) -> None:
    model, inputs = trained(CASES["flattened"])
    learned = to_tflite(model, inputs[0], tmp_path / "learned.tflite", calibration=inputs)
    plain = strip_(copy.deepcopy(model))
    observed = to_tflite(plain, inputs[0], tmp_path / "observed.tflite", calibration=inputs)
    peak = max(float(x.abs().max()) for (x,) in inputs)
    low, high = activation_ranges(model)[":input"]
    assert observed.calibrated is None
    assert learned.calibrated == ()
    assert observed.inputs[0].scale == pytest.approx(2 * peak / 255, rel=0.2)
    assert learned.inputs[0].scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert learned.inputs[0].scale > 1.1 * float(observed.inputs[0].scale or 0)
    floats = to_tflite(model, inputs[0], tmp_path / "f.tflite", calibration=None, float=True)
    assert floats.calibrated is None


def test_steps_that_torch_does_not_have_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.Conv2d(4, 4, 1))
    inputs = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    quantize_activations_(model, torch.cat(inputs))
    result = to_tflite(model, inputs[0], tmp_path / "m.tflite", calibration=inputs)
    assert result.calibrated
    assert all("ELU" in name for name in result.calibrated)


@pytest.mark.parametrize("kernel", [3, 6])
@pytest.mark.parametrize("divisor", [None, 4])
def test_a_pooling_is_rounded_where_the_file_rounds_it(
    kernel: int, divisor: int | None, tmp_path: Path
) -> None:
    """Whether it is a MEAN, a pooling or has a factor, training and file decide alike."""
    torch.manual_seed(0)
    pool = nn.AvgPool2d(kernel, divisor_override=divisor)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), pool), torch.randn(8, 3, 8, 8)
    quantize_activations_(model, 2 * x)
    result = to_tflite(model, x, tmp_path / "m.tflite", calibration=[x])
    own = kernel == 6 or divisor is not None
    ranges = activation_ranges(model)
    low, high = ranges["1:avg_pool2d"]
    assert ((low, high) != ranges["0:conv2d"]) == own
    assert result.outputs[0].scale == pytest.approx((high - low) / 255, rel=1e-6)
    assert ("MEAN" in result.operators) == (kernel == 6)


class InPlace(nn.Module):
    """A residual block, and before it what works in place on its own inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1))
        self.block = InPlaceBlock()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(self.first(x))
        return y


class InPlaceBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x.sub_(0.1))
        y = self.norm(self.conv(x))
        y += x
        y = self.relu(y)
        return y


def test_what_works_in_place_hides_no_learned_range(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = InPlace().eval(), torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        quantize_activations_(model.first, x)
        quantize_activations_(model.block, model.first(x))
    result = to_tflite(model, x, tmp_path / "m.tflite", calibration=[x])
    assert result.calibrated == ()


class Whole(nn.Module):
    """Two networks, quantized apart as a training step would, exported as one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.decoder = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


def test_networks_quantized_apart_are_exported_as_one(tmp_path: Path) -> None:
    model = Whole()
    x = torch.randn(16, 3, 8, 8)
    quantize_activations_(model.encoder, 2 * x)
    quantize_activations_(model.decoder, model.encoder(2 * x).detach())
    result = to_tflite(model, x, tmp_path / "m.tflite", calibration=[x])
    assert result.calibrated == ()
    low, high = activation_ranges(model)["decoder.2:conv2d"]
    assert result.outputs[0].scale == pytest.approx((high - low) / 255, rel=1e-6)
