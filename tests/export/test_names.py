"""Inputs and outputs have the model's names in the file, and channels last at both ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from torch import Tensor, nn

from torchclust.export import to_tflite


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

    def forward(self, image: Tensor, gain: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        maps, scale = self.image(image), self.vector(gain)
        return {"boxes": maps, "scores": (scale, scale.relu())}


@pytest.mark.parametrize("by_name", [True, False])
def test_ends_are_named_as_in_the_model(by_name: bool, tmp_path: Path) -> None:
    x, gain = torch.randn(4, 3, 8, 8), torch.randn(4, 5)
    given = {"image": x, "gain": gain}
    inputs = given if by_name else (x, gain)
    result = to_tflite(Detector(), inputs, tmp_path / "a.tflite", calibration=[inputs])
    assert [p.name for p in result.inputs] == ["image", "gain"]
    assert [p.name for p in result.outputs] == ["boxes", "scores_0", "scores_1"]
    (signature,) = Interpreter(str(result.path)).get_signature_list().values()
    assert set(signature["inputs"]) == {"image", "gain"}
    assert set(signature["outputs"]) == {"boxes", "scores_0", "scores_1"}


def test_a_single_output_is_called_output(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    result = to_tflite(nn.Linear(6, 2), x, tmp_path / "a.tflite", calibration=[x])
    assert [p.name for p in (*result.inputs, *result.outputs)] == ["input", "output"]


def test_sequences_have_channels_last_at_both_ends(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1))
    x = torch.randn(8, 4, 20)
    result = to_tflite(model, x, tmp_path / "a.tflite", calibration=[x])
    assert [p.shape for p in (*result.inputs, *result.outputs)] == [(1, 20, 4), (1, 18, 2)]
    assert "TRANSPOSE" not in result.operators
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25


class Returned(nn.Module):
    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.returned = nn.Linear(4, 4), returned

    def forward(self, x: Tensor) -> Any:
        return self.returned(x, self.layer(x))


@pytest.mark.parametrize(
    ("returned", "names"),
    [
        (lambda x, y: (y, y), ["output_0", "output_1"]),
        (lambda x, y: {"a": {"b": y}, "a_b": y * 2}, ["a_b", "a_b_1"]),
        (lambda x, y: (x, y), ["output_0", "output_1"]),
        (lambda x, y: {"x": y}, ["x"]),
    ],
    ids=["twice", "alike", "input", "as the input"],
)
def test_every_end_has_a_name_of_its_own(
    returned: Callable[[Tensor, Tensor], Any], names: list[str], tmp_path: Path
) -> None:
    x, model = torch.randn(8, 4), Returned(returned)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    assert [p.name for p in result.inputs] == ["x"]
    run = Interpreter(str(result.path)).get_signature_runner()
    (signature,) = Interpreter(str(result.path)).get_signature_list().values()
    assert sorted(signature["outputs"]) == names
    codes = np.zeros((1, 4), np.int8)
    answers = run(x=codes)
    wanted = [p.scale * (answers[n].astype(float) - p.zero_point)
              for n, p in zip(names, result.outputs, strict=True)]  # fmt: skip
    value = torch.full((1, 4), -result.inputs[0].scale * result.inputs[0].zero_point)
    with torch.no_grad():
        outputs = torch.utils._pytree.tree_leaves(model(value))
    for got, want in zip(wanted, outputs, strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=0.1)
