"""Clustering a whole model in place: choose the tensors, fit them all, then swap them in.

Order matters for safety. `cluster_` first resolves every rule, then fits every codebook, and only
then touches the model, so whatever goes wrong (a NaN in the fifth tensor, a misspelt pattern)
leaves the model exactly as it was.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from torchclust.activations import match_quantized_, remove_quantized_activations_
from torchclust.config import (
    TOO_SMALL,
    Candidate,
    ClusterConfig,
    Decision,
    Rules,
    reaches,
    resolve_rules,
)
from torchclust.data_aware import Layer, fit_to_inputs
from torchclust.parametrization import (
    ClusteredWeight,
    config_from_bytes,
    fit_weight,
    make_clustered_weight,
)
from torchclust.progress import track

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_CONV_TRANSPOSE)
_CLUSTERABLE: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, *_CONV), r"weight"),
    ((nn.RNNBase, nn.RNNCellBase), r"weight_(ih|hh).*"),
    ((nn.MultiheadAttention,), r"(in|q|k|v)_proj_weight"),
)
"""By default: these modules' tensors whose whole name matches. Attention's out-projection is a
Linear of its own."""

_CONFIG_KEY = re.compile(r"(?:(?P<path>.+)\.)?parametrizations\.(?P<name>[^.]+)\.0\.config_json")


@dataclass(frozen=True)
class Clustering:
    """One clustered tensor of a model, seen live: attributes read the present state.

    Attributes:
        module: the module that owns the tensor (the first, where it is tied).
        tensor_name: its attribute there, for example ``"weight"``.

    Example:
        >>> model = cluster_(torch.nn.Linear(64, 64), 4, codebook_dtype="int8")
        >>> ((name, clustering),) = named_clusterings(model)
        >>> name, clustering.n_clusters, clustering.indices.shape, clustering.scale.shape
        ('weight', 4, torch.Size([64, 64]), torch.Size([64]))
        >>> len(clustering.codes)  # -m, 0, m
        3
    """

    module: nn.Module
    tensor_name: str

    @property
    def config(self) -> ClusterConfig:
        """How the tensor is clustered."""
        return self._parametrization.config

    @property
    def n_clusters(self) -> int:
        """Most distinct values per codebook."""
        return self.config.n_clusters

    @property
    def centroids(self) -> Tensor:
        """The trained codebook: ``(k,)``, or ``(codebooks, k)`` by channel or group.

        For an int8 codebook the positive magnitudes in the weight's own units; `codes` has the
        integers.
        """
        return self._parametrization.trained(self._original)

    @property
    def indices(self) -> Tensor:
        """Which centroid each weight has, ``uint8``, the weight's shape.

        Positions in the codebook: for int8 in the mirrored one (``-codes, 0, codes``). With
        ``assignment="nearest"`` they are those of this moment, in ascending order of centroids.
        """
        return self._parametrization.indices_of(self._original)

    @property
    def scale(self) -> Tensor | None:
        """The positive scale per output channel of an int8 codebook; None for a float one."""
        scale = self._parametrization.scale()
        return None if scale is None else scale.detach()

    @property
    def codes(self) -> Tensor | None:
        """The int8 codebook, ascending ``int8``; None for a float one."""
        return self._parametrization.codes(self._original)

    @property
    def latent(self) -> Tensor | None:
        """The weight that trains behind a "nearest" lookup; None with "fixed"."""
        return self._original.detach() if self.config.assignment == "nearest" else None

    @property
    def value(self) -> Tensor:
        """The weight, detached; unlike the module's attribute it is not kept for the next time."""
        with torch.no_grad():
            return self._parametrization.value(self._original)

    @property
    def fit_error(self) -> float:
        """``||weight - clustered|| / ||weight||`` when the codebook was fitted."""
        return float(self._parametrization.get_buffer("fit_error"))

    @property
    def channel_dim(self) -> int:
        """The weight's output-channel dimension: 1 for ConvTranspose, else 0."""
        return self._parametrization.channel_dim

    @property
    def _parametrization(self) -> ClusteredWeight:
        found = _parametrization(self.module, self.tensor_name)
        assert found is not None, f"{self.tensor_name} was stripped"
        return found

    @property
    def _original(self) -> Tensor:
        original = _parametrizations(self.module)[self.tensor_name].original
        assert isinstance(original, Tensor)
        return original


@dataclass(frozen=True)
class _Slot:
    """A parameter tensor and the places where it stands: one, or several where it is tied."""

    places: tuple[tuple[nn.Module, str], ...]
    candidate: Candidate

    @property
    def module(self) -> nn.Module:
        return self.places[0][0]

    @property
    def tensor_name(self) -> str:
        return self.places[0][1]

    @property
    def channel_dim(self) -> int:
        return 1 if isinstance(self.module, _CONV_TRANSPOSE) else 0

    def value(self) -> Tensor:
        """What is clustered: the weight, or, behind a "nearest" lookup, the weight that trains."""
        own = _parametrization(self.module, self.tensor_name)
        if own is not None and own.config.assignment == "nearest":
            latent = _parametrizations(self.module)[self.tensor_name].original
            assert isinstance(latent, Tensor)
            return latent.detach()
        with torch.no_grad():
            value: Tensor = getattr(self.module, self.tensor_name)
            pruned = getattr(self.module, self.tensor_name + "_mask", None)
            if isinstance(pruned, Tensor):  # torch.nn.utils.prune: up to date only after a forward
                unpruned: Tensor = getattr(self.module, self.tensor_name + "_orig")
                value = unpruned * pruned
            return value.detach()


def cluster_(
    model: ModuleT,
    rules: Rules = 16,
    *,
    importance: Mapping[str, Tensor] | None = None,
    inputs: Iterable[Any] | None = None,
    strict: bool = True,
    seed: int = 0,
    **options: Any,
) -> ModuleT:
    """Replace a model's weights by codebook lookups, in place, ready to be fine-tuned.

    Afterwards ``module.weight`` is computed from a codebook of at most ``n_clusters`` values, and
    the optimizer sees the codebook: build the optimizer after this call. A weight behind
    `torch.nn.utils.prune` or another parametrization (``weight_norm``) is evaluated, and that
    value is what gets clustered; `strip_` then leaves a plain parameter.

    Args:
        model: any module; only its parameters' structure changes.
        rules: an int, a `ClusterConfig`, or a mapping from pattern to int, `ClusterConfig`, dict of
            fields, or None to leave alone; the last match wins. A pattern is a glob over parameter
            names or a module class name. What is not clustered by default (biases, norms,
            depthwise convolutions) is reached only by a pattern that names it: its full name, or
            a glob that reaches nothing else.
        importance: per-weight sensitivities by parameter name, each of its tensor's shape, as
            `fisher_information` makes them; they weigh the squared errors of the fit.
        inputs: unlabelled inputs, a few hundred, as an iterable of batches (a tensor, a tuple of
            arguments, a dict, or pairs whose label is not read) or as one tensor. Each layer is
            then fitted so that its output changes least (`torchclust.data_aware`), and biases and
            BatchNorm statistics take up the mean error. With `importance` too, that weighs whole
            output channels.
        strict: raise for a pattern that matches nothing or cannot apply; else warn.
        seed: for the inits that draw at random.
        **options: `ClusterConfig` fields, for every rule that does not say otherwise.

    Returns:
        The same object.

    Raises:
        TypeError, ValueError: rules that cannot be resolved, NaN or infinity in a weight,
            importance that does not fit. The model is then unchanged.

    Example:
        >>> model = cluster_(torch.nn.Linear(64, 64), 4)
        >>> model.weight.unique().numel()
        4
        >>> model.parametrizations.weight.original.shape
        torch.Size([4])
    """
    chosen = _chosen(model, rules, options, strict)
    weights = _checked_importance(importance or {}, [slot for slot, _ in chosen])

    def fit(task: tuple[_Slot, ClusterConfig]) -> ClusteredWeight:
        slot, config = task
        return _fit_slot(slot, config, weights.get(slot.candidate.name), seed)

    if inputs is not None:
        return _cluster_to_inputs(model, chosen, weights, inputs, seed)
    for (slot, _), fitted in zip(chosen, _in_threads(fit, chosen), strict=True):
        _attach(slot, fitted)
    return model


def _cluster_to_inputs(
    model: ModuleT,
    chosen: list[tuple[_Slot, ClusterConfig]],
    weights: Mapping[str, Tensor],
    inputs: Iterable[Any],
    seed: int,
) -> ModuleT:
    """Fit on a copy that is clustered layer by layer, then bring the results to the model."""
    twin = copy.deepcopy(model)
    copies = {slot.candidate.name: slot for slot in _slots(twin)}
    layers = []
    for slot, config in chosen:
        name = slot.candidate.name
        for module, tensor_name in copies[name].places:
            _make_plain(module, tensor_name)
        module, tensor_name = copies[name].places[0]
        layers.append(
            Layer(
                name=name,
                path=name.rpartition(".")[0],
                module=module,
                tensor_name=tensor_name,
                config=config,
                channel_dim=slot.channel_dim,
                importance=weights.get(name),
                tied=len(slot.places) > 1,
            )
        )
    fits = fit_to_inputs(model, twin, layers, inputs, seed)
    for slot, config in chosen:
        _attach(slot, _make(slot, config, fits.weights[slot.candidate.name]))
    state = model.state_dict()  # shares memory with the model
    for name, value in fits.corrected.items():
        state[name].copy_(value)
    return model


def strip_(model: ModuleT, *, validate: bool = True) -> ModuleT:
    """Make every clustered tensor a plain parameter again: same values to the bit, same class.

    Terminal: one optimizer step afterwards and the clusters are gone, so it belongs at the end.
    Activations that `torchclust.activations` rounds are float again. Idempotent; a model without
    clusterings is returned as it is.

    Args:
        model: clustered or not.
        validate: check that no tensor holds more values than its codebook may.

    Raises:
        ValueError: with ``validate``, naming the tensor; the model is then still clustered.

    Example:
        >>> model = strip_(cluster_(torch.nn.Linear(64, 64), 4))
        >>> type(model), model.weight.unique().numel()
        (<class 'torch.nn.modules.linear.Linear'>, 4)
    """
    found = [(module, name) for _, module, name in _clustered_places(model)]
    with torch.no_grad():
        values = {id(_parametrization(m, n)): getattr(m, n).detach().clone() for m, n in found}
    if validate:
        for path, clustering in named_clusterings(model):
            value = values[id(_parametrization(clustering.module, clustering.tensor_name))]
            _check_distinct(path, clustering, value)
    remove_quantized_activations_(model)
    for module, name in found:
        _detach(module, name, values[id(_parametrization(module, name))])
    return model


def refit_(model: ModuleT, *, seed: int = 0) -> ModuleT:
    """Fit every codebook anew to the present weights, each with the configuration it has.

    With ``"nearest"`` those are the weights that train behind the lookup. Codebooks may change
    their size, so build the optimizer after it.

    Args:
        model: clustered; tensors that are not stay as they are.
        seed: for the inits that draw at random.

    Returns:
        The same object.

    Example:
        >>> model = cluster_(torch.nn.Linear(64, 64), 4, assignment="nearest")
        >>> _ = model.parametrizations.weight.original.data.mul_(2)  # training, in short
        >>> refit_(model).weight.unique().numel()
        4
    """
    tasks = [(slot, config) for slot, config in _clustered_slots(model)]
    fits = _in_threads(lambda task: _fit_slot(task[0], task[1], None, seed), tasks)
    for (slot, _), fitted in zip(tasks, fits, strict=True):
        _attach(slot, fitted)
    return model


def restore_(model: ModuleT, state_dict: Mapping[str, Any]) -> ModuleT:
    """Give a plain model the clusterings that a state dict was saved with, and load it.

    Args:
        model: the same architecture, clustered or not; any weights.
        state_dict: of a clustered model, or a Lightning checkpoint that holds one as
            ``"state_dict"``. One of a plain model is simply loaded.

    Returns:
        The same object, equal to the saved model to the bit and ready to train on.

    Raises:
        ValueError: the state dict names a module or tensor that this model lacks.
        RuntimeError: from ``load_state_dict``, if other tensors do not fit.

    Example:
        >>> saved = cluster_(torch.nn.Linear(8, 8), 4).state_dict()
        >>> restored = restore_(torch.nn.Linear(8, 8), saved)
        >>> is_clustered(restored, "weight")
        True
    """
    state = state_dict.get("state_dict", state_dict)
    restore_structure_(model, state)
    model.load_state_dict(state)
    return model


def restore_structure_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Make the model clustered, and its activations rounded, exactly where the state dict's are.

    Values are left to its loading.
    """
    saved = {key: m for key in state if (m := _CONFIG_KEY.fullmatch(key))}
    fits = {
        (m["path"] or "", m["name"]): _tensors_under(state, key.removesuffix("0.config_json"))
        for key, m in saved.items()
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, name in fits:
        owner = modules.get(path)
        if owner is None or not (hasattr(owner, name) or hasattr(owner, name + "_orig")):
            raise ValueError(
                f"the state dict has a clustered {_join(path, name)!r}, this model has no such "
                f"parameter: restore_ needs the architecture that was saved"
            )
    present = {
        (path, name): _layout(holder.state_dict())
        for path, module in modules.items()
        for name, holder in _parametrizations(module).items()
        if _parametrization(module, name) is not None
    }
    # What fits already stays: an optimizer may hold these very parameters.
    if present != {place: _layout(tensors) for place, tensors in fits.items()}:
        strip_(model, validate=False)
        for slot in _slots(model):
            path, _, name = slot.candidate.name.rpartition(".")
            if (path, name) in fits:
                device = _underlying(slot.module, slot.tensor_name).device
                tensors = {key: tensor.to(device) for key, tensor in fits[path, name].items()}
                _attach(slot, _make(slot, config_from_bytes(tensors["config_json"]), tensors))
    match_quantized_(model, state)


def named_clusterings(model: nn.Module) -> Iterator[tuple[str, Clustering]]:
    """Iterate over ``(parameter_name, Clustering)``; a tied tensor comes once, first name.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> [name for name, _ in named_clusterings(cluster_(model, {"1.weight": 4}))]
        ['1.weight']
    """
    seen: set[int] = set()
    for path, module, name in _clustered_places(model):
        parametrization = _parametrization(module, name)
        if id(parametrization) not in seen:
            seen.add(id(parametrization))
            yield path, Clustering(module, name)


def is_clustered(module: nn.Module, tensor_name: str | None = None) -> bool:
    """Whether a module's tensor is clustered; without a name, whether any tensor in it is.

    Example:
        >>> layer = cluster_(torch.nn.Linear(8, 8), 4)
        >>> is_clustered(layer), is_clustered(layer, "weight"), is_clustered(layer, "bias")
        (True, True, False)
    """
    if tensor_name is None:
        return next(_clustered_places(module), None) is not None
    return _parametrization(module, tensor_name) is not None


def decisions(model: nn.Module) -> list[tuple[str, Tensor, Decision]]:
    """For every parameter tensor: its name, its value, its config or why it was left alone."""
    most = max((config.n_clusters for _, config in _clustered_slots(model)), default=0)
    found = []
    for slot in _slots(model):
        own = _parametrization(slot.module, slot.tensor_name)
        reason = slot.candidate.refuse or slot.candidate.skip
        if reason is None and slot.candidate.n_elements <= most:
            reason = TOO_SMALL
        decision = (
            Decision(None, reason or "no rule clusters it")
            if own is None
            else Decision(own.config, None)
        )
        with torch.no_grad():
            value = slot.value() if own is None else getattr(slot.module, slot.tensor_name)
        found.append((slot.candidate.name, value.detach(), decision))
    return found


@contextmanager
def live_weights(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every parameter tensor by name, as the very tensor that forward calls inside will read."""
    with parametrize.cached():
        yield {
            slot.candidate.name: getattr(slot.module, slot.tensor_name) for slot in _slots(model)
        }


def planned(model: nn.Module, rules: Rules, *, strict: bool = True, **options: Any) -> list[str]:
    """Names of the tensors that `cluster_` would cluster; raises what it would raise of rules."""
    return [slot.candidate.name for slot, _ in _chosen(model, rules, options, strict)]


def _chosen(
    model: nn.Module, rules: Rules, options: Mapping[str, Any], strict: bool
) -> list[tuple[_Slot, ClusterConfig]]:
    slots = list(_slots(model))
    found = resolve_rules(rules, [s.candidate for s in slots], options, strict=strict)
    return [
        (slot, decision.config)
        for slot, decision in zip(slots, found, strict=True)
        if decision.config is not None
    ]


def parameters_matching(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """The parameters behind every tensor that a pattern reaches, as it reaches them in a rule."""
    return [
        parameter
        for slot in _slots(model)
        if reaches(pattern, slot.candidate)
        for parameter in _parameters_behind(slot.module, slot.tensor_name)
    ]


def _fit_slot(
    slot: _Slot, config: ClusterConfig, importance: Tensor | None, seed: int
) -> ClusteredWeight:
    try:
        tensors = fit_weight(
            slot.value(), config, channel_dim=slot.channel_dim, importance=importance, seed=seed
        )
    except ValueError as error:
        raise ValueError(
            f"cannot cluster {slot.candidate.name!r} ({slot.candidate.kind}): {error}"
        ) from None
    return _make(slot, config, tensors)


def _make(slot: _Slot, config: ClusterConfig, tensors: Mapping[str, Tensor]) -> ClusteredWeight:
    return make_clustered_weight(
        config,
        tensors,
        channel_dim=slot.channel_dim,
        requires_grad=_trains(slot.module, slot.tensor_name),
    )


def _attach(slot: _Slot, clustered: ClusteredWeight) -> None:
    for module, name in slot.places:
        _make_plain(module, name)
        order = _parameter_order(module)
        module._parameters[name].grad = None  # type: ignore[union-attr]  # of the old shape
        parametrize.register_parametrization(module, name, clustered, unsafe=True)
        module.parametrizations[name].parameter_order = order  # type: ignore[index, union-attr]
        if isinstance(module, nn.RNNBase):
            _look_up_flat_weights(module)
    clustered.first_original = None


def _parameter_order(module: nn.Module) -> tuple[str, ...]:
    """The module's parameters as they stood before the first of them was clustered."""
    for holder in _parametrizations(module).values():
        if hasattr(holder, "parameter_order"):
            return holder.parameter_order  # type: ignore[return-value]
    return tuple(module._parameters)


def _make_plain(module: nn.Module, name: str) -> None:
    """Undo what computes the tensor now, keeping its value: pruning, weight_norm, clustering."""
    own = _parametrization(module, name)
    if own is not None:
        with torch.no_grad():
            value = getattr(module, name).detach().clone()
        _detach(module, name, value)
    elif parametrize.is_parametrized(module, name):
        parametrize.remove_parametrizations(module, name)
    elif name + "_mask" in module._buffers:
        prune.remove(module, name)
    elif name + "_g" in module._parameters:
        nn.utils.remove_weight_norm(module, name)


def _detach(module: nn.Module, name: str, value: Tensor) -> None:
    """Take our parametrization off and leave a plain parameter, the very one that was clustered.

    Not torch's ``remove_parametrizations``: that deletes the property from the module's class,
    which a deep copy shares, and so breaks the copy's original; and it leaves the parameter last
    among its siblings, which reorders every optimizer and state dict built from then on.
    """
    holder = _parametrizations(module)[name]
    parameter, order = holder.original, holder.parameter_order
    assert isinstance(parameter, nn.Parameter)
    assert isinstance(order, tuple)
    if parameter.shape != value.shape:
        parameter.grad = None
    parameter.data = value
    remaining = {n: p for n, p in _parametrizations(module).items() if n != name}
    class_dict, base = dict(vars(type(module))), type(module).__bases__[0]
    if remaining:
        del class_dict[name]
        del module.parametrizations[name]  # type: ignore[operator, union-attr]
        module.__class__ = type(type(module).__name__, (base,), class_dict)
    else:
        del module._modules["parametrizations"]
        module.__class__ = base
    module.register_parameter(name, parameter)
    for sibling in [n for n in order if n in module._parameters]:
        module._parameters[sibling] = module._parameters.pop(sibling)
    if isinstance(module, nn.RNNBase) and not remaining:
        module._init_flat_weights()


def _look_up_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent module's kernels read the lookups instead of the list it keeps of them.

    `nn.RNNBase` caches its parameters in ``_flat_weights`` and packs them for cuDNN; of a computed
    weight both would be stale after one step. The overrides live in the parametrized class, so
    `strip_` takes them away with it.
    """

    def flat_weights(self: nn.RNNBase) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        with parametrize.cached():  # the weights are read more than once a call
            return base.forward(self, *args, **kwargs)

    def nothing(self: nn.RNNBase) -> None:
        """There is no packed copy to keep up to date."""

    cls: Any = type(module)  # made by torch for this module alone
    base: Any = cls.__bases__[0]
    cls._flat_weights = property(flat_weights, lambda self, value: None)
    cls._update_flat_weights = cls.flatten_parameters = nothing
    cls.forward = forward
    module.__dict__.pop("_flat_weights", None)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    """Every parameter tensor of the model, whatever computes it now; tied ones once."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        for name, identity in _tensor_names(module):
            places.setdefault(identity, []).append((_join(path, name), module, name))
    for found in places.values():
        names = tuple(dict.fromkeys(path for path, _, _ in found))
        tied = tuple(dict.fromkeys((module, name) for _, module, name in found))
        yield _Slot(tied, _describe(names, tied))


def _tensor_names(module: nn.Module) -> Iterator[tuple[str, int]]:
    """A module's logical tensor names, each with what identifies the tensor across modules."""
    for name, holder in _parametrizations(module).items():
        own = _parametrization(module, name)
        yield name, id(holder if own is None else own)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        stem = re.sub(r"_(orig|g)$", "", name)
        computed = stem != name and stem not in module._parameters and hasattr(module, stem)
        if computed:
            yield stem, id(parameter)
        elif not (name.endswith("_v") and name[:-2] + "_g" in module._parameters):
            yield name, id(parameter)


def _describe(names: tuple[str, ...], places: tuple[tuple[nn.Module, str], ...]) -> Candidate:
    module, name = places[0]
    mro = (cls for owner, _ in places for cls in type(owner).__mro__)
    bases = {cls.__name__ for cls in mro if issubclass(cls, nn.Module)}
    base = type(module) if not parametrize.is_parametrized(module) else type(module).__bases__[0]
    parameter = _underlying(module, name)
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return Candidate(
        names=names,
        classes=frozenset(bases - {"Module", f"Parametrized{base.__name__}"}),
        kind=base.__name__,
        n_elements=0 if lazy else _n_elements(module, name, parameter),
        skip=_why_skipped(module, name),
        refuse=_why_refused(module, name, parameter),
    )


def _why_skipped(module: nn.Module, name: str) -> str | None:
    if not any(
        isinstance(module, classes) and re.fullmatch(pattern, name)
        for classes, pattern in _CLUSTERABLE
    ):
        return "not a weight that is clustered by default"
    if isinstance(module, _CONV) and 1 < module.groups == module.in_channels:
        return "depthwise convolution"
    return None


def _why_refused(module: nn.Module, name: str, parameter: Tensor) -> str | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "it is lazy and has no values yet; run one batch through the model first"
    if parameter.is_meta:
        return "it is on the meta device and has no values; load the weights first"
    if not parameter.is_floating_point():
        return f"its dtype is {parameter.dtype}, and only floating-point weights are clustered"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and name == "weight":
        if module.sparse:
            return (
                "sparse=True gives gradients by row, and a shared centroid has none; "
                "build the embedding with sparse=False"
            )
        if module.max_norm is not None:
            return (
                "max_norm rescales rows in place, which would break up the clusters; "
                "build the embedding with max_norm=None"
            )
    if name + "_orig" in module._parameters and name + "_mask" not in module._buffers:
        return (
            "a forward hook recomputes it (spectral_norm?); remove that first, or use "
            "torch.nn.utils.parametrizations"
        )
    return None


def _n_elements(module: nn.Module, name: str, parameter: Tensor) -> int:
    own = _parametrization(module, name)
    if own is not None:
        return own.shape.numel()
    if parametrize.is_parametrized(module, name):  # weight_norm's first tensor is one column
        with torch.no_grad():
            weight: Tensor = getattr(module, name)
            return weight.numel()
    return parameter.numel()


def _parameters_behind(module: nn.Module, name: str) -> list[nn.Parameter]:
    """From which the tensor is computed; the tensor itself where it is plain."""
    if parametrize.is_parametrized(module, name):
        return list(_parametrizations(module)[name].parameters())
    stored = [module._parameters.get(name + suffix) for suffix in ("", "_orig", "_g", "_v")]
    return [parameter for parameter in stored if parameter is not None]


def _underlying(module: nn.Module, name: str) -> Tensor:
    """A parameter from which the tensor is computed; the tensor itself where it is plain."""
    if parametrize.is_parametrized(module, name):
        return next(_parametrizations(module)[name].parameters())
    for candidate in (name, name + "_orig", name + "_v"):
        parameter = module._parameters.get(candidate)
        if parameter is not None:
            return parameter
    raise AssertionError(f"{name} is no tensor of {module}")


def _trains(module: nn.Module, name: str) -> bool:
    return _underlying(module, name).requires_grad


def _parametrizations(module: nn.Module) -> Mapping[str, parametrize.ParametrizationList]:
    found = module._modules.get("parametrizations")
    return found if isinstance(found, nn.ModuleDict) else {}  # type: ignore[return-value]


def _parametrization(module: nn.Module, name: str) -> ClusteredWeight | None:
    holder = _parametrizations(module)
    first = holder[name][0] if name in holder else None
    return first if isinstance(first, ClusteredWeight) else None


def _clustered_places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, module in list(model.named_modules()):
        for name in list(_parametrizations(module)):
            if _parametrization(module, name) is not None:
                yield _join(path, name), module, name


def _clustered_slots(model: nn.Module) -> Iterator[tuple[_Slot, ClusterConfig]]:
    for slot in _slots(model):
        own = _parametrization(slot.module, slot.tensor_name)
        if own is not None:
            yield slot, own.config


def _checked_importance(importance: Mapping[str, Tensor], slots: list[_Slot]) -> dict[str, Tensor]:
    by_name = {name: slot for slot in slots for name in slot.candidate.names}
    checked = {}
    for name, tensor in importance.items():
        slot = by_name.get(name)
        if slot is None:
            continue  # fisher_information covers every parameter, the rules choose among them
        shape = slot.value().shape
        if tensor.shape != shape:
            raise ValueError(
                f"importance of {name!r} must have its shape {tuple(shape)}, "
                f"got {tuple(tensor.shape)}"
            )
        checked[slot.candidate.name] = tensor
    if importance and not checked:
        raise ValueError(
            f"importance names no tensor that is clustered: it has {sorted(importance)[:4]}, "
            f"clustered are {sorted(by_name)[:4]}"
        )
    return checked


def _check_distinct(path: str, clustering: Clustering, value: Tensor) -> None:
    config = clustering.config
    table_rows = value.transpose(0, clustering.channel_dim).flatten(1)
    if config.granularity == "tensor" and config.codebook_dtype == "float32":
        table_rows = table_rows.reshape(1, -1)
    size = config.group_size or 1
    for start in range(0, len(table_rows), size):
        distinct = count_distinct(table_rows[start : start + size])
        if distinct > config.n_clusters:
            raise ValueError(
                f"{path!r} holds {distinct} distinct values, more than n_clusters="
                f"{config.n_clusters}: something changed it behind the lookup. "
                f"Find what writes to it, or strip without the check: "
                f"strip_(model, validate=False)"
            )


def count_distinct(tensor: Tensor) -> int:
    """Number of distinct values; one sort on the CPU."""
    ordered = tensor.detach().reshape(-1).cpu()
    ordered = ordered.float() if ordered.dtype in (torch.float16, torch.bfloat16) else ordered
    values = ordered.numpy().copy()
    values.sort()  # numpy's vectorised sort: about 12 times faster than torch's
    return int((values[1:] != values[:-1]).sum()) + min(1, len(values))


def _tensors_under(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The tensors of one parametrization list by the names that `ClusteredWeight` gives them."""
    return {
        key.removeprefix(prefix).removeprefix("0."): value.detach().clone()
        for key, value in state.items()
        if key.startswith(prefix)
    }


def _layout(tensors: Mapping[str, Tensor]) -> tuple[ClusterConfig, dict[str, Any]]:
    """What must agree before values can be loaded into one clustered tensor."""
    plain = {key.removeprefix("0."): tensor for key, tensor in tensors.items()}
    config = config_from_bytes(plain.pop("config_json"))
    return config, {name: (tensor.shape, tensor.dtype) for name, tensor in plain.items()}


def _in_threads(function: Any, tasks: list[Any]) -> list[Any]:
    """Map in order on all cores; numpy's sorts run outside the interpreter lock."""
    with ThreadPoolExecutor(max_workers=max(1, min(len(tasks), os.cpu_count() or 1))) as pool:
        return list(track(pool.map(function, tasks), "Fitting codebooks", len(tasks)))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
