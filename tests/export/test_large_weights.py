"""Weights over 32 MiB, on which the quantizer fails, get the integers that it would give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import large_weights, to_tflite
from torchclust.export.graph import read_graph


def network() -> nn.Module:
    """Of every kind of weight, some clustered: a grouped, a depthwise and a transposed one too."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU()),
        *(nn.Conv2d(16, 8, 1, groups=2), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 64, 24), nn.ReLU(), nn.Linear(24, 5)),
    )
    return cluster_(model, {"0.weight": 8, "8.weight": 8}, codebook_dtype="int8")


def test_they_are_what_the_quantizer_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = network(), torch.randn(8, 3, 8, 8)

    def written() -> bytes:
        return to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x]).path.read_bytes()

    wanted, put_back = written(), large_weights.put_back
    monkeypatch.setattr(large_weights, "_LARGEST_BYTES", 0)
    aside: list[str] = []

    def counted(content: bytes, integers: dict[str, np.ndarray]) -> bytes:
        aside.extend(integers)
        return put_back(content, integers)

    monkeypatch.setattr("torchclust.export.quantize.put_back", counted)
    found = written()
    assert len(aside) == 6
    assert [(t.name, t.shape, t.dtype) for t in read_graph(wanted).tensors] == [
        (t.name, t.shape, t.dtype) for t in read_graph(found).tensors
    ]
    for mine, theirs in zip(read_graph(found).tensors, read_graph(wanted).tensors, strict=True):
        np.testing.assert_array_equal(mine.data, theirs.data)
        np.testing.assert_array_equal(mine.scales, theirs.scales)


def test_a_layer_of_nine_million_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(9216, 1024)
    x = torch.randn(8, 9216)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    assert result.sqnr_db is not None
    assert result.sqnr_db > 35
    (weight,) = read_graph(result.path.read_bytes()).weights()
    assert weight.tensor.shape == (1024, 1, 1, 9216)
