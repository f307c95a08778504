"""A forward that rounds: put on a module, taken off, copied and pickled with it.

The module gets a class of its own, as `torch.nn.utils.parametrize` does: no name, place or type
check of the user's changes, and another parametrization can lie above or below it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn

from torchclust.activations.arguments import places
from torchclust.activations.plan import Plan
from torchclust.activations.record import is_recording
from torchclust.activations.rounding import BATCHES, NAMES, PLAN, RANGES, Names, Rounding
from torchclust.activations.tracking import track_, untrack_

BUFFERS = (RANGES, PLAN, BATCHES)
_MARK = "_rounds_activations"


def attach_(root: nn.Module, plan: Plan, ranges: Tensor, batches: Tensor) -> None:
    """Make a module's forward round, as of its next call.

    Args:
        root: any module that passes `refuse_replaced`.
        plan: what is rounded in it.
        ranges: (groups, 2), float; batches: how many they are the average of, a number.
    """
    root.__dict__.pop("forward", None)
    encoded = plan.encoded().to(ranges.device)
    for name, value in zip(BUFFERS, (ranges, encoded, batches), strict=True):
        root.register_buffer(name, value)
    groups = {key: (i, g.fixed is None) for i, g in enumerate(plan.groups) for key in g.quantized}
    names = Names(groups, plan.uses, places(root.forward))
    setattr(root, NAMES, names)
    track_(root, names)
    root.__class__ = _rounding_class(type(root))


def detach_(root: nn.Module) -> None:
    """Undo `attach_`."""
    if _is_forward_of_class(root):
        root.__dict__.pop("forward", None)
    untrack_(root, getattr(root, NAMES))
    for name in BUFFERS:
        del root._buffers[name]
    delattr(root, NAMES)
    _restore_class(root)


def rounding_modules(model: nn.Module, *, every_name: bool = False) -> Iterator[tuple[str, Any]]:
    """The modules within a model whose forward rounds, with their paths: one each, or all."""
    for path, module in model.named_modules(remove_duplicate=not every_name):
        if hasattr(type(module), _MARK):
            yield path, module


def plan_of(root: nn.Module) -> Plan:
    """A rounding module's plan."""
    return Plan.decoded(root.get_buffer(PLAN))


def refuse_replaced(modules: Sequence[nn.Module]) -> None:
    """Refuse modules whose own attribute ``forward`` would be called in place of their class's.

    Raises:
        ValueError: one of them has such an attribute.
    """
    for module in modules:
        if is_replaced(module):
            raise ValueError(
                f"cannot quantize activations of {type(module).__name__}: its forward was replaced "
                f"(model.forward = ...), so nothing would be rounded. Quantize first, then replace "
                f"it, or undo that:  del model.forward"
            )


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has a forward that is not its class's, such as a tool's wrapper."""
    return "forward" in module.__dict__ and not _is_forward_of_class(module)


def _is_forward_of_class(module: nn.Module) -> bool:
    """Lightning's DDP leaves the class's own forward on the object, as an attribute."""
    own = module.__dict__.get("forward")
    return own is not None and bool(own == MethodType(type(module).forward, module))


def _rounding_class(base: Any) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A wrapper around this forward may outlive the rounding; recordings are of plain values.
        if NAMES not in self.__dict__ or is_recording():
            return base.forward(self, *args, **kwargs)
        rounding = Rounding(self)
        args, kwargs = rounding.inputs(args, kwargs)
        with rounding:
            output = base.forward(self, *args, **kwargs)
        rounding.finish()
        return output

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # Pickle finds classes by name, and this one has none: the class below it is pickled.
        _, _, *state = base.__reduce_ex__(self, max(protocol, 2))
        return (_unpickled, (base,), *state)

    namespace = {"forward": forward, "__reduce_ex__": reduce, _MARK: True}
    return type(base.__name__, (base,), {**namespace, "__module__": base.__module__})


def _unpickled(base: Any) -> nn.Module:
    """An empty module that rounds, for pickle and copy to fill."""
    cls = _rounding_class(base)
    return cls.__new__(cls)


def _restore_class(root: nn.Module) -> None:
    """Take our class out from under those that parametrizations put on top since."""
    above: list[type] = []
    cls = type(root)
    while _MARK not in vars(cls):
        above.append(cls)
        cls = cls.__bases__[0]
    restored = cls.__bases__[0]
    for other in reversed(above):
        namespace = {k: v for k, v in vars(other).items() if k not in ("__dict__", "__weakref__")}
        restored = type(other.__name__, (restored,), namespace)
    root.__class__ = restored
