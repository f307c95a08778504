"""A traced model whose operators can be computed otherwise: what to ask of it, how to run it.

A rule looks at one operator of the trace and gives a function of the same arguments that the
converter, the quantizer and the accelerator take better, or None. The trace itself is never edited:
the model runs operator by operator, and where there is a substitute, that runs instead. So a rule
is written in plain torch, and the names of the modules, which the converter writes into the file,
stay those of the user's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx import traceback

from torchclust.export.rewrites.nodes import (
    MOVES,
    Substitute,
    computed,
    is_constant,
    is_tensor,
    operator,
    returned,
    shape,
    source,
    writes,
)

WRAPPER = "torchclust.export.layout.Deployed"  # the module that is converted

_WEIGHTED = ("linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "bmm", "embedding")
# Operators whose map the converter keeps in NHWC.
_SPATIAL = ("conv", "pool", "batch_norm", "upsample", "pixel_shuffle")


class Traced:
    """A model's trace: its operators, the values of its parameters, and what stands in for what.

    Attributes:
        program: the trace of ``model``.
        model: the plain copy.
        inputs_last: for every input's name in the trace, whether the file has its channels last.
        constants: holds tensors that substitutes need, so that a trace of them finds them.
        substitutes: by operator.
        folded: results that are constants, by operator, as they are when they are read.
        columns: the order in which a parameter's columns stand in the converted model, by name.
        dilations: by how much a parameter's kernel is spread there, zeros in between, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        program: torch.export.ExportedProgram,
        inputs_last: Mapping[str, bool],
    ) -> None:
        self.model, self.program, self.inputs_last = model, program, inputs_last
        self.constants = nn.Module()
        self.substitutes: dict[fx.Node, Substitute] = {}
        self.folded: dict[fx.Node, Tensor] = {}
        self.columns: dict[str, Tensor] = {}
        self.dilations: dict[str, tuple[int, ...]] = {}
        signature = program.graph_signature
        self._names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._lifted = dict(signature.inputs_to_lifted_tensor_constants)
        _named_stacks(program.graph.nodes)
        for number, (node, name) in enumerate(self._lifted.items()):
            self.constants.register_buffer(f"lifted_{number}", program.constants[name].detach())
            self._lifted[node] = f"lifted_{number}"
        self._fixed = self._constants()

    @property
    def nodes(self) -> list[fx.Node]:
        """The operators in order of execution, inputs and parameters among them."""
        return list(self.program.graph.nodes)

    def name(self, node: Any) -> str | None:
        """The parameter or buffer that a node stands for."""
        return self._names.get(node.name) if isinstance(node, fx.Node) else None

    def is_buffer(self, node: fx.Node) -> bool:
        """Whether a node stands for a buffer or a constant, not a parameter."""
        parameters = self.program.graph_signature.inputs_to_parameters
        known = node.name in self._names or node.name in self._lifted
        return known and node.name not in parameters

    def value(self, node: Any) -> Tensor | None:
        """The tensor of a parameter, a buffer or a constant; None where the model computes it."""
        if not isinstance(node, fx.Node) or node in self.folded:
            return self.folded.get(node)
        name = self._names.get(node.name)
        if name is not None:
            return _get(self.model, name, self.program)
        lifted = self._lifted.get(node.name)
        if lifted is not None:
            return self.constants.get_buffer(lifted)
        return self._computed(node) if node in self._fixed else None

    def is_constant(self, node: fx.Node) -> bool:
        """Whether an operator's result is the same in every call."""
        return node in self._fixed

    def moving(self, node: fx.Node) -> fx.Node | None:
        """The first operand of an operator that depends on the model's inputs."""
        return next((n for n in node.all_input_nodes if n not in self._fixed), None)

    def _computed(self, node: fx.Node) -> Tensor | None:
        """A constant that the model computes of constants, such as a view of a buffer."""
        values = {n: self.value(n) for n in node.all_input_nodes if n in self._fixed}
        known = {n: v for n, v in values.items() if v is not None}
        return computed(node, known) if len(known) == len(values) else None

    def _constants(self) -> set[fx.Node]:
        """Operators that depend on no input of the model.

        Not those of what the trace writes to, and not weights' products, which stay in the file.
        """
        found: set[fx.Node] = set()
        written = {_root(n) for n in self.nodes if writes(n)}
        for node in self.program.graph.nodes:
            named = node.name in self._names or node.name in self._lifted
            made = is_constant(node, found) and operator(node) not in _WEIGHTED
            if (named or made) and node not in written:
                found.add(node)
        return found

    def constant(self, value: Tensor) -> Callable[[], Tensor]:
        """Keep a tensor for a substitute, which gets it by calling what is returned."""
        name = f"c{len(list(self.constants.buffers()))}"
        self.constants.register_buffer(name, value.detach().clone().contiguous())
        return lambda: self.constants.get_buffer(name)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the model's outputs, flat, with the substitutes in place."""
        with traceback.preserve_node_meta():
            outputs = self._run(_Running(self.program.graph_module, self.substitutes), inputs)
        wanted = self.program.graph_signature.user_outputs
        made = returned(self.program)
        names = [n.name if isinstance(n, fx.Node) else None for n in made]
        kept = [y for name, y in zip(names, outputs, strict=True) if name in wanted]
        return tuple(y for y in kept if isinstance(y, Tensor))

    def maps_out(self) -> tuple[bool, ...]:
        """For every tensor that the model returns, whether it is a map with its channels first."""
        tensors = [n for n in returned(self.program) if is_tensor(n)]
        return tuple(
            len(shape(n)) == 4 or (len(shape(n)) > 2 and is_channels_last(self, n)) for n in tensors
        )

    def values(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
        """Every operator's own result, without substitutes."""
        seen: dict[fx.Node, Tensor] = {}
        self._run(_Running(self.program.graph_module, {}, seen), inputs)
        return seen

    def _run(self, running: _Running, inputs: Sequence[Tensor]) -> Any:
        given = dict(zip(self.program.graph_signature.user_inputs, inputs, strict=True))
        values = [
            given[node.name] if node.name in given else self.value(node)
            for node in self.program.graph.nodes
            if node.op == "placeholder"
        ]
        return running.run(*values, enable_io_processing=False)


Rule: TypeAlias = Callable[[Traced, fx.Node], Substitute | None]


class _Running(fx.Interpreter):
    """One run of a trace. Substitutes of operators that work in place do so too, for every view.

    ``seen`` gets each operator's result.
    """

    def __init__(
        self,
        module: nn.Module,
        substitutes: Mapping[fx.Node, Substitute],
        seen: dict[fx.Node, Tensor] | None = None,
    ) -> None:
        super().__init__(module)
        self._substitutes, self._seen = substitutes, seen

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator, or its substitute."""
        value = self._computed(n)
        if self._seen is not None and n.op == "call_function" and isinstance(value, Tensor):
            self._seen[n] = value.clone()
        return value

    def _computed(self, n: fx.Node) -> Any:
        substitute = self._substitutes.get(n)
        if substitute is None:
            return super().run_node(n)
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = substitute(*args, **kwargs)
        return args[0].copy_(value) if operator(n).endswith("_") else value


def _root(node: fx.Node) -> fx.Node | None:
    """The tensor of which the first operand of an operator is a view."""
    before = source(node)
    while operator(before) in (*MOVES, "slice", "select"):
        before = source(before)
    return before


def is_channels_last(traced: Traced, node: fx.Node | None) -> bool:
    """Whether the converter holds this map in NHWC: it comes from a spatial layer, or is moved."""
    rank = len(shape(node))
    while node is not None and len(shape(node)) == rank:
        if node.op == "placeholder":
            return traced.inputs_last.get(node.name, False)
        if any(kind in operator(node) for kind in _SPATIAL):
            return True
        if operator(node) in MOVES:
            return False
        node = traced.moving(node)
    return False


def _named_stacks(nodes: Iterable[fx.Node]) -> None:
    """Put the wrapper in front of every operator's stack of modules, as tracing it would."""
    for node in nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            inner = {k: (f"model.{path}".rstrip("."), kind) for k, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = {"deployed": ("", WRAPPER), **inner}


def _get(model: nn.Module, name: str, program: torch.export.ExportedProgram) -> Tensor | None:
    owner, _, attribute = name.rpartition(".")
    value = getattr(model.get_submodule(owner), attribute, None)
    if value is None:  # a buffer that the model does not save
        value = program.constants.get(name)
    return value if isinstance(value, Tensor) else None
