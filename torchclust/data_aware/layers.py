"""A layer that is fitted: where it runs, which norm follows it, what it sees before and after."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.data_aware.batches import Call
from torchclust.data_aware.blocks import Block, first_call
from torchclust.data_aware.input_moments import CONVOLUTIONS
from torchclust.weight.config import ClusterConfig

_WIDEST = 6144  # inputs per output: a second moment of 300 MB

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """One weight to fit: of a module of the copy that is clustered on the way.

    Attributes:
        name: the parameter's.
        path: the module's.
        module: in the copy; its tensor is a plain parameter.
        tensor_name: of the module.
        config: how to cluster it.
        channel_dim: the output channels' dimension.
        importance: of the weight's shape, or None.
        tied: whether other modules share the tensor.
    """

    name: str
    path: str
    module: nn.Module
    tensor_name: str
    config: ClusterConfig
    channel_dim: int
    importance: Tensor | None
    tied: bool

    @property
    def weight(self) -> Tensor:
        """The copy's parameter: the float weight, then the clustered one."""
        found = getattr(self.module, self.tensor_name)
        assert isinstance(found, Tensor)
        return found

    @property
    def compensates(self) -> bool:
        """Whether output errors can be told from second moments of the layer's inputs."""
        matrix = isinstance(self.module, (nn.Linear, *CONVOLUTIONS))
        return self.observed and matrix and self.weight[0].numel() <= _WIDEST

    @property
    def observed(self) -> bool:
        """Whether the layer's inputs say anything about the error of its weight."""
        known = isinstance(self.module, (nn.Linear, *CONVOLUTIONS, *_TRANSPOSED))
        return known and self.tensor_name == "weight" and not self.tied


class Side:
    """A model's stored inputs of the block at work, one `Call` for every batch."""

    def __init__(self, model: nn.Module, batches: Sequence[Call]) -> None:
        self.model, self.batches = model, batches
        self.stored: list[Call] = []
        self.block: Block | None = None

    def enter(self, block: Block) -> None:
        """Go on to a block: through the one before it, or from the model's inputs."""
        if self.block is None or not block.chained:
            self.stored = [block.input_of(self.model, call) for call in self.batches]
        else:
            for i, call in enumerate(self.stored):  # one by one, to save memory
                self.stored[i] = block.fed(self.block.run(self.model, call))
        self.block = block


def within(layer: Layer, block: Block) -> bool:
    """Whether the layer runs inside the block."""
    return any(f"{layer.path}.".startswith(f"{path}." if path else "") for path in block.paths)


def layers_run(twin: nn.Module, layers: Sequence[Layer], run: Callable[[], Any]) -> list[Layer]:
    """The layers that a forward pass calls, by their first call."""
    of = {id(layer.module): layer for layer in layers}
    order: dict[str, Layer] = {}

    def note(module: nn.Module, args: Any) -> None:
        for layer in layers:
            if layer.module is module:
                order.setdefault(layer.name, layer)

    with ExitStack() as hooks:
        for layer in of.values():
            hooks.callback(layer.module.register_forward_pre_hook(note).remove)
        run()
    return list(order.values())


def norms_behind(
    model: nn.Module, modules: Sequence[nn.Module], run: Callable[[], Any]
) -> dict[nn.Module, nn.Module]:
    """The BatchNorm that takes a module's output as it is, where both run once."""
    made: list[tuple[Tensor, int, nn.Module]] = []
    found: list[tuple[nn.Module, nn.Module]] = []

    def note(module: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            made.append((out, out._version, module))

    def match(norm: nn.Module, args: Any) -> None:
        found.extend((m, norm) for out, v, m in made if out is args[0] and v == args[0]._version)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(note).remove)
        for norm in model.modules():
            if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                hooks.callback(norm.register_forward_pre_hook(match).remove)
        run()
    calls_of = Counter(module for _, _, module in made)
    uses_of = Counter(norm for _, norm in found)
    return {m: norm for m, norm in found if calls_of[m] == 1 and uses_of[norm] == 1}


def inputs_of(layer: Layer, before: Side, after: Side) -> Iterator[tuple[Tensor, Tensor]]:
    """What reaches the layer in the float model and in the clustered one, batch by batch.

    A layer that runs once on the first batch is taken to do so on all: the block runs no further.
    """
    sides = (before, before.model.get_submodule(layer.path)), (after, layer.module)
    once = False
    for calls_of_batch in zip(before.stored, after.stored, strict=True):
        inputs = [
            _inputs_in(side, module, call, once)
            for (side, module), call in zip(sides, calls_of_batch, strict=True)
        ]
        once = once or len(inputs[0]) == 1
        yield from zip(*inputs, strict=True)


def _inputs_in(side: Side, module: nn.Module, call: Call, once: bool) -> list[Tensor]:
    """What the block at work, called so, calls the module with."""
    assert side.block is not None
    run = functools.partial(side.block.run, side.model, call)
    if once:
        return [first_call(module, run).args[0]]
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(functools.partial(_note_input, inputs))
    try:
        run()
    finally:
        handle.remove()
    return inputs


def _note_input(inputs: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0].detach().clone())
