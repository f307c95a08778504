"""A .tflite file's bytes, whole or damaged: a graph, or one error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchclust.export import inspect_tflite, to_tflite
from torchclust.export.backends import schema
from torchclust.export.container import pack, unpack
from torchclust.export.graph import read_graph


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 2)).eval()
    path = tmp_path_factory.mktemp("graph") / "m.tflite"
    x = torch.randn(4, 3, 8, 8)
    to_tflite(model, x[:1], path, calibration=[x])
    return path


def test_a_file_that_is_cut_off_anywhere(path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    for length in range(8, len(content), 13):
        with pytest.raises(ValueError, match=r"a damaged TFLite file, or one .* are cut off or"):
            read_graph(content[:length])
    (tmp_path / "cut.tflite").write_bytes(content[:600])
    with pytest.raises(ValueError, match=r"cut.tflite: a damaged TFLite file, .*its 600 bytes"):
        inspect_tflite(tmp_path / "cut.tflite")


def test_bytes_that_changed_are_a_graph_or_a_value_error(path: Path, tmp_path: Path) -> None:
    """Offsets into nowhere, types that there are not, names that are no text."""
    content, draw, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(600):
        damaged = bytearray(content)
        for at in draw.integers(8, len(content), 2):
            damaged[at] = draw.integers(256)
        (tmp_path / "m.tflite").write_bytes(damaged)
        try:
            inspect_tflite(tmp_path / "m.tflite")
        except ValueError:
            refused += 1
    assert 100 < refused < 600


def test_an_operator_of_a_tensor_that_is_not_there(path: Path) -> None:
    content = path.read_bytes()
    model = unpack(content)
    model.subgraphs[0].operators[0].outputs = [999]
    with pytest.raises(ValueError, match="an operator names a tensor that does not exist"):
        read_graph(pack(model, len(content)))
    model = unpack(content)
    known = [n for n in vars(schema().BuiltinOperator).values() if isinstance(n, int)]
    model.operatorCodes[0].builtinCode = max(known) + 1
    with pytest.raises(ValueError, match="one that is newer than the schema known here"):
        read_graph(pack(model, len(content)))
