"""Ranges of an ExecuTorch program's values: learned ones, and what a ReLU lets through."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from learned_networks import NETWORKS, trained
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from torchclust.activations.quantized import activation_ranges
from torchclust.export import layout, to_pte
from torchclust.export.accelerators import Configuration
from torchclust.export.executorch import lowering
from torchclust.export.executorch.clipping import clipped
from torchclust.export.executorch.observed import observe, observers
from torchclust.export.executorch.scales import calibrate

pytestmark = [
    pytest.mark.executorch,
    pytest.mark.skipif(
        importlib.util.find_spec("executorch") is None, reason="make test-executorch"
    ),
]

# What the backend computes in steps that torch does not have: those of a softmax, half of a
# hard-sigmoid.
IN_STEPS = {"mixed": 4, "squeeze_excite": 1}


@pytest.mark.parametrize("name", ["mixed", "resnet", "squeeze_excite", "two_in_two_out"])
def test_the_program_answers_as_the_model_that_rounds(name: str, tmp_path: Path) -> None:
    """Learned ranges, residual sums' among them: not one output is more than a step away."""
    model, inputs = trained(NETWORKS[name])
    done = to_pte(model, inputs[0], tmp_path / "m.pte", calibration=inputs, target="ethos-u85-256")
    assert done.calibrated is not None
    assert len(done.calibrated) == IN_STEPS.get(name, 0)
    low, high = activation_ranges(model)[":input"]
    assert done.inputs[0].scale == pytest.approx((high - low) / 255, rel=1e-6)
    apart = []
    for sample in inputs:
        found = done.run(tuple(channels_last(x).contiguous() for x in sample))
        with torch.no_grad():
            wanted = [channels_last(y).numpy() for y in tree_leaves(model(*sample))]
        for y, want, port in zip(found, wanted, done.outputs, strict=True):
            apart.append(np.abs(y - want).ravel() / port.scale)
    assert np.concatenate(apart).max() < 1.01


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1) if x.ndim == 4 else x


class Sums(nn.Module):
    """One that is clipped at once, one that is read besides, and an input."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.conv, self.clip = nn.Conv2d(3, 3, 3, padding=1), clip

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        twice = y - x
        return self.clip(y + x) + self.clip(twice) + twice + self.clip(x)


class Joined(Sums):
    """The clipped value has its scale in common with one that has negative numbers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([self.clip(y + x), y], 1)


def calibrated(model: nn.Module, images: Sequence[Tensor], folder: Path) -> fx.GraphModule:
    prepared = layout.prepare(model.eval(), images[0], last=True)
    spec = lowering.compile_spec(Configuration.of("ethos-u55-128", None, None), folder)
    graph = observe(prepared, spec)
    calibrate(graph, [prepared.to_file_layout([x]) for x in images])
    return graph


@pytest.mark.parametrize(
    ("clip", "limits"),
    [(nn.ReLU(), (0, None)), (nn.ReLU6(), (0, 6)), (nn.Hardtanh(), (-1, 1))],
    ids=["relu", "relu6", "hardtanh"],
)
def test_what_is_clipped_at_once_takes_no_codes(
    clip: nn.Module, limits: tuple[int, int | None], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = [3 * torch.randn(1, 3, 8, 8) for _ in range(4)]
    model = Sums(clip)
    graph = calibrated(model, images, tmp_path)
    (name,) = clipped(graph)
    observer = graph.get_submodule(name)
    with torch.no_grad():
        passed = torch.cat([clip(model.conv(x) + x) for x in images])
    assert (float(observer.min_val), float(observer.max_val)) == pytest.approx(
        (float(passed.min()), float(passed.max()))
    )
    assert float(observer.min_val) == limits[0]
    assert limits[1] in (None, float(observer.max_val))
    assert "add" not in observers(graph)


def test_a_scale_in_common_holds_the_others_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = [torch.randn(1, 3, 8, 8) for _ in range(4)]
    model = Joined(nn.ReLU())
    graph = calibrated(model, images, tmp_path)
    (name,) = clipped(graph)
    with torch.no_grad():
        least = min(float(model.conv(x).min()) for x in images)
    assert float(graph.get_submodule(name).min_val) == pytest.approx(least)
