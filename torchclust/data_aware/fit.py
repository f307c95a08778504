"""Cluster a model against its inputs: each layer's output keeps its value, not each weight.

One pass over the layers in execution order. A layer is fitted to what reaches it in the model
clustered so far, and its target is what it gave in the float model, so it makes up for the errors
of the layers before it. What the assignment cannot remove, the mean, goes into the layer's bias or
into the statistics of the BatchNorm behind it; no bias is ever added, and a layer with neither is
fitted to its uncentred inputs.

Blocks (`torchclust.data_aware.blocks`) keep this cheap: only the block at work is run again for
each of its layers, on its stored inputs. Linear and convolution weights are fitted so; a transposed
convolution is fitted with its inputs' mean squares as importance. Recurrent, attention, embedding
and bilinear weights, tied ones, layers with more than 6144 inputs per output, and layers that the
model does not run are fitted as they would be without inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from torchclust.data_aware.batches import calls
from torchclust.data_aware.bit_prices import (
    BitPrice,
    bit_prices,
    effective_rate,
    variance_per_weight,
)
from torchclust.data_aware.blocks import evaluating, find_blocks
from torchclust.data_aware.compensation import Book, compensate
from torchclust.data_aware.input_moments import InputMoments
from torchclust.data_aware.layers import Layer, Side, inputs_of, layers_run, norms_behind, within
from torchclust.fitting.worth import without_noise
from torchclust.progress import track
from torchclust.weight.codebooks import relative_error
from torchclust.weight.parametrization import fit_weight, make_clustered_weight


@dataclass(frozen=True)
class Fits:
    """What `fit_to_inputs` found.

    Attributes:
        weights: by parameter name, what `torchclust.weight.parametrization.fit_weight` returns.
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
        inputs: unlabelled, see `torchclust.data_aware.batches.calls`.
        seed: for inits that draw at random.

    Raises:
        ValueError: inputs that cannot be used, or a weight that cannot be clustered.
    """
    batches = calls(model, inputs)
    weights: dict[str, dict[str, Tensor]] = {}
    with evaluating(model, twin), torch.no_grad():
        runs = layers_run(twin, layers, lambda: batches[0].of(twin))
        holders = [model.get_submodule(layer.path) for layer in layers]
        blocks = find_blocks(model, batches[0], holders)
        plan = [(block, [y for y in runs if within(y, block) and y.observed]) for block in blocks]
        planned = {layer.name for _, found in plan for layer in found}
        for layer in layers:
            if layer.name not in planned:
                weights[layer.name] = _write(layer, _fit(layer, layer.importance, seed))
        norms = norms_behind(twin, [y.module for y in layers], lambda: batches[0].of(twin))
        observed = [layer for _, found in plan for layer in found]
        centred = {y.name for y in observed if _absorbs(y, norms.get(y.module))}
        prices = bit_prices(model, observed, batches, centred)
        before, after = Side(model, batches), Side(twin, batches)
        for block, found in track(plan, "Fitting codebooks"):
            before.enter(block)
            after.enter(block)
            for layer in found:
                pairs = inputs_of(layer, before, after)
                norm, price = norms.get(layer.module), prices.get(layer.name)
                weights[layer.name] = _fit_observed(layer, pairs, norm, price, seed)
    present, clustered = model.state_dict(), {id(y.weight) for y in layers}
    corrected = {
        name: value.detach()
        for name, value in twin.state_dict(keep_vars=True).items()
        if id(value) not in clustered and name in present and not torch.equal(value, present[name])
    }
    return Fits(weights, corrected)


def _fit_observed(
    layer: Layer,
    pairs: Iterable[tuple[Tensor, Tensor]],
    norm: nn.Module | None,
    price: BitPrice | None,
    seed: int,
) -> dict[str, Tensor]:
    if not layer.compensates:
        return _write(layer, _fit(layer, _by_input_channel(layer, pairs), seed))
    moments = InputMoments.of(layer.module, pairs)
    weight = layer.weight.detach().clone()
    absorbs = _absorbs(layer, norm)
    row_weight = _row_weight(layer, norm)
    kept = without_noise(weight, moments.by_column(moments.spread(absorbs), row_weight, weight))
    layer.weight.data = kept
    if price is not None:
        row_weight = _by_importance(layer, price.curvature.float())
    row_weight = row_weight.clamp_min(1e-4)
    alive = kept.flatten(1).any(1).view(-1, *[1] * (weight.dim() - 1))
    targets = moments.targets(weight * alive, row_weight, centred=absorbs, anchor=kept)
    columns = torch.stack([t.hessian.diagonal() for t in targets])
    zeros = (kept == 0) & (layer.config.preserve_sparsity | (weight != 0) | ~alive)
    variance = variance_per_weight(targets, kept) if layer.config.rate else 0.0
    rate = effective_rate(layer, price, variance, moments, centred=absorbs)
    tensors = _fit_at(layer, rate, moments.by_column(columns, row_weight, weight), seed)
    start = _fitted_indices(layer, tensors).flatten(1).T if rate else None
    book, indices = compensate(
        targets, _book(layer, tensors), zeros.flatten(1).T, rate * variance, start
    )
    tensors = _with_book(layer, tensors, book, indices.T.contiguous().view(weight.shape))
    layer.weight.data = weight.clone()
    tensors = _write(layer, tensors)
    if absorbs:
        _absorb(layer.module, norm, moments, weight)
    return tensors


def _fit_at(layer: Layer, rate: float, importance: Tensor, seed: int) -> dict[str, Tensor]:
    """Fit at a rate that need not be the configuration's, which is what training will charge."""
    tensors = _fit(replace(layer, config=replace(layer.config, rate=rate)), importance, seed)
    if "bit_price" in tensors:
        tensors["bit_price"] = tensors["bit_price"] * (layer.config.rate / rate)
    return tensors


def _fitted_indices(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    fitted = make_clustered_weight(layer.config, tensors, channel_dim=layer.channel_dim)
    return fitted.indices_of(tensors["original"]).long()


def _absorbs(layer: Layer, norm: nn.Module | None) -> bool:
    """Whether something behind the layer takes its mean error away."""
    return norm is not None or isinstance(layer.module._parameters.get("bias"), Tensor)


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
    return _by_importance(layer, rows)


def _by_importance(layer: Layer, rows: Tensor) -> Tensor:
    """Channels' weights with what the caller said of them, mean 1."""
    if layer.importance is not None:
        rows = rows * layer.importance.detach().float().flatten(1).mean(1).to(rows)
    if not rows.sum() > 0:
        return torch.ones_like(rows)
    return rows / rows.mean()


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
        if "price_share" in found:  # until training charges them, weights stay in these cells
            found["price_share"] = torch.zeros_like(found["price_share"])
            found["members"] = _members(layer, found)
    return found


def _members(layer: Layer, tensors: Mapping[str, Tensor]) -> Tensor:
    """How many weights each centroid has got: what charging begins with."""
    fitted = make_clustered_weight(layer.config, tensors, channel_dim=layer.channel_dim)
    latent, codebook = tensors["original"], fitted._codebook(tensors["centroids"])
    return fitted.members_of(fitted._indices(latent, codebook), codebook).detach().float()


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
