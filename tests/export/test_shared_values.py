"""A float file of a clustered network keeps the shared values that BatchNorm would multiply."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from export_networks import randomize_norms
from torch import nn

from torchclust import cluster_, strip_
from torchclust.export import TFLiteExport, to_tflite


def network() -> nn.Sequential:
    """Dense and depthwise convolutions with BatchNorm, one without, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
        nn.Conv2d(32, 64, 1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def exported(model: nn.Module, path: Path, *, is_float: bool = True) -> TFLiteExport:
    images = torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))
    return to_tflite(model, images[:1], path, calibration=[images], float=is_float)


def constants(path: Path) -> dict[tuple[int, ...], int]:
    """The distinct values of each float constant of four dimensions, by its shape."""
    runtime = Interpreter(str(path), experimental_op_resolver_type=OpResolverType.BUILTIN_REF)
    runtime.allocate_tensors()
    details = runtime.get_tensor_details()
    written = {i for operator in runtime._get_ops_details() for i in operator["outputs"]}
    return {
        tuple(d["shape"]): len(np.unique(runtime.get_tensor(d["index"])))
        for d in details
        if len(d["shape"]) == 4 and d["index"] not in written and d["dtype"] is np.float32
    }


def zipped(path: Path) -> int:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path)
    return len(buffer.getvalue())


@pytest.mark.parametrize("stripped", [False, True])
def test_shared_values_stay_shared_and_the_outputs_the_same(tmp_path: Path, stripped: bool) -> None:
    model = cluster_(randomize_norms(network()), 8)
    if stripped:
        strip_(model)
    result = exported(model, tmp_path / "shared.tflite")
    found = constants(result.path)
    assert found[32, 3, 3, 8] <= 8
    assert found[64, 1, 1, 32] <= 8
    assert found[16, 1, 1, 64] <= 8
    # Two BatchNorms stand apart; the one behind the depthwise convolution is folded into it.
    assert result.operators["DEPTHWISE_CONV_2D"] == 3
    assert result.operators["CONV_2D"] == 3
    assert set(result.operators) == {"CONV_2D", "DEPTHWISE_CONV_2D", "MEAN", "FULLY_CONNECTED"}
    assert result.sqnr_db is not None
    assert result.sqnr_db > 100


@pytest.mark.parametrize(
    "options", [None, {"codebook_dtype": "int8"}, {"granularity": "channel"}], ids=str
)
def test_batch_norm_is_folded_where_values_are_not_shared(
    tmp_path: Path, options: dict[str, str] | None
) -> None:
    model = randomize_norms(network())
    if options:
        cluster_(model, 16, **options)
    result = exported(model, tmp_path / "folded.tflite")
    assert result.operators["DEPTHWISE_CONV_2D"] == 1


def test_int8_files_fold_every_batch_norm(tmp_path: Path) -> None:
    result = exported(cluster_(network(), 8), tmp_path / "int8.tflite", is_float=False)
    assert result.operators["DEPTHWISE_CONV_2D"] == 1
    assert max(row.int8_codes for row in result.tensors) <= 8


def test_what_it_is_for(tmp_path: Path) -> None:
    """Of the clustered weights, the zip archive needs at most 6 bits each instead of 30."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 256, 1, bias=False), nn.BatchNorm2d(256))
    with torch.no_grad():
        model[0].weight.normal_()
    randomize_norms(model)
    images = torch.randn(1, 128, 4, 4)
    sizes = []
    for name in ("plain", "clustered"):
        path = tmp_path / f"{name}.tflite"
        to_tflite(model, images, path, calibration=None, float=True)
        sizes.append(zipped(path))
        cluster_(model, 8)
    assert sizes[1] * 8 < 6 * 128 * 256
    assert sizes[0] * 8 > 28 * 128 * 256
