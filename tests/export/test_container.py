"""Weights lie inside the flatbuffer, aligned, where a microcontroller's interpreter reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchclust import cluster_
from torchclust.export import backends, to_tflite
from torchclust.export.container import inline_buffers


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with weights above 1 KiB, which the quantizer puts behind the flatbuffer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32 * 16, 24), nn.ReLU(), nn.Linear(24, 5)),
    )
    cluster_(model, 8, codebook_dtype="int8")
    images = torch.randn(8, 3, 8, 8)
    target = tmp_path_factory.mktemp("container") / "model.tflite"
    to_tflite(model, images[:1], target, calibration=[images])
    return target


def test_every_buffer_is_inside_and_aligned(path: Path) -> None:
    content = path.read_bytes()
    model = backends.schema().Model.GetRootAsModel(content, 0)
    sizes = []
    for i in range(model.BuffersLength()):
        buffer = model.Buffers(i)
        assert (buffer.Offset(), buffer.Size()) == (0, 0)
        if buffer.DataLength():
            start = buffer.DataAsNumpy().__array_interface__["data"][0]
            assert (
                start - np.frombuffer(content, np.uint8).__array_interface__["data"][0]
            ) % 16 == 0
            sizes.append(buffer.DataLength())
    assert max(sizes) == 32 * 16 * 24
    assert inline_buffers(content) == inline_buffers(inline_buffers(content))


def test_tflite_micro_computes_with_the_weights(path: Path) -> None:
    """The same answers as LiteRT's reference kernels, to the bit."""
    from tflite_micro.python.tflite_micro import runtime

    litert = backends.interpreter()
    reference = litert.Interpreter(
        model_path=str(path), experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
    )
    reference.allocate_tensors()
    micro = runtime.Interpreter.from_file(str(path))
    source, target = reference.get_input_details()[0], reference.get_output_details()[0]
    answers = set()
    for seed in range(20):
        image = np.random.default_rng(seed).integers(-128, 128, (1, 8, 8, 3), np.int8)
        reference.set_tensor(source["index"], image)
        reference.invoke()
        micro.set_input(image, 0)
        micro.invoke()
        expected = reference.get_tensor(target["index"])
        np.testing.assert_array_equal(micro.get_output(0), expected)
        answers.add(expected.tobytes())
    assert len(answers) > 10
