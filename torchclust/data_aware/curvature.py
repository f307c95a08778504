"""How much the model's outputs mind the error of a layer's output, channel by channel.

In: a float model, its layers, batches. Out: for each layer the mean squared derivative of the
outputs, which is the diagonal of the Gauss-Newton matrix (of half the squared change of the
outputs). One backward pass finds it for all layers, from the outputs' sum under random signs: its
squared derivative has that diagonal as its mean (Hutchinson 1989). No labels are needed, and
nothing needs to be known of what the outputs mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchclust.data_aware.batches import Call, tensors_in
from torchclust.data_aware.input_moments import CONVOLUTIONS

_ENOUGH = 128  # samples; more change the price of a layer by a few per cent


@dataclass(frozen=True, eq=False)
class Curvature:
    """Of one layer's output, by channel.

    Attributes:
        squares: `(channels,)` float64, squared derivatives of the outputs, summed over positions.
        variance: `(channels,)` float64, of the layer's output over samples and positions.
    """

    squares: Tensor
    variance: Tensor

    @property
    def power(self) -> float:
        """What the layer's whole output is worth."""
        return float((self.squares * self.variance).sum())


def curvatures(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Call]
) -> dict[str, Curvature]:
    """Measure the curvature at the outputs of `modules`, on the first 128 samples or so.

    Args:
        model: float, in eval mode; nothing of it changes.
        modules: Linear layers and convolutions of the model, by name.
        batches: what the model is called with.

    Returns:
        By name, without those that the outputs do not depend on, or not differentiably.
    """
    signs = torch.Generator().manual_seed(0)
    seen = {name: _Seen() for name in modules}
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
    found = {name: s.curvature(samples) for name, s in seen.items()}
    return {name: curvature for name, curvature in found.items() if curvature is not None}


class _Seen:
    """Sums over what passes one layer, forwards and backwards."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # positions, values, their squares, those of slopes

    def watching(self, probes: list[Tensor]) -> Any:
        """Return a forward hook that makes the output differentiable and watches its gradient."""

        def note(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return None
            probe = output.new_zeros((), requires_grad=True)
            probed = output + probe
            if not probed.requires_grad:  # a model that switches gradients off here
                return None
            probes.append(probe)
            rows = _by_channel(module, output.detach())
            count = torch.full_like(rows[:, 0], rows.shape[1])
            moments = count, rows.sum(1), rows.square().sum(1)

            def gradient(slope: Tensor) -> None:
                sums = torch.stack([*moments, _by_channel(module, slope).square().sum(1)])
                self.sums = sums if self.sums is None else self.sums + sums

            probed.register_hook(gradient)
            return probed

        return note

    def curvature(self, samples: int) -> Curvature | None:
        if self.sums is None:
            return None
        count, total, squared, slopes = self.sums
        variance = (squared / count - (total / count).square()).clamp_min(0)
        return Curvature(slopes / samples, variance)


def _signed(output: Tensor, signs: torch.Generator) -> Tensor:
    """The sum of an output under random signs, in units of its own spread."""
    drawn = torch.randint(2, output.shape, generator=signs).to(output) * 2 - 1
    spread = output.detach().float().std() if output.numel() > 1 else torch.ones(())
    scale = torch.where(spread > 0, spread, 1).to(output)
    return (output * drawn / scale).sum().cpu()


def _by_channel(module: nn.Module, output: Tensor) -> Tensor:
    """`(channels, n)` float64 of a Linear layer's or a convolution's output."""
    if isinstance(module, nn.Linear):
        return output.reshape(-1, output.shape[-1]).T.double()
    assert isinstance(module, CONVOLUTIONS)
    batched = output if output.dim() == module.weight.dim() else output[None]
    return batched.transpose(0, 1).flatten(1).double()
