"""What a model's packed file holds: its tensors, each with what is known of its codebook."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchclust.activations.quantized import rounding_buffers
from torchclust.model.clustering import Clustering
from torchclust.model.places import clustered_weight, is_covered, is_pruned
from torchclust.model.refusals import CONV_TRANSPOSE
from torchclust.packing.dtypes import dtype_of, to_bits
from torchclust.packing.search import Hint

_COMPUTED = re.compile(r"(?P<owner>(?:.+\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)")
EXTRA = "_extra_state"  # what torch calls a module's own contribution to its state dict


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a model by the names that it has in the stripped model's state dict.

    Attributes:
        names: one, or several where it is tied.
        stored: the parameter or buffer that stands for it: itself where it is plain.
        clustering: what computes it, if it is clustered.
        pruned: module and tensor name, if `torch.nn.utils.prune` computes it.
        axis: the output channels' dimension.
    """

    names: tuple[str, ...]
    stored: Tensor
    clustering: Clustering | None
    pruned: tuple[nn.Module, str] | None
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape as the model reads it."""
        if self.clustering is None:
            return tuple(self.stored.shape)
        latent = self.clustering.latent
        return tuple((self.clustering.indices if latent is None else latent).shape)

    def value(self) -> Tensor:
        """Evaluate it, where no cache keeps the result."""
        if self.clustering is not None:
            return self.clustering.value
        if self.pruned is not None:
            module, name = self.pruned
            return self.stored.detach() * module.get_buffer(name + "_mask")
        return self.stored.detach()

    def hint(self) -> Hint:
        """What the clustering knows beyond the values."""
        if self.clustering is None or is_covered(
            self.clustering.module, self.clustering.tensor_name
        ):
            return Hint()
        config, codes, scale = self.clustering.config, self.clustering.codes, self.clustering.scale
        if codes is not None and scale is not None:
            tiny = torch.finfo(scale.dtype).tiny
            scale = torch.where(scale.detach() >= tiny, scale.detach(), 1)  # channels of zeros only
            return Hint(codes=codes.cpu().numpy(), scales=to_bits(scale))
        rows = {"tensor": None, "channel": 1, "group": config.group_size}
        return Hint(rows_per_book=rows[config.granularity])


def tensors_of(model: nn.Module) -> list[ModelTensor]:
    """Every tensor of the stripped model's state dict, by module and name; tied ones once.

    A clustered tensor comes late in its state dict. In this order, files of the clustered and of
    the stripped model are the same.
    """
    state = model.state_dict(keep_vars=True)
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    place = {path: number for number, path in enumerate(modules)}
    passing = rounding_buffers(model)
    keys = [key for key in state if key not in passing]
    each = [tensor for key in keys if (tensor := _tensor_of(modules, key, state)) is not None]
    for tensor in each:
        _check_its_own(tensor, own)
    each.sort(key=lambda t: (place.get(t.names[0].rpartition(".")[0], -1), t.names[0]))
    found: dict[int, ModelTensor] = {}
    for tensor in each:
        first = found.setdefault(id(tensor.stored), tensor)
        if first is not tensor:
            tied = dataclasses.replace(first, names=first.names + tensor.names)
            found[id(tensor.stored)] = tied
    return list(found.values())


def _tensor_of(
    modules: Mapping[str, nn.Module], key: str, state: Mapping[str, object]
) -> ModelTensor | None:
    """The tensor that a key of the state dict belongs to; None for what is derived from others."""
    clustering = pruned = None
    name = key
    path, _, last = key.rpartition(".")
    module, base = modules.get(path), last.removesuffix("_orig")
    computed = _COMPUTED.fullmatch(key)
    if computed is not None:
        owner, tensor_name = modules[computed["owner"].rstrip(".")], computed["name"]
        if clustered_weight(owner, tensor_name) is not None:
            if computed["rest"] != "original":
                return None
            name, clustering = computed["owner"] + tensor_name, Clustering(owner, tensor_name)
    elif module is not None and last.endswith("_mask") and is_pruned(module, last[: -len("_mask")]):
        return None
    elif module is not None and base != last and is_pruned(module, base):
        name, pruned = key.removesuffix("_orig"), (module, base)
    stored = _storable(key, state[key])
    path, _, last = name.rpartition(".")
    by_columns = last == "weight" and isinstance(modules.get(path), CONV_TRANSPOSE)
    return ModelTensor((name,), stored, clustering, pruned, axis=int(by_columns))


def _check_its_own(tensor: ModelTensor, own: Container[int]) -> None:
    """Refuse what could be saved, and not be loaded: it is copied into the model's own tensors."""
    name, stored = tensor.names[0], tensor.stored
    if id(stored) not in own and name.rpartition(".")[2] != EXTRA:
        raise TypeError(
            f"{name!r} of the state dict is no parameter or buffer of the model, but made by a "
            f"hook; a packed file cannot give it back. Make it a buffer, or save it beside it"
        )
    steps = zip(stored.stride(), stored.shape, strict=True)
    if any(step == 0 and size > 1 for step, size in steps):
        raise TypeError(
            f"{name!r} is expanded: several of its elements are one in memory, and cannot be "
            f"loaded one by one. Give the module a copy:  register_buffer(name, tensor.clone())"
        )


def _storable(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name!r} of the state dict is {type(tensor).__name__}, and a packed file holds "
            f"tensors only; save such extra state beside it"
        )
    if is_lazy(tensor) or tensor.is_meta:
        what = "lazy" if is_lazy(tensor) else "on the meta device"
        raise ValueError(f"{name!r} is {what} and has no values; run one batch or load it first")
    if dtype_of(tensor) is None or tensor.layout != torch.strided:
        raise TypeError(
            f"{name!r} is {tensor.dtype} ({tensor.layout}), which a packed file cannot hold; "
            f"convert it to a dense tensor of an ordinary dtype first"
        )
    return tensor
