"""Fully connected layers leave as 1x1 convolutions: same numbers, one arithmetic everywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import backends, to_tflite, vela
from torchclust.export.container import pack, unpack
from torchclust.export.pointwise import convolutions_for_linears


class TwoHeads(nn.Module):
    """A hidden layer read twice, a weight without bias, an output of the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 20)
        self.first = nn.Linear(20, 6, bias=False)
        self.second = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.relu(self.body(x))
        return hidden, self.first(hidden), torch.relu(self.second(hidden))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 5)), (12,)),
    "two heads": (TwoHeads, (12,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU6(), nn.Linear(20, 5)), (7, 12)),
    "flattened map": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 5)),
        ),
        (3, 8, 8),
    ),
}


def converted(model: nn.Module, example: Tensor) -> bytes:
    with backends.quietly(), torch.no_grad():
        model_file = backends.litert_torch().convert(model.eval(), (example,))
    return bytes(model_file.model_content())


def answers(content: bytes, inputs: Tensor, *, reference: bool) -> list[np.ndarray]:
    litert = backends.interpreter()
    resolver = litert.OpResolverType
    kind = resolver.BUILTIN_REF if reference else resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    work = litert.Interpreter(model_content=content, experimental_op_resolver_type=kind)
    work.allocate_tensors()
    (source,) = work.get_input_details()
    work.set_tensor(source["index"], inputs.numpy())
    work.invoke()
    targets = sorted(work.get_output_details(), key=lambda t: t["name"])
    return [work.get_tensor(t["index"]) for t in targets]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_float_file_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    example = torch.randn(1, *shape)
    content = converted(make(), example)
    changed = convolutions_for_linears(content)
    kinds = operators(changed)
    assert "FULLY_CONNECTED" in operators(content)
    assert "FULLY_CONNECTED" not in kinds
    assert convolutions_for_linears(changed) == changed
    before, after = (answers(c, example, reference=True) for c in (content, changed))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def operators(content: bytes) -> list[str]:
    model = unpack(content)
    names = {v: k for k, v in vars(backends.schema().BuiltinOperator).items()}
    codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    return [names[codes[o.opcodeIndex]] for s in model.subgraphs for o in s.operators]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_int8_file_gives_one_answer_everywhere(name: str, tmp_path: Path) -> None:
    """LiteRT's reference kernels and tflite-micro to the bit; nothing for the CPU; few reshapes."""
    from tflite_micro.python.tflite_micro import runtime

    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model, data = cluster_(make(), 8, codebook_dtype="int8"), torch.randn(64, *shape)
    path = tmp_path / "model.tflite"
    result = to_tflite(model, data[:1], path, calibration=[data], channels_last=True)
    assert max(row.int8_codes or 0 for row in result.tensors) <= 8
    assert vela(path, output_dir=tmp_path).cpu_ops == 0
    litert = backends.interpreter()
    work = litert.Interpreter(
        model_path=str(path), experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    work.allocate_tensors()
    micro = runtime.Interpreter.from_file(str(path))
    (source,), targets = work.get_input_details(), work.get_output_details()
    generator = np.random.default_rng(0)
    for _ in range(200):
        x = generator.integers(-128, 128, source["shape"], np.int8)
        work.set_tensor(source["index"], x)
        work.invoke()
        micro.set_input(x, 0)
        micro.invoke()
        for i, target in enumerate(targets):
            np.testing.assert_array_equal(micro.get_output(i), work.get_tensor(target["index"]))


def test_no_reshape_stands_between_two_layers() -> None:
    make, shape = NETWORKS["flattened map"]
    example = torch.randn(1, *shape)
    content = converted(make(), example)
    kinds = operators(convolutions_for_linears(content))
    first = kinds.index("CONV_2D", kinds.index("MAX_POOL_2D"))
    assert kinds[first : first + 2] == ["CONV_2D", "CONV_2D"]


def test_a_file_without_linears_stays_as_it_is() -> None:
    content = converted(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8))
    assert convolutions_for_linears(content) == pack(unpack(content), len(content))
