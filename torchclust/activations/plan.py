"""Which operator outputs an int8 graph stores, and which of them share a scale.

The rules say what the TFLite converter and its static int8 quantizer make of a recorded forward:
BatchNorm and constant factors disappear into the convolution before them, an activation into the
operator before it; pooling, reshaping and slicing keep their input's scale; concatenation forces
one on all its inputs; softmax, sigmoid and tanh have theirs prescribed by the kernels. They were
read off files written by litert-torch 0.10 and ai-edge-quantizer 0.10. A wrong guess costs a
rounding too many or too few in training, never a wrong file: the exporter finds tensors by value.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchclust.activations.record import Call, Record, output_keys, tensors_in


def _names(text: str) -> frozenset[str]:
    """Operators, named as `torchclust.activations.record.operator_name` does."""
    return frozenset(text.split())


_CONVOLUTIONS = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear"
)
_ARITHMETIC = _names("add sub rsub mul div true_divide batch_norm")
_FUSED_LIMITS = ((0, None), (0, 6), (-1, 1))
_MOVED = _names(
    "view view_as reshape reshape_as flatten unflatten squeeze unsqueeze permute transpose t get "
    "movedim moveaxis swapaxes getitem chunk split tensor_split unbind narrow select index_select "
    "expand expand_as broadcast_to repeat tile repeat_interleave pad pixel_shuffle "
    "pixel_unshuffle channel_shuffle flip roll amax amin"
)
_INTERPOLATED = _names("interpolate upsample upsample_bilinear upsample_nearest")
_JOINED = _names("cat concat concatenate stack hstack vstack dstack maximum minimum where")
_FIXED = {"sigmoid": (0.0, 255 / 256), "softmax": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
"""Ranges of the kernels whose scale is prescribed: 1/256, 1/256 and 1/128."""


@dataclass(frozen=True)
class Group:
    """Tensors of the int8 graph that share one scale.

    Attributes:
        quantized: names of the calls whose outputs are rounded to it.
        carried: names of those whose outputs are on its grid anyway: pooled, reshaped, joined.
        fixed: the range that the kernel prescribes; None where it is to be learned.
    """

    quantized: tuple[str, ...]
    carried: tuple[str, ...] = ()
    fixed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Plan:
    """What is rounded, and how far that goes.

    Attributes:
        groups: the tensors that the int8 graph stores, by common scale, in order of first use.
        uses: how often a module ran with the example inputs, where more than once. What it computes
            beyond is in no group.
    """

    groups: tuple[Group, ...]
    uses: Mapping[str, int]

    def encoded(self) -> Tensor:
        """The plan for the state dict: JSON, a byte each."""
        groups = [[g.quantized, g.carried, g.fixed] for g in self.groups]
        text = json.dumps({"groups": groups, "uses": self.uses})
        return torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)

    @classmethod
    def decoded(cls, encoded: Tensor) -> Plan:
        """The plan again."""
        read = json.loads(bytes(encoded.tolist()).decode("ascii"))
        groups = (
            Group(tuple(quantized), tuple(carried), None if fixed is None else (fixed[0], fixed[1]))
            for quantized, carried, fixed in read["groups"]
        )
        return cls(tuple(groups), read["uses"])


def plan(record: Record) -> Plan:
    """What of a recorded forward is to be rounded."""
    tensors = _Tensors(record)
    for call in record.calls:
        tensors.place(call)
    return Plan(tensors.groups(), {path: n for path, n in record.uses.items() if n > 1})


@dataclass
class _Stored:
    """One value: its name, its group, and what its operator may still take in.

    ``takes``: ``"factors"`` (a convolution: BatchNorm, factors, then an activation),
    ``"activation"`` (arithmetic), ``"clipping"`` (pooling: an activation, without a new scale).
    """

    key: str
    group: int
    rounded: bool
    takes: str = ""
    stored: bool = True


class _Tensors:
    """The values placed so far. Groups merge as in union-find."""

    def __init__(self, record: Record) -> None:
        self._values: dict[int, _Stored] = {}
        self._fixed: dict[int, tuple[float, float]] = {}
        self._parents: list[int] = []
        self._uses = Counter(record.results)
        for call in record.calls:
            self._uses.update(call.inputs)

    def place(self, call: Call) -> None:
        """Decide on one call's outputs; of an unknown operator each is a tensor of its own."""
        source = self._values.get(call.inputs[0]) if call.inputs else None
        if call.operator in _FIXED:
            self._new(call, fixed=_FIXED[call.operator])
        elif call.operator in _JOINED:
            self._join(call)
        elif _keeps_scale(call):
            takes = "clipping" if "_pool" in call.operator else ""
            self._same(call, source, rounded=_makes_new_values(call), takes=takes)
        elif source is not None and self._is_fused(call, source, ("clipping",)):
            self._same(call, source, rounded=False)
        elif source is not None and self._is_fused(call, source, ("factors", "activation")):
            source.stored = False
            self._new(call, takes="factors" if call.operator in _ARITHMETIC else "")
        else:
            takes = "activation" if call.operator in _ARITHMETIC else ""
            self._new(call, takes="factors" if call.operator in _CONVOLUTIONS else takes)

    def groups(self) -> tuple[Group, ...]:
        """The groups of which a tensor is rounded, in order of their first one."""
        found: dict[int, tuple[list[str], list[str]]] = {}
        for value in self._values.values():
            if value.stored:
                quantized, carried = found.setdefault(self._root(value.group), ([], []))
                (quantized if value.rounded else carried).append(value.key)
        return tuple(
            Group(tuple(quantized), tuple(carried), self._fixed.get(group))
            for group, (quantized, carried) in found.items()
            if quantized
        )

    def _is_fused(self, call: Call, source: _Stored, where: tuple[str, ...]) -> bool:
        """Whether an operator that takes such things in swallows this call."""
        alone = len(call.inputs) == 1 and self._uses[call.inputs[0]] == 1
        if not alone or source.takes not in where:
            return False
        if _limits(call) is not None:
            return _limits(call) in _FUSED_LIMITS
        constant = call.operator in _ARITHMETIC and _per_channel(call)
        # relu6(x + 3) / 6: the addition and the clipping go into the convolution.
        return source.takes == "factors" and (constant or call.operator == "hardsigmoid")

    def _new(
        self, call: Call, *, takes: str = "", fixed: tuple[float, float] | None = None
    ) -> None:
        """A tensor with a scale of its own; several outputs of one call stay in float."""
        if len(call.outputs) == 1 and tensors_in(call.result)[0].is_floating_point():
            group = len(self._parents)
            self._parents.append(group)
            self._values[call.outputs[0]] = _Stored(call.key, group, True, takes)
            if fixed is not None:
                self._fixed[group] = fixed

    def _same(self, call: Call, source: _Stored | None, *, rounded: bool, takes: str = "") -> None:
        """Tensors that have their source's scale, if it has one."""
        if source is not None:
            for key, output in zip(
                output_keys(call.key, len(call.outputs)), call.outputs, strict=True
            ):
                self._values[output] = _Stored(key, source.group, rounded, takes)

    def _join(self, call: Call) -> None:
        """One scale for all inputs and the output; what has a prescribed one is converted."""
        sources = [self._values[i] for i in call.inputs if i in self._values]
        free = [s for s in sources if self._root(s.group) not in self._fixed]
        for other in free[1:]:
            self._parents[self._root(other.group)] = self._root(free[0].group)
        if free:
            self._same(call, free[0], rounded=len(free) < len(call.inputs))
        else:
            self._new(call)

    def _root(self, group: int) -> int:
        while self._parents[group] != group:
            group = self._parents[group]
        return group


def _keeps_scale(call: Call) -> bool:
    pools = "_pool" in call.operator
    if pools and (_averages_all(call) or _argument(call, 6, "divisor_override", None)):
        return False  # a MEAN, or times a factor: both have a scale of their own
    return call.operator in _MOVED or call.operator in _INTERPOLATED or pools


def _averages_all(call: Call) -> bool:
    if call.operator == "avg_pool2d":
        kernel, padding = _argument(call, 1, "kernel_size", 0), _argument(call, 3, "padding", 0)
        return averages_all(call.args[0].shape[-2:], kernel, padding)
    return call.operator.startswith("adaptive_avg_pool") and call.result.shape[2:].numel() == 1


def averages_all(
    size: Sequence[int], kernel: int | Sequence[int], padding: int | Sequence[int]
) -> bool:
    """Whether an average pooling's window is the whole map: a MEAN in the file.

    That has a scale of its own; a pooling has its input's, of which the average, so much smaller,
    would be a few coarse steps.

    >>> averages_all((7, 7), 7, 0), averages_all((7, 7), (7, 7), (1, 1))
    (True, False)
    """
    height, width = kernel if isinstance(kernel, Sequence) else (kernel, kernel)
    return (height, width) == tuple(size) and padding in (0, (0, 0), [0, 0])


def _makes_new_values(call: Call) -> bool:
    """Whether values between those of the input come up, which are rounded again."""
    return "avg_pool" in call.operator or call.operator in _INTERPOLATED


def _limits(call: Call) -> tuple[Any, Any] | None:
    """Between which numbers an activation clips; None if the call is something else."""
    if call.operator in ("relu", "relu6"):
        return (0, None if call.operator == "relu" else 6)
    if call.operator == "hardtanh":
        return (_argument(call, 1, "min_val", -1), _argument(call, 2, "max_val", 1))
    if call.operator in ("clamp", "clip"):
        return (_argument(call, 1, "min", None), _argument(call, 2, "max", None))
    if call.operator == "clamp_min":
        return (_argument(call, 1, "min", None), None)
    return None


def _argument(call: Call, position: int, name: str, default: Any) -> Any:
    """An argument by position or name; a tensor's values are not looked at."""
    given = call.args[position] if position < len(call.args) else call.kwargs.get(name, default)
    return "tensor" if isinstance(given, Tensor) else given


def _per_channel(call: Call) -> bool:
    """Whether an arithmetic call's constants are single numbers, or one per channel."""
    if call.operator == "batch_norm":
        return True
    rank = call.result.dim()
    channel = 1 if rank > 3 else rank - 1
    shapes = [(1,) * (rank - t.dim()) + tuple(t.shape) for t in call.constants]
    return all(size == 1 for s in shapes for d, size in enumerate(s) if d != channel)
