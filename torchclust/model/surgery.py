"""Swapping a lookup in for a plain parameter, and a plain parameter for a lookup."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torchclust.model.places import clustered_weight, parametrizations_of, trains
from torchclust.model.slots import Slot
from torchclust.weight.clustered import ClusteredWeight
from torchclust.weight.config import ClusterConfig
from torchclust.weight.parametrization import make_clustered_weight


def make_for(slot: Slot, config: ClusterConfig, tensors: Mapping[str, Tensor]) -> ClusteredWeight:
    """Return the lookup of a slot from its fitted tensors."""
    return make_clustered_weight(
        config,
        tensors,
        channel_dim=slot.channel_dim,
        requires_grad=trains(slot.module, slot.tensor_name),
    )


def attach(slot: Slot, clustered: ClusteredWeight) -> None:
    """Put a lookup in every place where the slot's tensor stands."""
    make_plain(slot.places)
    for module, name in slot.places:
        _give_class_of_its_own(module)
        order = _parameter_order(module)
        module._parameters[name].grad = None  # type: ignore[union-attr]  # of the old shape
        parametrize.register_parametrization(module, name, clustered, unsafe=True)
        module.parametrizations[name].parameter_order = order  # type: ignore[index, union-attr]
        _refuse_pruning(module)
        if isinstance(module, nn.RNNBase):
            _look_up_flat_weights(module)
    clustered.first_original = None


def _parameter_order(module: nn.Module) -> tuple[str, ...]:
    """The module's parameters as they stood before the first of them was clustered."""
    for holder in parametrizations_of(module).values():
        if hasattr(holder, "parameter_order"):
            return holder.parameter_order  # type: ignore[return-value]
    return tuple(module._parameters)


def make_plain(places: Sequence[tuple[nn.Module, str]]) -> None:
    """Undo what computes a tensor now, keeping its value: pruning, weight_norm, clustering.

    Of a tied tensor in all its places, which share what it is computed from.
    """
    if clustered_weight(*places[0]) is not None:
        with torch.no_grad():
            value = getattr(*places[0]).detach().clone()
        for module, name in places:
            detach(module, name, value)
        return
    for module, name in places:
        if name in parametrizations_of(module):
            _give_class_of_its_own(module)
            parametrize.remove_parametrizations(module, name)
        elif name not in module._parameters and name + "_mask" in module._buffers:
            prune.remove(module, name)
        elif name not in module._parameters:
            nn.utils.remove_weight_norm(module, name)


def _give_class_of_its_own(module: nn.Module) -> None:
    """Part a parametrized module from its deep copies, which have its very class.

    torch keeps a property for each parametrized tensor there: one that is added or removed for a
    copy would be added to, or missing from, the original as well.
    """
    if parametrizations_of(module):
        made = type(module)
        module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))


def detach(module: nn.Module, name: str, value: Tensor) -> None:
    """Take our parametrization off and leave a plain parameter, the very one that was clustered.

    Not torch's ``remove_parametrizations``: that leaves the parameter last among its siblings,
    which reorders every optimizer and state dict built from then on.
    """
    holder = parametrizations_of(module)[name]
    parameter, order = holder.original, holder.parameter_order
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(order, tuple)
    if parameter.shape != value.shape:
        _forget_shape(parameter)
    parameter.data = value
    remaining = {n: p for n, p in parametrizations_of(module).items() if n != name}
    if remaining:
        _give_class_of_its_own(module)
        delattr(type(module), name)
        del module.parametrizations[name]  # type: ignore[operator, union-attr]
    else:
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
    module.register_parameter(name, parameter)
    for sibling in [n for n in order if n in module._parameters]:
        module._parameters[sibling] = module._parameters.pop(sibling)
    if isinstance(module, nn.RNNBase) and not remaining:
        module._init_flat_weights()


def _forget_shape(parameter: nn.Parameter) -> None:
    """Let a parameter take another shape while a loss of the old one is still alive.

    That loss keeps the parameter's gradient accumulator, which knows the old shape and would refuse
    gradients of the new one; autograd makes another where data of another dtype came in between.
    """
    parameter.grad = None
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.new_empty(0, dtype=other)


def _look_up_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent module's kernels read the lookups instead of the list it keeps of them.

    `nn.RNNBase` caches its parameters in ``_flat_weights`` and packs them for cuDNN; of a computed
    weight both would be stale after one step. The overrides live in the parametrized class, so
    `strip_` takes them away with it.
    """

    held = threading.local()  # torch's `parametrize.cached` is one for all threads

    def flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
        weights: list[Tensor | None] | None = getattr(held, "weights", None)
        if weights is None:
            return [getattr(self, name, None) for name in self._flat_weights_names]
        return weights

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # it sees by itself that they are the same
            return base.forward(self, *args, **kwargs)
        held.weights = flat_weights(self)  # they are read more than once a call
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            held.weights = None

    def nothing(self: nn.RNNBase) -> None:
        """There is no packed copy to keep up to date."""

    cls: Any = type(module)  # made by torch for this module alone
    base: Any = cls.__bases__[0]
    cls._flat_weights = property(flat_weights, lambda self, value: None)
    cls._update_flat_weights = cls.flatten_parameters = nothing
    cls.forward = forward
    module.__dict__.pop("_flat_weights", None)


def _refuse_pruning(module: nn.Module) -> None:
    """Let `torch.nn.utils.prune` say one clear line of a tensor that is clustered.

    It would store the looked-up weight as a parameter of its own, and fail on not finding the one
    that it replaces.
    """
    cls: Any = type(module)  # made by torch for this module alone
    base: Any = cls.__bases__[0]

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        pruned = name.removesuffix("_orig")
        own = clustered_weight(self, pruned) if pruned != name else None
        if own is not None:
            k = own.config.n_clusters
            raise ValueError(
                f"{pruned!r} of this {base.__name__} is clustered, and cannot be pruned any more: "
                f"prune first, then  cluster_(model, {k}, preserve_sparsity=True)"
            )
        base.register_parameter(self, name, param)

    cls.register_parameter = register_parameter
