"""BatchNorms that the converter does not fold, or must not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from torchclust.export.rewrites.affine import depthwise
from torchclust.export.rewrites.nodes import Substitute, arguments, identity, operator, source
from torchclust.export.rewrites.traced import Rule, Traced
from torchclust.export.rewrites.transposed import conv_transpose

_Statistics: TypeAlias = tuple[Tensor, Tensor, float, Tensor | None, Tensor | None]
_MOST_SHARED = 256  # values in a tensor, the most clusters there can be
_UNFOLDED = ("conv1d", "conv_transpose1d", "conv_transpose2d")


def fold_batch_norm(traced: Traced, rules: Mapping[str, Rule]) -> None:
    """Fold BatchNorms into 1-D and transposed convolutions where nothing else reads those.

    The converter folds into 2-D convolutions only: not into a 1-D one, which it makes a 2-D one,
    and into a transposed one with a bias of a shape that the quantizer spoils. What a rule makes of
    a 1-D one, it makes of the folded one too.
    """
    for conv, norm in _norms_behind(traced, _UNFOLDED):
        folded = _folded(traced, conv, norm)
        if "transpose" in operator(conv):
            cut = conv_transpose(traced, conv, folded)
            traced.substitutes[conv] = cut or _with_parameters(traced, conv, *folded)
        else:
            ruled = rules[operator(conv)](traced, conv)
            traced.substitutes[conv] = _with_parameters(traced, conv, *folded, ruled)
        traced.substitutes[norm] = identity


def _folded(traced: Traced, conv: fx.Node, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that does what the BatchNorm behind it did.

    A transposed one has its groups side by side along the inputs, so each is folded for itself.
    """
    given, transposed = arguments(conv), "transpose" in operator(conv)
    weight, bias = traced.value(given["weight"]), traced.value(given["bias"])
    assert weight is not None
    groups = given["groups"] if transposed else 1
    mean, variance, eps, scale, shift = _statistics(traced, norm)
    by_channel = [
        [None] * groups if t is None else t.chunk(groups)
        for t in (bias, mean, variance, scale, shift)
    ]
    folded = [
        fuse_conv_bn_weights(w, b, m, v, eps, s, t, transpose=transposed)
        for w, b, m, v, s, t in zip(weight.chunk(groups), *by_channel, strict=True)
    ]
    weights, biases = zip(*folded, strict=True)
    return torch.cat(weights), torch.cat(biases)


def keep_shared_values(traced: Traced) -> None:
    """Make a BatchNorm behind a convolution of shared values a depthwise 1x1 convolution.

    Folded, it would give every output channel values of its own, and a zip archive would find
    little that repeats: 8 bits a weight instead of 5, with 32 values. An int8 file needs none of
    this, because there the factors go into the channels' scales.
    """
    for conv, norm in _norms_behind(traced, ("conv2d", "convolution")):
        weight = traced.value(conv.args[1])
        if weight is not None and _shares_values(weight):
            ones = weight.new_ones(len(weight), 1, 1, 1)
            scale, shift = fuse_conv_bn_weights(ones, None, *_statistics(traced, norm))
            traced.substitutes[norm] = depthwise(traced, scale, shift)


def _with_parameters(
    traced: Traced, conv: fx.Node, weight: Tensor, bias: Tensor, ruled: Substitute | None = None
) -> Substitute:
    """The same convolution with other parameters, or the one that a rule makes of it."""
    new_weight, new_bias, rest = traced.constant(weight), traced.constant(bias), conv.args[3:]
    target = ruled or conv.target
    assert callable(target)
    return lambda x, *_, **kwargs: target(x, new_weight(), new_bias(), *rest, **kwargs)


def _norms_behind(traced: Traced, convolutions: Sequence[str]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """A convolution of constant weight, and the BatchNorm of stored statistics that reads it."""
    for norm in traced.nodes:
        conv = source(norm)
        if operator(norm) != "batch_norm" or conv is None or len(conv.users) > 1:
            continue
        if arguments(norm)["training"] or traced.value(arguments(norm)["running_mean"]) is None:
            continue  # statistics of the batch
        if operator(conv) in convolutions and traced.value(conv.args[1]) is not None:
            yield conv, norm


def _statistics(traced: Traced, norm: fx.Node) -> _Statistics:
    """Mean, variance, eps, weight and bias of a BatchNorm."""
    given = arguments(norm)
    mean, variance = traced.value(given["running_mean"]), traced.value(given["running_var"])
    assert mean is not None
    assert variance is not None
    return mean, variance, given["eps"], traced.value(given["weight"]), traced.value(given["bias"])


def _shares_values(weight: Tensor) -> bool:
    """Whether few values make up a tensor, so that it was clustered, with one codebook for all."""
    return len(weight.unique()) <= min(_MOST_SHARED, weight.numel() // 4)
