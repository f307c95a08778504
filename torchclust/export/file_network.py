"""A file in the place of the network that it was made from.

In: what that network is called with, a batch. Out: what it would have returned, computed sample by
sample by the file. So whatever judges the network judges its file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from torchclust.data_aware.blocks import evaluating
from torchclust.export.layout import channels_first, channels_last
from torchclust.export.runner import Runner
from torchclust.export.tflite import TFLiteExport


class FileNetwork:
    """Calls a file as the network that it was made from is called.

    Args:
        run: runs the file on one sample in its own layout, an array or tensor for each output.
        channels_last: per input, and per output, whether the file's has its channels last.
        network: the network; says in which structure outputs come.
        inputs: a few samples, one tensor per input.
    """

    def __init__(
        self,
        run: Callable[[tuple[Tensor, ...]], Sequence[Any]],
        channels_last: tuple[tuple[bool, ...], tuple[bool, ...]],
        network: nn.Module,
        inputs: Sequence[Tensor],
    ) -> None:
        self._run = run
        self._moved_inputs, self._moved_outputs = channels_last
        with evaluating(network), torch.no_grad():
            outputs = network(*(value[:1] for value in inputs))
        self._leaves, self._structure = tree_flatten(outputs)

    def __call__(self, *inputs: Tensor) -> Any:
        """Return a batch of outputs, on the inputs' device."""
        moved = self._moved_inputs
        columns = [
            (channels_last(x) if m else x).detach().cpu()
            for x, m in zip(inputs, moved, strict=True)
        ]
        rows = [self._run(row) for row in zip(*(x.split(1) for x in columns), strict=True)]
        outputs = [torch.cat([torch.as_tensor(y) for y in ys]) for ys in zip(*rows, strict=True)]
        found = iter(zip(outputs, self._moved_outputs, strict=True))
        leaves = [
            self._like(leaf, *next(found), inputs[0].device) if isinstance(leaf, Tensor) else leaf
            for leaf in self._leaves
        ]
        return tree_unflatten(leaves, self._structure)

    def _like(self, leaf: Tensor, output: Tensor, moved: bool, device: torch.device) -> Tensor:
        placed = channels_first(output) if moved else output
        return placed.to(device, leaf.dtype)


def of_tflite(export: TFLiteExport, network: nn.Module, inputs: Sequence[Tensor]) -> FileNetwork:
    """Put a .tflite file in its network's place.

    On one thread of LiteRT's fast kernels: the reference kernels, which equal the
    microcontroller's to the bit, take minutes for 10,000 images, and single small images gain
    nothing from more threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where Runner takes its number from
    try:
        run = Runner(export.path.read_bytes(), reference=False)
    finally:
        torch.set_num_threads(threads)
    return FileNetwork(run, export.channels_last, network, inputs)
