"""The order of weights: as Vela's own encoder lays them out, each weight once on every core."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from torchclust.export.compiled.commands import Layout
from torchclust.export.compiled.errors import NotVerifiedError
from torchclust.export.compiled.hardware import Hardware, hardware
from torchclust.export.compiled.layers import ZERO
from torchclust.export.compiled.order import weight_order

mlw_codec = pytest.importorskip("ethosu.mlw_codec")

SHAPES = [(5, 1, 1, 3), (20, 3, 3, 9), (9, 10, 2, 8), (8, 11, 9, 1), (40, 1, 1, 70)]
U85 = [Hardware("ethos-u85", macs, cores) for macs, cores in ((128, 1), (512, 2), (2048, 4))]


def layout(shape: tuple[int, int, int, int], **fields: object) -> Layout:
    values = {
        "depthwise": False,
        "part_kernel": False,
        "block_depth": 16,
        "micro_pixels": 1,
        "stride": (1, 1),
        "dilation": (1, 1),
        "input_bits": 8,
        "sparse": False,
    }
    return Layout(shape, **{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["depth", "part", "depthwise"])
@pytest.mark.parametrize("macs", [32, 128])
def test_u55_order_is_that_of_velas_encoder(
    shape: tuple[int, int, int, int], kind: str, macs: int
) -> None:
    if kind == "depthwise":
        shape = (*shape[:3], 1)
    rng = np.random.default_rng(0)
    codes = rng.integers(-9, 10, shape).astype(np.int16)
    flat = np.append(codes.ravel(), 0)
    micro = 4 if macs == 32 else 8
    for block, dilation, bits in ((8, 1, 8), (16, 2, 8), (128, 1, 16)):
        (order,) = weight_order(
            layout(
                shape,
                depthwise=kind == "depthwise",
                part_kernel=kind == "part",
                block_depth=block,
                dilation=(dilation, dilation),
                input_bits=bits,
            ),
            Hardware("ethos-u55", macs, 1),
            False,
        )
        depthwise, part, size = kind == "depthwise", kind == "part", 8 // dilation
        data, count = mlw_codec.reorder_encode(
            8, micro, codes, block, depthwise, part, bits, size, size
        )
        assert count == len(order)
        assert mlw_codec.decode(bytearray(data)) == flat[order].tolist()


@pytest.mark.parametrize("device", [Hardware("ethos-u65", 512, 2), *U85])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_read_once(
    device: Hardware, fast: bool, shape: tuple[int, int, int, int]
) -> None:
    if fast and device.family != "ethos-u85":
        pytest.skip("a format of the U85")
    for part, depthwise, stride, bits, sparse in itertools.product(
        (False, True), (False, True), (1, 2), (8, 16), (False, True)
    ):
        if (depthwise and (part or fast or sparse)) or (sparse and bits == 16):
            continue
        one = layout(
            (*shape[:3], 1) if depthwise else shape,
            part_kernel=part,
            depthwise=depthwise,
            stride=(stride, 1),
            input_bits=bits,
            sparse=sparse and device.family == "ethos-u85",
            block_depth=32,
            micro_pixels=device.macs // 128,
        )
        streams = weight_order(one, device, fast)
        assert len(streams) == (1 if fast else device.cores)
        read = np.concatenate(streams)
        assert np.array_equal(np.sort(read[read != ZERO]), np.arange(np.prod(one.shape)))


def test_the_accelerator_by_its_configuration() -> None:
    assert [hardware(value).name for value in (5, 7, 8 | 1 << 28, 9 | 1 << 28, 11 | 2 << 28)] == [
        "ethos-u55-32",
        "ethos-u55-128",
        "ethos-u65-256",
        "ethos-u65-512",
        "ethos-u85-2048",
    ]
    assert [hardware(value | 2 << 28).cores for value in range(7, 12)] == [1, 1, 2, 4, 4]
    with pytest.raises(NotVerifiedError, match="an accelerator of the unknown product number 9"):
        hardware(9 << 28)
