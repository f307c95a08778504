"""The zoo's networks are the published ones: parameters and multiply-accumulates agree."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchclust.recipes.prepare import load_checkpoint_
from torchclust.zoo.mlperf_tiny import Conv, mlperf_ad, mlperf_ic, mlperf_kws, mlperf_vww
from torchclust.zoo.networks import MODELS

# name: (parameters, million MACs), with where each was published.
PUBLISHED = {
    # Keras' count of the seed article's network: 320 + 18,496 + 409,856 + 2,570
    "seed_cnn": (431_242, None),
    "lenet_300_100": (266_610, None),  # Deep Compression, Table 2: 266K weights
    "lenet_5": (431_080, None),  # Deep Compression, Table 3: 431K weights
    "arm_mlp": (109_386, None),  # 784-128-64-10
    "mobilenet_v1": (4_231_976, 568.7),  # Keras' trainable parameters; paper: 4.2M, 569M
    "mobilenet_v2": (3_504_872, 300.8),  # torchvision's; paper: 3.4M, 300M
    # MLPerf Tiny: 78,666, less 480 BatchNorm statistics and 240 biases before them; 12.5M
    "resnet8": (78_666 - 480 - 240, 12.5),
    # MLPerf Tiny, BatchNorm kept: the folded counts, and for every norm its gamma and beta
    "mlperf_kws": (22_604 + 2 * 9 * 64, 2.66),
    "mlperf_vww": (210_850 + 2 * (8 + 1240 + 1488), 7.49),
    "mlperf_ic": (77_706 + 2 * (16 + 32 + 64 + 128), 12.5),
    "mlperf_sww": (46_459 + 128 * 3 + 32, 0.826),
    # 156K parameters make the published 0.57 MB of zipped float file
    "mnist_convnet": (155_606, None),
    # Hello Edge, Table 7: 497.6 KB of 8-bit weights and activations, 56.9M operations
    "ds_cnn_l": (497_640 - 25 * 10 * 276 - 13 * 5 * 276 + (4 - 2) * 11 * 276 - 11 * 276, 28.4),
}


def _input(name: str) -> torch.Tensor:
    return torch.randn(2, *inspect.signature(MODELS[name]).parameters["input_shape"].default)


def test_every_network_has_its_published_counts() -> None:
    assert set(PUBLISHED) == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_macs(name: str) -> None:
    model = MODELS[name]().eval()
    parameters, macs = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(_input(name)[:1])
    assert logits.shape == (1, inspect.signature(MODELS[name]).parameters["n_classes"].default)
    if macs is not None:
        assert counter.get_total_flops() / 2e6 == pytest.approx(macs, rel=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_other_inputs_and_classes(name: str) -> None:
    shape = (3, 30, 1) if name == "mlperf_sww" else (3, 32, 36)  # all of time at once
    logits = MODELS[name](shape, 7).eval()(torch.randn(2, *shape))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
@pytest.mark.parametrize("size", [28, 96])
def test_width_scales_in_multiples_of_eight(name: str, size: int) -> None:
    model = MODELS[name]((1, size, size), 10, width=0.35).eval()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {conv.out_channels % 8 for conv in convs} == {0}
    assert convs[0].stride == ((1, 1) if size < 64 else (2, 2))
    assert model(torch.randn(1, 1, size, size)).shape == (1, 10)
    stem = next(iter(MODELS[name]((1, size, size), 10, width=0.35, stem_stride=2).children()))
    assert stem.stride == (2, 2)


REFERENCE = Path(__file__).parents[3] / "shared" / "real" / "models"
FILES = {
    "mlperf_tiny_kws": mlperf_kws,
    "mlperf_tiny_vww": mlperf_vww,
    "mlperf_tiny_ic": mlperf_ic,
    "mlperf_tiny_ad": mlperf_ad,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_reference_weights_load(name: str, batch_norm: bool) -> None:
    file = REFERENCE / f"{name}{'_bn' if batch_norm else ''}.safetensors"
    if not file.is_file():
        pytest.skip("the reference weights are not here")
    load_checkpoint_(FILES[name](batch_norm=batch_norm), file)


def test_same_padding_is_uneven_at_the_end() -> None:
    """As the reference: 49 frames, kernel 10, stride 2 want 9 more, of which 4 come first."""
    layer = Conv(1, 1, (10, 4), stride=2, norm=False, relu=False)
    with torch.no_grad():
        layer.conv.weight.fill_(1)
        layer.conv.bias.zero_()
        found = layer(torch.ones(1, 1, 49, 10))[0, 0]
    assert found.shape == (25, 5)
    rows, columns = torch.tensor([6.0, 8, 10]), torch.tensor([3.0, 4, 4, 4, 3])
    assert torch.equal(found[:3], rows[:, None] * columns)
    assert torch.equal(found[-3:], torch.tensor([9.0, 7, 5])[:, None] * columns)


def test_the_autoencoder_gives_back_its_input_shape() -> None:
    model = mlperf_ad().eval()
    assert sum(p.numel() for p in model.parameters()) == 265_864 + 2 * (8 * 128 + 8)
    assert model(torch.randn(3, 640)).shape == (3, 640)


def test_residuals_add_their_input() -> None:
    model = MODELS["resnet8"]().eval()
    block = next(m for m in model if hasattr(m, "shortcut"))
    x = torch.randn(1, 16, 8, 8)
    torch.testing.assert_close(block(x), torch.relu(block.body(x) + x))


def test_batch_norm_stands_between_convolution_and_relu() -> None:
    kinds = [type(m) for m in MODELS["seed_cnn"](batch_norm=True)]
    positions = [i for i, kind in enumerate(kinds) if kind is nn.BatchNorm2d]
    assert [(kinds[i - 1], kinds[i + 1]) for i in positions] == [(nn.Conv2d, nn.ReLU)] * 2
    assert nn.BatchNorm2d not in [type(m) for m in MODELS["seed_cnn"]()]
