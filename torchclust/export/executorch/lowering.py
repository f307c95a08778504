"""From the calibrated graph to a program: partitions for the NPU, Vela, int8 ends, bytes.

The backend dumps each partition's TOSA file beside what Vela makes of it, so what is read back here
is what was compiled. The compiled parts are run again in Python with their TOSA files standing in
for the NPU.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from torchclust.export.accelerators import Configuration
from torchclust.export.backends import ExportError, first_line, quietly
from torchclust.export.codes import Array
from torchclust.export.executorch import packages
from torchclust.export.executorch.observed import module_of, trace
from torchclust.export.executorch.tosa import TosaFile, read_tosa
from torchclust.export.inspect import Port
from torchclust.export.vela import VelaError

_DELEGATE = "executorch_call_delegate"
_TYPES = {torch.float32: "float32", torch.int8: "int8", torch.int32: "int32", torch.int64: "int64"}


@dataclass(frozen=True, eq=False)
class Part:
    """One partition on the NPU: its TOSA file, and Vela's output as it lies in the program."""

    tosa: TosaFile
    compiled: bytes


@dataclass(frozen=True, eq=False)
class Lowered:
    """A program, its parts on the NPU, what stays on the CPU, and its ends.

    ``cpu``: pairs of an operator's name and the torch module that made it, if known.
    """

    content: bytes
    parts: tuple[Part, ...]
    cpu: tuple[tuple[str, str | None], ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    graph: fx.GraphModule

    def __call__(self, sample: Sequence[Tensor]) -> list[Array]:
        """Run one sample in float, the NPU's parts on TOSA's reference model."""
        given = [_quantized(x, port) for x, port in zip(sample, self.inputs, strict=True)]
        with torch.no_grad():
            results = _OnReference(self.graph, self.parts).run(*given)
        return [_dequantized(y, port) for y, port in zip(results, self.outputs, strict=True)]


def compile_spec(chosen: Configuration, folder: Path) -> Any:
    """The backend's description of the target, with a folder for what it writes on the way."""
    spec = packages.load("executorch.backends.arm.ethosu").EthosUCompileSpec(
        chosen.accelerator, chosen.system_config, chosen.memory_mode, config_ini=chosen.config
    )
    return spec.dump_intermediate_artifacts_to(str(folder))


def quantized(observed: fx.GraphModule) -> fx.GraphModule:
    """The graph with quantize and dequantize operators in the observers' places."""
    pt2e = packages.load("torchao.quantization.pt2e.quantize_pt2e")
    with quietly():
        converted = pt2e.convert_pt2e(observed)
    assert isinstance(converted, fx.GraphModule)
    _drop_unread(converted)
    return converted


def _drop_unread(graph: fx.GraphModule) -> None:
    """Forget float tensors whose int8 values took their place: a program would hold both."""
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [*dict(graph.named_parameters()), *dict(graph.named_buffers())]:
        if name not in read:
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)


def lower(converted: fx.GraphModule, example: tuple[Tensor, ...], spec: Any) -> Lowered:
    """Partition, compile and serialize.

    Args:
        converted: a graph from `quantized`.
        example: its inputs.
        spec: from `compile_spec`.

    Raises:
        VelaError: Vela cannot compile a part.
        ExportError: an operator has no kernel on the CPU either.
    """
    exir = packages.load("executorch.exir")
    arm = packages.load("executorch.backends.arm.ethosu")
    program = trace(converted, example)
    printed = io.StringIO()
    try:
        with quietly(), contextlib.redirect_stdout(printed):
            edge = exir.to_edge_transform_and_lower(
                program,
                partitioner=[arm.EthosUPartitioner(spec)],
                compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
            )
    except (Exception, SystemExit) as error:
        said = [line.strip() for line in printed.getvalue().splitlines() if line.strip()]
        raise VelaError(
            f"the Ethos-U backend cannot compile this model for {spec.target}: "
            f"{first_line(error)}" + "".join(f"\n  {line}" for line in said[-3:])
        ) from error
    _forget_folder(edge)
    inputs, outputs = _int8_ends(edge)
    graph = edge.exported_program().module(check_guards=False)
    return Lowered(
        _serialized(exir, edge),
        tuple(_parts(graph, Path(spec._get_intermediate_path()))),
        tuple(_left_on_cpu(graph)),
        inputs,
        outputs,
        graph,
    )


def _forget_folder(edge: Any) -> None:
    """Keep our scratch folder's name out of the program: equal models make equal files."""
    for _, module in edge.exported_program().graph_module.named_children():
        specs = getattr(module, "compile_specs", [])
        specs[:] = [spec for spec in specs if spec.key != "debug_artifact_path"]


def _serialized(exir: Any, edge: Any) -> bytes:
    """The program's bytes. Parts stay inside it, as the backend's own examples have it.

    A program whose kernels are missing would be written all the same, and fail on the device.
    """
    runtime = packages.load("executorch.extension.pybindings.portable_lib")
    with quietly():
        made = edge.to_executorch(
            config=exir.ExecutorchBackendConfig(extract_delegate_segments=False)
        )
    # One plan for the model, and one for each scale and zero point that a program tells of itself.
    operators = [op for plan in made.executorch_program.execution_plan for op in plan.operators]
    used = {f"{op.name}.{op.overload}" if op.overload else op.name for op in operators}
    missing = sorted(used - set(runtime._get_operator_names()))
    if missing:
        raise ExportError(
            f"ExecuTorch has no kernel on the CPU for what the NPU does not take: "
            f"{', '.join(missing)}.\nExport the part of the model before it"
        )
    return bytes(made.buffer)


def _int8_ends(edge: Any) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Drop the first quantization and the last dequantization wherever an end has one."""
    passes = packages.load("executorch.exir.passes.quantize_io_pass")
    program = edge.exported_program()
    signature, nodes = program.graph_signature, {n.name: n for n in program.graph.nodes}
    first = [nodes[name] for name in signature.user_inputs]
    last = [nodes[name] for name in signature.user_outputs]
    before = [_parameters([n, *n.users][1]) if len(n.users) == 1 else None for n in first]
    after = [_parameters(n) if "dequantize" in str(n.target) else None for n in last]
    edge.transform(
        [
            passes.QuantizeInputs(edge, [i for i, p in enumerate(before) if p]),
            passes.QuantizeOutputs(edge, [i for i, p in enumerate(after) if p]),
        ]
    )
    return (
        tuple(_port(n, p) for n, p in zip(first, before, strict=True)),
        tuple(_port(n, p) for n, p in zip(last, after, strict=True)),
    )


def _parameters(node: fx.Node) -> tuple[float, int] | None:
    """Scale and zero point of a node that quantizes or dequantizes a whole tensor to int8."""
    if "quantize_per_tensor" not in str(node.target) or node.args[5] != torch.int8:
        return None
    scale, zero_point = node.args[1:3]
    return float(scale), int(zero_point)  # type: ignore[arg-type]


def _port(node: fx.Node, parameters: tuple[float, int] | None) -> Port:
    value = node.meta["val"]
    dtype = "int8" if parameters else _TYPES.get(value.dtype, str(value.dtype))
    scale, zero_point = parameters or (0.0, 0)
    return Port(node.name, tuple(value.shape), dtype, scale, zero_point)


def _parts(graph: fx.GraphModule, folder: Path) -> Iterator[Part]:
    """The program's partitions in order, each with the TOSA file that bears its tag."""
    for node in graph.graph.nodes:
        if _is_delegate(node):
            lowered = getattr(graph, str(node.args[0].target))
            tags = {n.meta.get("delegation_tag") for n in lowered.original_module.graph.nodes}
            (file,) = (f for tag in tags - {None} for f in folder.glob(f"*_{tag}_*.tosa"))
            yield Part(read_tosa(file.read_bytes()), lowered.processed_bytes)


def _left_on_cpu(graph: fx.GraphModule) -> Iterator[tuple[str, str | None]]:
    for node in graph.graph.nodes:
        if node.op == "call_function" and not _is_delegate(node):
            name = str(getattr(node.target, "_name", getattr(node.target, "__name__", node.target)))
            if name != "getitem":
                yield name.partition("::")[2] or name, module_of(node)


def _is_delegate(node: fx.Node) -> bool:
    return str(node.target) == _DELEGATE


class _OnReference(fx.Interpreter):
    """Runs a lowered graph, each part on the NPU by its TOSA file."""

    def __init__(self, graph: fx.GraphModule, parts: Sequence[Part]) -> None:
        super().__init__(graph)
        self._parts = iter(parts)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator makes of its arguments."""
        if str(target) != _DELEGATE:
            return super().call_function(target, args, kwargs)
        inputs = [np.ascontiguousarray(x.numpy()) for x in args[1:]]
        return tuple(torch.from_numpy(y) for y in next(self._parts).tosa.run(inputs))


def _quantized(x: Tensor, port: Port) -> Tensor:
    if not port.scale:
        return x
    return (x / port.scale).round().add(port.zero_point).clamp(-128, 127).to(torch.int8)


def _dequantized(y: Tensor, port: Port) -> Array:
    values = y.float().sub(port.zero_point).mul(port.scale) if port.scale else y
    array: Array = values.numpy()
    return array
