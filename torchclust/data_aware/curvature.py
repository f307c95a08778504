"""How much the model's outputs mind the error of a layer's weights, channel by channel.

In: a float model, its layers, batches. Out: for each channel of a layer the squared change of the
outputs, per squared error of the channel's own output, when its weights err independently of each
other. That is no matter of single positions: a weight errs alike in all of them, and behind a
pooling such errors add up. So derivatives are taken by the weights, sample by sample, which gives
the diagonal of the Gauss-Newton matrix. One backward pass finds it for all layers, from the
outputs' sum under random signs (Hutchinson 1989). No labels are needed, and nothing needs to be
known of what the outputs mean.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call, tensors_in
from torchclust.data_aware.input_moments import columns, is_single

_ENOUGH = 128  # samples; more change the price of a layer by a few per cent
_AT_ONCE = 1 << 24  # derivatives by weights, or inputs of all positions: 64 MB in float32
_VARIES = 1e-6  # of an input's mean square: less is rounding


def curvatures(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Call],
    centred: Collection[str] = (),
) -> dict[str, Tensor]:
    """Measure the curvature on the first 128 samples or so.

    Args:
        model: float, in eval mode; nothing of it changes.
        modules: Linear layers and convolutions of the model, by name.
        batches: what the model is called with.
        centred: names of those behind which something takes the mean error away.

    Returns:
        `(channels,)` float64 by name, in units of what the outputs vary by in all, without those
        that the outputs do not depend on, or not differentiably.
    """
    signs = torch.Generator().manual_seed(0)
    seen = {name: _Seen(module) for name, module in modules.items()}
    samples = 0
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.backends.cudnn.flags(enabled=False),
    ):
        for call in batches:
            if samples >= _ENOUGH:
                break
            probes: list[Tensor] = []
            with ExitStack() as hooks:
                for name, module in modules.items():
                    note = seen[name].watching(probes)
                    hooks.callback(module.register_forward_hook(note).remove)
                outputs = tensors_in(call.of(model))
            total = sum((_signed(output, signs) for output in outputs), torch.zeros(()))
            if total.requires_grad:
                torch.autograd.grad(total, probes, allow_unused=True)
            samples += len(outputs[0]) if outputs and outputs[0].dim() else 1
    found = {name: s.curvature(samples, centred=name in centred) for name, s in seen.items()}
    return {name: curvature for name, curvature in found.items() if curvature is not None}


class _Sums(NamedTuple):
    """Over samples, all float64; a group's channels and inputs are rows and columns.

    Attributes:
        squares: `(groups, rows)` of the derivatives by the weights, summed over the columns too.
        crossed: `(groups, rows, d)` derivatives by the weights times those by the bias.
        biases: `(groups, rows)` squared derivatives by the bias.
        inputs: `(groups, d)` what the layer is fed, summed over positions too.
        power: `(groups,)` squares of that, summed over the columns too.
        positions: how many those are.
    """

    squares: Tensor
    crossed: Tensor
    biases: Tensor
    inputs: Tensor
    power: Tensor
    positions: Tensor

    def with_more(self, other: _Sums) -> _Sums:
        return _Sums(*(a + b for a, b in zip(self, other, strict=True)))


class _Seen:
    """Sums over what passes one layer, forwards and backwards."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.sums: _Sums | None = None

    def watching(self, probes: list[Tensor]) -> Any:
        """Return a forward hook that makes the output differentiable and watches its gradient."""

        def note(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            probe = output.new_zeros((), requires_grad=True)
            probed = output + probe
            if not probed.requires_grad:  # a model that switches gradients off here
                return None
            probes.append(probe)
            fed, version = args[0].detach(), args[0]._version

            def gradient(slope: Tensor) -> None:
                if fed._version != version:  # changed in place since
                    return
                for sums in _sums(self.module, fed, slope):
                    self.sums = self.sums.with_more(sums) if self.sums else sums

            probed.register_hook(gradient)
            return probed

        return note

    def curvature(self, samples: int, *, centred: bool) -> Tensor | None:
        if self.sums is None:
            return None
        s = self.sums
        mean, power, squares = s.inputs / s.positions, s.power / s.positions, s.squares
        varying = power
        if centred:
            size = mean.square().sum(1)
            varying = power - size
            squares = squares - 2 * (s.crossed @ mean[:, :, None])[:, :, 0]
            squares = (squares + s.biases * size[:, None]).clamp_min(0)
        known = varying > _VARIES * power
        weights = torch.where(known, 1 / varying, torch.zeros_like(varying)) / samples
        return (squares * weights[:, None]).flatten()


def _sums(module: nn.Module, fed: Tensor, slope: Tensor) -> Iterator[_Sums]:
    """Of some samples at a time, from a layer's input and the derivatives by its output.

    Of none where the layer is no plain one, and its output has other positions.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    linear = isinstance(module, nn.Linear)
    if is_single(module, fed):
        fed, slope = fed[None], slope[None]
    groups, d = getattr(module, "groups", 1), weight[0].numel()
    positions = slope.numel() // (len(slope) * len(weight))
    size = max(1, _AT_ONCE // max(weight.numel(), groups * d * positions))
    for part, slopes in zip(fed.split(size), slope.split(size), strict=True):
        x = torch.cat(list(columns(module, part)), 2)
        if x.shape[2] != len(part) * positions:
            return
        by_row = slopes.reshape(len(part), positions, -1).mT if linear else slopes
        g = by_row.float().reshape(len(part), groups, -1, positions)
        by_weight = g @ x.view(groups, d, len(part), positions).permute(2, 0, 3, 1)
        by_bias = g.sum(3)
        found = _Sums(
            by_weight.square().sum((0, 3)),
            torch.einsum("ngr,ngrd->grd", by_bias, by_weight),
            by_bias.square().sum(0),
            x.sum(2),
            x.square().sum((1, 2)),
            torch.tensor(x.shape[2]),
        )
        yield _Sums(*(total.double() for total in found))


def _signed(output: Tensor, signs: torch.Generator) -> Tensor:
    """The sum of an output under random signs, in units of what it varies by in all."""
    drawn = torch.randint(2, output.shape, generator=signs).to(output) * 2 - 1
    spread = output.detach().float().std() if output.numel() > 1 else torch.ones(())
    scale = torch.where(spread > 0, spread, 1).to(output)
    values = output.numel() / (len(output) if output.dim() else 1)
    return (output * drawn / (scale * math.sqrt(values))).sum().cpu()
