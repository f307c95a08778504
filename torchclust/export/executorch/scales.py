"""Telling observers what was trained: weights' scales from codebooks, learned activation ranges.

An observer guesses a weight's scale from its largest value. A channel whose largest code is not 127
so gets another grid than its neighbours, and the layer twice as many codes. Here each observer of a
clustered weight is told the scale of its codes, and the weight becomes their exact multiple.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from torchclust.export.calibration import Sample
from torchclust.export.clustered import Placed
from torchclust.export.codes import LARGEST, Array
from torchclust.export.executorch.clipping import looking_behind
from torchclust.export.executorch.observed import Layer, layers, observers
from torchclust.export.layout import Prepared
from torchclust.export.learned import Learned, learned_values, match_learned
from torchclust.export.quantize import least_scale

# Operators whose result has the scale of what they read, and the sum that stands for an average:
# a range of its own is not missed.
_DERIVED = (
    "permute", "contiguous", "view", "reshape", "flatten", "max_pool2d", "avg_pool2d", "sum"
)  # fmt: skip


@torch.no_grad()
def calibrate(observed: fx.GraphModule, inputs: Iterable[Sequence[Tensor]]) -> None:
    """Run samples, in the file's layout, past the observers."""
    with looking_behind(observed):
        for sample in inputs:
            observed(*sample)


def set_learned(
    observed: fx.GraphModule, model: nn.Module, prepared: Prepared, sample: Sample
) -> Learned | None:
    """Give observers the ranges that the model learned; None if it learned none.

    As in `torchclust.export.learned` values are found by their numbers on one sample.
    """
    values = learned_values(model, prepared, sample)
    if not values:
        return None
    by_name = observers(observed)
    seen = _seen(observed, by_name, prepared.to_file_layout(sample))
    derived = {name for name in seen if name.startswith(_DERIVED)}
    learned = match_learned(values, ((n, x, n in derived) for n, x in seen.items()))
    for name, (low, high) in learned.ranges.items():
        _tell(by_name[name], torch.tensor(low), torch.tensor(high))
    return learned


def set_weights(observed: fx.GraphModule, placed: Sequence[Placed[Layer]]) -> None:
    """Give every weight's observer its scales, and make clustered weights multiples of them.

    Activations must have been observed: a channel that BatchNorm shrank to next to nothing gets a
    scale under which its bias still fits into 32 bits.
    """
    clustered = {id(p.weight.observers[1]): p.matched for p in placed}
    for layer in layers(observed):
        before, observer, after = layer.observers
        matched = clustered.get(id(observer))
        matrix = layer.matrix
        own = np.abs(matrix).max(axis=1) / LARGEST if matched is None else matched.scales
        bias = None if layer.bias is None else layer.bias.detach().numpy()
        scale = np.maximum(own, least_scale(bias, _step(before), _step(after))).astype(np.float32)
        if matched is not None:
            layer.write(scale[:, None] * matched.codes)
        bound = torch.from_numpy(scale) * LARGEST
        _tell(observer, -bound, bound)


def _seen(
    observed: fx.GraphModule, by_name: dict[str, nn.Module], sample: Sequence[Tensor]
) -> dict[str, Array]:
    """What each observed operator makes of a sample."""
    values: dict[str, Array] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name in by_name:
                values[n.name] = result.numpy()
            return result

    with torch.no_grad():
        Watching(observed).run(*sample)
    return values


def _tell(observer: Any, low: Tensor, high: Tensor) -> None:
    """Have a minimum and maximum observer answer for this range."""
    for buffer, value in ((observer.min_val, low), (observer.max_val, high)):
        buffer.resize_(value.shape).copy_(value)


def _step(observer: Any) -> float:
    """The scale that an activation's observer answers with; 0 where nothing is rounded."""
    return 0.0 if observer is None else float(observer.calculate_qparams()[0])
