"""A float file that computes something else is refused, and the guilty operator named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from torchclust import ClusterConfig, cluster_, named_clusterings
from torchclust.export import ExportError, backends, micro_agreement, to_tflite
from torchclust.export.graph import Graph
from torchclust.export.rewrites import rules
from torchclust.export.rewrites.nodes import Substitute
from torchclust.export.rewrites.traced import Traced
from torchclust.export.runner import Runner

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def wrong(traced: Traced, node: fx.Node) -> Substitute:
    """A sine that is none, as an error of the converter would be."""
    return lambda x: torch.sigmoid(x) * 2


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.good, self.bad = nn.Tanh(), Sine()
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.good(x), self.bad(x)], 1))


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


@pytest.mark.parametrize("float_file", [True, False])
def test_the_first_wrong_operator_is_named(
    float_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.RULES, "sin", wrong)
    match = r"agrees with torch to .* dB only, .* aten.sin.default in module 'bad'"
    with pytest.raises(ExportError, match=match):
        to_tflite(Branches(), X, tmp_path / "a", calibration=[X], float=float_file)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_noise_warn_with_their_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    x = X.clone()
    x[0, 0, 0, 0] = 3e4  # one dead pixel stretches the range of all others
    match = r"agree with the float model's to .* dB only. It happens at '.*', from .* to .* dB"
    with pytest.warns(UserWarning, match=match):
        to_tflite(model, X, tmp_path / "a", calibration=[x])


def test_the_layer_is_found_among_tensors_that_nothing_makes(tmp_path: Path) -> None:
    """A Linear over tokens becomes a convolution, and what it made before stays in the file."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    x = torch.randn(16, 12, 8)
    x[0, 0, 0] = 3e4
    with pytest.warns(UserWarning, match="dB only. It happens at"):
        to_tflite(model, x, tmp_path / "a", calibration=[x])


def test_a_divisor_that_becomes_zero_is_named(tmp_path: Path) -> None:
    class Ratio(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.above, self.below = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.above(x) / (self.below(x).relu() + 1e-3)

    x = torch.randn(32, 16)
    match = r"LiteRT stops at DIV, which makes '.*': .* Add a constant .* or keep the division"
    with pytest.raises(ExportError, match=match):
        to_tflite(Ratio(), x, tmp_path / "a", calibration=[x])
    assert list(tmp_path.iterdir()) == []


def test_a_state_that_is_always_zero_gets_a_range(tmp_path: Path) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(12, 8)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return torch.tanh(self.cell(torch.cat([x, state], 1)))

    # Uniform: a normal's largest value may be among those held out, and be clipped there.
    x, zeros = 2 * torch.rand(128, 4) - 1, torch.zeros(128, 8)
    match = r"1 of the model's tensors are zero for all calibration data, input 'state' the first"
    with pytest.warns(UserWarning, match=match):
        result = to_tflite(Cell(), (x, zeros), tmp_path / "a", calibration=[(x, zeros)])
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25
    assert 0.5 < result.inputs[1].scale * 127 < 2


def test_a_bounded_activation_of_a_vanished_signal_is_none(tmp_path: Path) -> None:
    """As an untrained MobileNetV2's: LiteRT refuses a step under which 6 is no 32-bit integer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    for tensor in model[0].parameters():
        tensor.data.mul_(1e-9)
    with pytest.warns(UserWarning, match="are zero for all calibration data"):
        result = to_tflite(model, X, tmp_path / "a", calibration=[X])
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30


def test_an_operator_without_int8_form_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LocalResponseNorm(5))
    with pytest.raises(ExportError, match=r"'1' becomes STABLEHLO_\w+, which has no int8 form"):
        to_tflite(model, X, tmp_path / "a", calibration=[X])


def test_the_converters_error_names_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the shape that it shows, of the one convolution that has it."""
    said = (
        "Failed to run converter passes: /usr/lib/site-packages/torch/nn/modules/conv.py:1198:0: "
        "error: failed to legalize operation 'mhlo.convolution': %72 = \"mhlo.convolution\"(%66) : "
        "(tensor<1x8x8x2xf32>, tensor<2x3x3x2xf32>) -> tensor<1x17x17x4xf32>\n"
    )

    def fails(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(backends.litert_torch(), "convert", fails)
    deep = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 2))
    match = r"cannot convert Sequential, module '1.1': .*: error: failed to legalize"
    with pytest.raises(ExportError, match=match) as info:
        to_tflite(nn.Sequential(nn.Conv2d(3, 4, 1), deep), X, tmp_path / "a", calibration=[X])
    assert "site-packages" not in str(info.value)


def test_integer_outputs_stay_outside(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(ExportError, match=r"output 0 holds torch.int64 made by 'argmax', which"):
        to_tflite(Largest(), X, tmp_path / "a", calibration=[X])


def test_a_branch_times_zero_is_left_out_with_a_warning(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.head = nn.Conv2d(3, 8, 1)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.norm(self.conv(x)))

    model = cluster_(Residual(), 4, codebook_dtype="int8")
    with pytest.warns(UserWarning, match=r"'conv.weight' is not in the file: what it computes"):
        result = to_tflite(model, X, tmp_path / "a", calibration=[X])
    assert [row.parameter for row in result.tensors] == ["head.weight"]


class Words(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(96, 4))


@pytest.mark.parametrize("clusters", [None, 8])
def test_tflite_micro_reads_tables_of_embeddings(clusters: int | None, tmp_path: Path) -> None:
    model: nn.Module = Words()
    with torch.no_grad():
        model[0].weight *= torch.rand(50, 1) * 4  # type: ignore[index]
    words = torch.randint(0, 50, (16, 6))
    if clusters:
        cluster_(model, clusters)
    result = to_tflite(model, words, tmp_path / "a", calibration=[words])
    assert result.micro_difference == 0
    assert all(row.codes_match for row in result.tensors)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25


def test_tables_that_tflite_micro_misreads_warn(tmp_path: Path) -> None:
    words = torch.randint(0, 50, (16, 6))
    model = cluster_(Words(), 8, codebook_dtype="int8")
    with pytest.warns(UserWarning, match=r"tflite-micro answers otherwise .*\bfloat") as warned:
        result = to_tflite(model, words, tmp_path / "a", calibration=[words])
    assert result.micro_difference is not None
    assert result.micro_difference > 2
    (advised,) = re.findall(r"cluster_\(model, (.*)\)", str(warned[0].message))
    rules = eval(advised, {"ClusterConfig": ClusterConfig})
    model = cluster_(Words(), rules)
    dtypes = {name: c.config.codebook_dtype for name, c in named_clusterings(model)}
    assert dtypes == {"0.weight": "float32", "2.weight": "int8"}
    assert to_tflite(model, words, tmp_path / "b", calibration=[words]).micro_difference == 0


def test_operators_that_tflite_micro_rounds_otherwise_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a MUL is in one value of some thousands; what follows it differs too, and is not named."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x * x)

    class Otherwise:
        def __init__(self, graph: Graph, litert: Runner) -> None:
            made = {o.outputs[0]: o.name for o in graph.operators}
            late = [i for i, name in made.items() if name == "MUL" or i == graph.outputs[0].index]
            self.late, self.litert = late, litert

        def GetTensor(self, index: int, _: int) -> dict[str, Any]:
            return {"tensor_data": self.litert.tensor(index) + (index in self.late)}

    monkeypatch.setattr(
        micro_agreement, "_answered", lambda _, graph, litert: Otherwise(graph, litert)
    )
    result = to_tflite(Gated(), X, tmp_path / "a", calibration=[X * 2])
    assert result.micro_difference == 1
    assert result.micro_differs == {"MUL": 1}
