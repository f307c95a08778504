"""Cluster a model against its inputs: each layer's output keeps its value, not each weight.

One pass over the layers in execution order. A layer is fitted to what reaches it in the model
clustered so far, and its target is what it gave in the float model, so it makes up for the errors
of the layers before it. What the assignment cannot remove, the mean, goes into the layer's bias or
into the statistics of the BatchNorm behind it; no bias is ever added, and a layer with neither is
fitted to its uncentred inputs.

Blocks (`torchclust.blocks`) keep this cheap: only the block at work is run again for each of its
layers, on its stored inputs. Linear and convolution weights are fitted so; a transposed convolution
is fitted with its inputs' mean squares as importance. Recurrent, attention, embedding and bilinear
weights, tied ones, layers with more than 6144 inputs per output, and layers that the model does not
run are fitted as they would be without inputs.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.blocks import Block, evaluating, find_blocks
from torchclust.compensation import Book, compensate
from torchclust.config import ClusterConfig
from torchclust.input_moments import CONVOLUTIONS, InputMoments
from torchclust.parametrization import fit_weight, make_clustered_weight, relative_error
from torchclust.progress import track
from torchclust.unlabelled import Call, calls

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


@dataclass(frozen=True)
class Fits:
    """What `fit_to_inputs` found.

    Attributes:
        weights: by parameter name, what `torchclust.parametrization.fit_weight` returns.
        corrected: new values of biases and of BatchNorm statistics, by name in the state dict.
    """

    weights: dict[str, dict[str, Tensor]]
    corrected: dict[str, Tensor]


def fit_to_inputs(
    model: nn.Module, twin: nn.Module, layers: Sequence[Layer], inputs: Iterable[Any], seed: int
) -> Fits:
    """Fit every layer; on the way it clusters the copy's weights and corrects its means.

    Args:
        model: the float model, which stays as it is.
        twin: its copy, of which `layers` are a part.
        layers: in any order.
        inputs: unlabelled, see `torchclust.unlabelled.calls`.
        seed: for inits that draw at random.

    Raises:
        ValueError: inputs that cannot be used, or a weight that cannot be clustered.
    """
    batches = calls(model, inputs)
    weights: dict[str, dict[str, Tensor]] = {}
    with evaluating(model, twin), torch.no_grad():
        runs = _layers_run(twin, layers, lambda: batches[0].of(twin))
        holders = [model.get_submodule(layer.path) for layer in layers]
        blocks = find_blocks(model, batches[0], holders)
        plan = [(block, [y for y in runs if _within(y, block) and y.observed]) for block in blocks]
        planned = {layer.name for _, found in plan for layer in found}
        for layer in layers:
            if layer.name not in planned:
                weights[layer.name] = _write(layer, _fit(layer, layer.importance, seed))
        norms = _norms_behind(twin, [y.module for y in layers], lambda: batches[0].of(twin))
        before, after = Side(model, batches), Side(twin, batches)
        for block, found in track(plan, "Fitting codebooks"):
            before.enter(block)
            after.enter(block)
            for layer in found:
                pairs = _inputs_of(layer, before, after)
                weights[layer.name] = _fit_observed(layer, pairs, norms.get(layer.module), seed)
    present, clustered = model.state_dict(), {id(y.weight) for y in layers}
    corrected = {
        name: value.detach()
        for name, value in twin.state_dict(keep_vars=True).items()
        if id(value) not in clustered and name in present and not torch.equal(value, present[name])
    }
    return Fits(weights, corrected)


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
            self.leave()
        self.block = block

    def leave(self) -> None:
        """Replace the stored inputs by the block's outputs, one by one to save memory."""
        assert self.block is not None
        for i, call in enumerate(self.stored):
            self.stored[i] = Call((self.block.run(self.model, call),))


def _within(layer: Layer, block: Block) -> bool:
    return any(f"{layer.path}.".startswith(f"{path}." if path else "") for path in block.paths)


def _layers_run(twin: nn.Module, layers: Sequence[Layer], run: Callable[[], Any]) -> list[Layer]:
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


def _norms_behind(
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


def _inputs_of(layer: Layer, before: Side, after: Side) -> Iterator[tuple[Tensor, Tensor]]:
    """What reaches the layer in the float model and in the clustered one, batch by batch."""
    modules = before.model.get_submodule(layer.path), layer.module
    for calls_of_batch in zip(before.stored, after.stored, strict=True):
        seen: list[list[Tensor]] = []
        for side, module, call in zip((before, after), modules, calls_of_batch, strict=True):
            inputs: list[Tensor] = []
            note = functools.partial(_note_input, inputs)
            handle = module.register_forward_pre_hook(note)
            try:
                assert side.block is not None
                side.block.run(side.model, call)
            finally:
                handle.remove()
            seen.append(inputs)
        yield from zip(*seen, strict=True)


def _note_input(inputs: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0].detach().clone())


def _fit_observed(
    layer: Layer, pairs: Iterable[tuple[Tensor, Tensor]], norm: nn.Module | None, seed: int
) -> dict[str, Tensor]:
    if not layer.compensates:
        return _write(layer, _fit(layer, _by_input_channel(layer, pairs), seed))
    moments = InputMoments.of(layer.module, pairs)
    weight = layer.weight.detach().clone()
    absorbs = norm is not None or isinstance(layer.module._parameters.get("bias"), Tensor)
    row_weight = _row_weight(layer, norm)
    targets = moments.targets(weight, row_weight, centred=absorbs)
    columns = torch.cat([t.hessian.diagonal().expand(t.pull.shape[1], -1) for t in targets])
    importance = (columns * row_weight[:, None]).view(weight.shape)
    tensors = _fit(layer, importance, seed)
    book = _book(layer, tensors)
    zeros = (weight == 0).flatten(1).T if layer.config.preserve_sparsity else None
    book, indices = compensate(targets, book, zeros)
    tensors = _write(
        layer, _with_book(layer, tensors, book, indices.T.contiguous().view(weight.shape))
    )
    if absorbs:
        _absorb(layer.module, norm, moments, weight)
    return tensors


def _absorb(
    module: nn.Module, norm: nn.Module | None, moments: InputMoments, weight: Tensor
) -> None:
    """Make the mean error of the output 0, per channel, on the inputs seen.

    A bias takes it. Without one the BatchNorm does, and the best gain as well: its statistics
    become those under which it gives what it gave for the float layer's output.
    """
    clustered = module.weight
    assert isinstance(clustered, Tensor)
    shift = moments.shift(clustered, weight)
    bias = module._parameters.get("bias")
    if bias is not None:
        bias.sub_(shift.to(bias.dtype))
        return
    assert isinstance(norm, _BatchNorm)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    gain = moments.gain(clustered, weight)
    spread = (variance.double() + norm.eps) / gain.square() - norm.eps
    gain = torch.where(spread > 0, gain, 1)
    now = moments.output(clustered, moments.z)
    mean.copy_(now - (now - shift - mean.double()) / gain)
    variance.copy_(torch.where(spread > 0, spread, variance.double()))


def _row_weight(layer: Layer, norm: nn.Module | None) -> Tensor:
    """`(rows,)` float32, mean 1: by what factor the squared error of each channel goes on."""
    rows = torch.ones(len(layer.weight), device=layer.weight.device)
    if isinstance(norm, _BatchNorm) and norm.running_var is not None:
        gamma = 1.0 if norm.weight is None else norm.weight.float().square()
        rows = rows * gamma / (norm.running_var.float() + norm.eps)
    if layer.importance is not None:
        rows = rows * layer.importance.detach().float().flatten(1).mean(1).to(rows)
    if not rows.sum() > 0:
        return torch.ones_like(rows)
    return (rows / rows.mean()).clamp_min(1e-4)


def _book(layer: Layer, tensors: Mapping[str, Tensor]) -> Book:
    """The fitted codebook as `compensate` takes it."""
    fitted = make_clustered_weight(layer.config, tensors, channel_dim=layer.channel_dim)
    trained = tensors["original" if layer.config.assignment == "fixed" else "centroids"]
    values = torch.atleast_2d(fitted._codebook(trained).detach().float())
    channels = torch.arange(len(layer.weight), device=values.device)
    size = {"tensor": len(channels), "channel": 1, "group": layer.config.group_size or 1}
    scale = fitted.scale()
    pinned = tensors.get("zero_mask")
    return Book(
        values=values,
        row_book=channels // size[layer.config.granularity],
        scale=None if scale is None else scale.detach().float(),
        pinned=torch.zeros_like(values, dtype=torch.bool)
        if pinned is None
        else torch.atleast_2d(pinned),
    )


def _with_book(
    layer: Layer, tensors: Mapping[str, Tensor], book: Book, indices: Tensor
) -> dict[str, Tensor]:
    """The fitted tensors with another codebook and other indices (of the weight's shape)."""
    fixed, found = layer.config.assignment == "fixed", dict(tensors)
    trained = "original" if fixed else "centroids"
    values, dtype = book.values, layer.weight.dtype
    if book.scale is not None:
        values = values * tensors["unit"].float()
        found["relative_scale"] = (book.scale / tensors["unit"].float()).to(dtype)
    found[trained] = values.reshape(tensors[trained].shape).to(dtype)
    if "zero_mask" in tensors:
        found["zero_mask"] = book.pinned.reshape(tensors["zero_mask"].shape)
    if fixed:
        found["indices"] = indices.to(torch.uint8)
    else:
        found["original"] = _into_cells(layer.weight, book.table(), indices)
    return found


def _into_cells(weight: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """The weight, moved no further than it takes for its nearest values to be those chosen."""
    rows, flat = weight.detach().float().flatten(1), indices.flatten(1)
    middle = (table[:, 1:] + table[:, :-1]) / 2
    ends = torch.full_like(table[:, :1], torch.inf)
    low = torch.cat([-ends, middle], 1).gather(1, flat)
    high = torch.cat([middle, ends], 1).gather(1, flat)
    value = table.gather(1, flat)
    low, high = (low + value) / 2, (high + value) / 2
    inside = torch.where(rows < low, low, torch.where(rows > high, high, rows))
    return inside.reshape(weight.shape).to(weight.dtype)


def _by_input_channel(layer: Layer, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Importance of a transposed convolution's weight: the mean square of each input channel."""
    total, count = torch.zeros(len(layer.weight), device=layer.weight.device), 0
    for _, z in pairs:
        spatial = z.dim() - (layer.weight.dim() - 2)  # behind the channels
        by_channel = z.float().square().transpose(0, spatial - 1).flatten(1)
        total, count = total + by_channel.sum(1), count + by_channel.shape[1]
    weights = (total / max(1, count)).view(-1, *[1] * (layer.weight.dim() - 1))
    given = torch.ones_like(layer.weight) if layer.importance is None else layer.importance
    return given.to(weights) * weights


def _fit(layer: Layer, importance: Tensor | None, seed: int) -> dict[str, Tensor]:
    try:
        return fit_weight(
            layer.weight,
            layer.config,
            channel_dim=layer.channel_dim,
            importance=importance,
            seed=seed,
        )
    except ValueError as error:
        kind = type(layer.module).__name__
        raise ValueError(f"cannot cluster {layer.name!r} ({kind}): {error}") from None


def _write(layer: Layer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the clustered weight into the copy, and note how far it is from the float one."""
    fitted = make_clustered_weight(layer.config, tensors, channel_dim=layer.channel_dim)
    clustered = fitted(tensors["original"]).detach()
    error = relative_error(layer.weight.detach(), clustered)
    layer.weight.data = clustered.clone()
    return {**tensors, "fit_error": error}
