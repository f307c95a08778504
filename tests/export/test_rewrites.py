"""Operators as people write them, and what the file has in their place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import TFLiteExport, to_tflite, vela
from torchclust.export.layout import prepare
from torchclust.export.runner import Runner

Function = Callable[[Tensor], Tensor]


class Around(nn.Module):
    """A function of maps behind a convolution, and a layer that reads what it makes."""

    def __init__(self, function: Function, x: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(x.shape[1], 8, 3, padding=1)
        self.function = function
        made = function(self.conv(x))
        layers = {
            2: nn.Linear,
            4: lambda n, m: nn.Conv2d(n, m, 1),
            3: lambda n, m: nn.Conv1d(n, m, 1),
        }
        self.head = layers[made.ndim](made.shape[1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.conv(x)))


def maps(size: int = 8, count: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, x: Tensor, folder: Path) -> TFLiteExport:
    return to_tflite(model, x[:1], folder / "a.tflite", calibration=[x])


def cpu_operators(result: TFLiteExport, accelerator: str = "ethos-u55-128") -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        report = vela(result.path, accelerator=accelerator)
    assert report.cpu_ops == len(report.cpu_operators)
    return [row.operator for row in report.cpu_operators]


class Normalized(nn.Module):
    """Pixels as a camera gives them, normalized inside the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6] + [0.1] * 5))
        self.std = torch.tensor([0.2, 0.3, 0.4] + [0.5] * 5)

    def forward(self, x: Tensor) -> Tensor:
        return (x / 255 - self.mean[:, None, None]) / self.std.view(1, 8, 1, 1)


def slopes() -> nn.Module:
    layer = nn.PReLU(8)
    nn.init.uniform_(layer.weight, -0.5, 0.9)
    return layer


def trained_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.uniform_(-1, 1)
    return norm.eval()


AVERAGES: dict[str, Function] = {
    "mean": lambda y: y.mean((2, 3)),
    "mean kept": lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
    "mean of a mean": lambda y: y.mean(3).mean(2),
    "flattened mean": lambda y: y.flatten(2).mean(-1),
    "adaptive": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "pooling": lambda y: F.avg_pool2d(y, y.shape[2:]).flatten(1),
}


torch.manual_seed(0)  # layers among the functions
FUNCTIONS: dict[str, Function] = {
    **AVERAGES,
    "abs": torch.abs,
    "adaptive, dividing": nn.AdaptiveAvgPool2d(4),
    "adaptive, not dividing": nn.AdaptiveAvgPool2d((3, 5)),
    "adaptive, growing": nn.AdaptiveAvgPool2d(10),
    "adaptive maximum": nn.AdaptiveMaxPool2d(2),
    "adaptive maximum, in a row": lambda y: F.adaptive_max_pool1d(y.flatten(2), 7),
    "adaptive maximum, not dividing": nn.AdaptiveMaxPool2d((3, 5)),
    "affine": lambda y: y.relu() * BATCH_NORM.weight.view(8, 1, 1) + 1,
    "amax": lambda y: y.amax((2, 3)),
    "amax of channels": lambda y: y.amax(1, keepdim=True).expand_as(y),
    "average, ceil": nn.AvgPool2d(3, 2, ceil_mode=True),
    "average, divisor": nn.AvgPool2d(2, divisor_override=3),
    "average, divisor, of all": lambda y: F.avg_pool2d(y, y.shape[2:], divisor_override=9),
    "average, in a row": lambda y: F.avg_pool1d(y.flatten(2), 3, 2, 1),
    "average, in a row, edges": lambda y: F.avg_pool1d(
        y.flatten(2), 5, 3, 2, ceil_mode=True, count_include_pad=False
    ),
    "average, no padding counted": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average, padding counted": nn.AvgPool2d(3, 2, 1),
    "batch norm": lambda y: BATCH_NORM(y.relu()),
    "clamp": lambda y: y.clamp(-0.5, 0.7),
    "clamp above": lambda y: y.clamp(max=0.3),
    "clamp below": lambda y: y.clamp(min=0.1),
    "deviation": lambda y: y.std((2, 3)),
    "deviation, biased": lambda y: y * y.std(1, keepdim=True, correction=0),
    "elu": nn.ELU(0.7),
    "hardtanh": nn.Hardtanh(0, 1),
    "in place": lambda y: F.leaky_relu_(y * 2, 0.1),
    "in place, of a part": lambda y: in_place(y, lambda z: z[:, :2].clamp_(-0.1, 0.2)),
    "in place, of a view": lambda y: in_place(y, lambda z: F.leaky_relu_(z.flatten(), 0.1)),
    "leaky relu": nn.LeakyReLU(0.1),
    "log sigmoid": nn.LogSigmoid(),
    "maximum": nn.MaxPool2d(3, 2, 1),
    "maximum, ceil": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "maximum, in a row": lambda y: F.max_pool1d(y.flatten(2), 3, 2, 1),
    "maximum, in a row, ceil": lambda y: F.max_pool1d(y.flatten(2), 5, 5, ceil_mode=True),
    "maximum of relu, in a row": lambda y: F.max_pool1d(y.flatten(2).relu(), 3, 2, 1),
    "maximum, large": nn.MaxPool2d(6, 3, 3),
    "maximum of relu": lambda y: F.max_pool2d(y.relu(), 3, 2, 1),
    "mean of channels": lambda y: y * y.mean(1, keepdim=True),
    "mish": nn.Mish(),
    "nearest, 1.5": nn.Upsample(scale_factor=1.5),
    "nearest, half": nn.Upsample(scale_factor=0.5),
    "nearest, sizes": nn.Upsample(size=(11, 13)),
    "normalize": lambda y: F.normalize(y, dim=1),
    "normalize, first norm": lambda y: F.normalize(y, p=1.0, dim=1),
    "normalize, dead": lambda y: F.normalize((y - 3).relu(), dim=1),
    "normalize, floor of a tensor": lambda y: y / y.norm(dim=1, keepdim=True).clamp_min(ONE),
    "normalize, floor below zero": lambda y: y / y.norm(dim=1, keepdim=True).clamp_min(-1.0),
    "normalize, grown": lambda y: y[:, :1] / y.norm(dim=1, keepdim=True).expand_as(y),
    "normalize, over columns": lambda y: y / y.norm(dim=3, keepdim=True),
    "normalize, read twice": lambda y: both(y, y.norm(dim=1, keepdim=True)),
    "normalized": lambda y: NORMALIZED(y.relu()),
    "normalized, in other words": lambda y: 2 * (NORMALIZED.mean.view(8, 1, 1) * y.relu()) + ONE,
    "one factor": lambda y: y.relu() * ONE,
    "one per channel, first": lambda y: NORMALIZED.mean[None, :, None, None] * y.relu(),
    "prelu": slopes(),
    "prelu, one slope": nn.PReLU(),
    "product with a vector": lambda y: STACK @ y.mean((2, 3)).flatten()[:8],
    "reflected, in a row": lambda y: F.pad(y.flatten(2), (2, 1), "reflect"),
    "repeated, in a row": lambda y: F.pad(y.flatten(2), (0, 3), "replicate"),
    "reversed": lambda y: 1 - F.relu(1 - y),
    "root": lambda y: torch.sqrt(y.relu()),
    "same, in a row": lambda y: SAME_IN_A_ROW(y.flatten(2)),
    "same, in a row, uneven": lambda y: SAME_UNEVEN(y.flatten(2)),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "softplus, steep": nn.Softplus(beta=3, threshold=10),
    "sum": lambda y: y.sum((2, 3)),
    "transposed, dilated": nn.ConvTranspose2d(8, 8, 3, 2, 1, dilation=2),
    "transposed, grouped": nn.ConvTranspose2d(8, 8, 3, 2, groups=2),
    "transposed, in a row": lambda y: IN_A_ROW(y.flatten(2)),
    "transposed, norm": nn.Sequential(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, 2), nn.BatchNorm2d(8)),
    "transposed, dilated, output padding": nn.ConvTranspose2d(8, 8, 3, 1, 1, 2, dilation=3),
    "transposed, output padding": nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1),
    "wide stride": nn.Conv2d(8, 8, 7, 4, 3),
    "wide stride, one axis": nn.Conv2d(8, 8, 5, (1, 4), (2, 0)),
    "wide stride, padded before": nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 5, 4)),
    "wide stride, in a row": lambda y: WIDE_IN_A_ROW(y.flatten(2)),
    "wide stride, in a row, norm": lambda y: WIDE_NORM(y.flatten(2)),
}


def both(y: Tensor, length: Tensor) -> Tensor:
    return y / length + length


def in_place(y: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    own = y * 2
    change(own)
    return own


def norm_of_a_row() -> nn.Module:
    norm = nn.BatchNorm1d(8)
    norm.load_state_dict(trained_norm().state_dict())
    return norm.eval()


BATCH_NORM, NORMALIZED, ONE = trained_norm(), Normalized(), torch.ones(1)
NORM_OF_THE_BATCH = nn.BatchNorm1d(8, track_running_stats=False)
WIDE_NORM = nn.Sequential(nn.Conv1d(8, 8, 9, 5, 2), norm_of_a_row())
SAME_IN_A_ROW = nn.Sequential(nn.Conv1d(8, 8, 5, padding="same"), norm_of_a_row())
SAME_UNEVEN = nn.Conv1d(8, 8, 4, padding="same", dilation=3)
STACK = torch.rand(2, 6, 8)
WIDE_IN_A_ROW = nn.Conv1d(8, 8, 9, 5, 2)
IN_A_ROW = nn.ConvTranspose1d(8, 8, 3, 2, 1, output_padding=1, groups=4)
ROUNDED = ("softplus", "softplus, steep", "log sigmoid")  # as a polynomial, but in a float file


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_substitutes_compute_what_the_model_computes(name: str) -> None:
    x = maps()
    model = Around(FUNCTIONS[name], x).eval()
    prepared = prepare(model, x, last=False)
    assert prepared.module.traced.substitutes or name == "adaptive"
    exact = {"rtol": 1e-4, "atol": 1e-5}
    near = {"rtol": 0, "atol": 3e-3} if name in ROUNDED else exact
    torch.testing.assert_close(prepared.module(x[:1])[0], model(x[:1]), **near)
    whole = prepare(model, x, last=False, float_file=True)
    torch.testing.assert_close(whole.module(x[:1])[0], model(x[:1]), **exact)


def steep(layer: nn.PReLU) -> nn.Module:
    nn.init.constant_(layer.weight, 1.5)
    return layer


# What the converter and the NPU take as it is, or what no rule knows better.
KEPT: dict[str, Function] = {
    "average": nn.AvgPool2d(2),
    "average, same": nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "clamp by tensors": lambda y: torch.clamp(y, NORMALIZED.mean[0], NORMALIZED.mean[2]),
    "difference": lambda y: torch.rsub(y, y.relu()),
    "convolution, same": nn.Conv2d(8, 8, 3, padding="same"),
    "elu of a multiple": lambda y: torch.ops.aten.elu(y, 1.0, 1.0, 2.0),
    "hardtanh": nn.Hardtanh(),
    "norm of the batch, in a row": lambda y: NORM_OF_THE_BATCH(y.flatten(2)),
    "leaky relu, steep": nn.LeakyReLU(1.5),
    "maximum": nn.MaxPool2d(2),
    "maximum, dilated": nn.MaxPool2d(2, dilation=2),
    "maximum, same": nn.MaxPool2d(3, 1, 1),
    "maximum of one map": lambda y: F.max_pool2d(y[0], 3, 2, 1)[None],
    "maximum of one map, adaptive": lambda y: F.adaptive_max_pool2d(y[0], (4, 3))[None],
    "average of one map": lambda y: F.avg_pool2d(y[0], 3, 2, 1)[None],
    "nearest, once": nn.Upsample(scale_factor=1),
    "nearest, twice": nn.Upsample(scale_factor=2),
    "prelu of rows": nn.Sequential(nn.Flatten(), nn.PReLU(512)),
    "prelu, steep": steep(nn.PReLU(8)),
    "relu6": nn.ReLU6(),
    "sum times": lambda y: torch.add(y.relu(), NORMALIZED.mean.view(8, 1, 1), alpha=2),
    "transposed": nn.ConvTranspose2d(8, 8, 2, 2),
    "wide stride, not padded": nn.Conv2d(8, 8, 5, 4),
    "wide stride, valid": nn.Conv2d(8, 8, 5, 4, "valid"),
    "wide stride, valid, in a row": nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 9, 5, "valid")),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_needs_no_substitute_has_none(name: str) -> None:
    x = maps()
    model = Around(KEPT[name], x).eval()
    prepared = prepare(model, x, last=False)
    traced = prepared.module.traced
    assert all(traced.moving(node) is None for node in traced.substitutes)  # constants at most
    torch.testing.assert_close(prepared.module(x[:1])[0], model(x[:1]))


class Chain(nn.Sequential):
    """Functions with a convolution between each two."""

    def __init__(self, *names: str) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        for name in names:
            layers += [Wrapped(FUNCTIONS[name]), nn.Conv2d(8, 8, 3, padding=1)]
        super().__init__(*layers)


class Wrapped(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "names",
    [
        ("maximum", "maximum of relu", "average, no padding counted", "average, divisor"),
        ("adaptive, dividing", "adaptive maximum"),
        ("leaky relu", "prelu", "hardtanh", "clamp", "abs"),
        ("elu", "selu", "reversed"),
        ("mish", "softplus", "softplus, steep", "log sigmoid"),
        ("normalized", "batch norm", "affine"),
        ("transposed, output padding", "transposed, dilated", "nearest, half"),
        ("transposed, grouped", "transposed, norm"),
        ("normalize", "mean of channels", "deviation, biased", "root"),
        ("wide stride, padded before", "wide stride"),
    ],
    ids=lambda names: names[0],
)
def test_the_npu_runs_all_of_it(names: tuple[str, ...], tmp_path: Path) -> None:
    result = exported(Chain(*names), maps(32), tmp_path)
    assert cpu_operators(result) == []
    assert result.float_operators == ()
    assert "TRANSPOSE" not in result.operators
    assert result.sqnr_db is not None
    assert result.sqnr_db > 24
    if names[0] == "elu":  # tflite-micro has no EXP in int8
        assert result.micro_difference is None
    else:
        assert result.micro_difference is not None
        assert result.micro_difference <= 1


def test_the_npu_runs_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pools = nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 2, 1, count_include_pad=False)
    wide = nn.Conv1d(8, 8, 9, 5, 4), nn.BatchNorm1d(8), nn.ReLU()
    same = nn.Conv1d(8, 8, 5, padding="same"), nn.BatchNorm1d(8), nn.ReLU()
    reflecting = nn.Conv1d(8, 4, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), *pools, *wide, *same, reflecting)
    result = exported(cluster_(model, 8, codebook_dtype="int8"), torch.randn(8, 3, 128), tmp_path)
    assert cpu_operators(result) == []
    assert result.float_operators == ()
    assert len(result.tensors) == 4
    assert result.micro_difference is not None
    assert result.micro_difference <= 1
    assert result.sqnr_db is not None
    assert result.sqnr_db > 24


def test_nearest_resizing_is_right_at_any_ratio(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=1.5))
    result = exported(model, maps(), tmp_path)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30  # 1.1 as the converter has it


def test_a_normalization_is_one_depthwise_convolution(tmp_path: Path) -> None:
    result = exported(
        nn.Sequential(Wrapped(Normalized())), torch.rand(8, 8, 16, 16) * 255, tmp_path
    )
    assert result.operators == {"DEPTHWISE_CONV_2D": 1}


def test_a_vector_of_zeros_leaves_the_other_lengths_their_codes(tmp_path: Path) -> None:
    """Its inverse length is 1e12 in float, and the largest code in int8."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    x[::5] = 0
    result = exported(Wrapped(lambda y: F.normalize(y, dim=1)), x, tmp_path)
    assert cpu_operators(result) == []
    assert result.micro_difference == 0
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25


def test_wide_strides_of_one_channel_are_a_convolution(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 5, 4), nn.ReLU())
    result = exported(model, maps(17)[:, :1], tmp_path)
    assert result.operators == {"CONV_2D": 1}
    assert cpu_operators(result) == []
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_over_pixels_is_one_mean_on_the_npu(name: str, tmp_path: Path) -> None:
    x = maps()
    model = Around(AVERAGES[name], x)
    result = exported(model, x, tmp_path)
    assert result.operators["MEAN"] == 1
    assert "TRANSPOSE" not in result.operators
    assert cpu_operators(result) == []
    assert result.sqnr_db is not None
    assert result.sqnr_db > 38


def test_a_mean_that_is_read_twice_keeps_its_steps() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.mean(3)
            return rows.mean(2) + rows.amax(2)

    x = maps(count=1)
    torch.testing.assert_close(prepare(Twice(), x, last=False).module(x)[0], Twice()(x))


class Residual(nn.Module):
    """A padding as other frameworks have it, "same" at stride 2, of a map with another reader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3)
        self.side = nn.Conv2d(8, 8, 1, stride=2)
        self.conv = nn.Conv2d(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(F.pad(x, (1, 1, 1, 1))))
        return self.side(x) + self.conv(F.leaky_relu(F.pad(x, (0, 1, 0, 1)) * 0.5, 0.3))


def test_a_padded_map_is_not_transposed(tmp_path: Path) -> None:
    result = exported(Residual(), maps(), tmp_path)
    assert "TRANSPOSE" not in result.operators
    assert result.operators["PAD"] == 1
    assert result.sqnr_db is not None
    assert result.sqnr_db > 35


@pytest.mark.parametrize("name", ["mish", "softplus", "softplus, steep", "log sigmoid"])
@pytest.mark.parametrize("width", [1.0, 4.0, 8.0])
def test_curves_are_within_two_codes(name: str, width: float, tmp_path: Path) -> None:
    """Of the best that int8 can do, which is half a code; each of some ten operators rounds too."""
    x = torch.linspace(-width, width, 256).view(1, 4, 8, 8)
    result = exported(Wrapped(FUNCTIONS[name]), x, tmp_path)
    run = Runner(result.path.read_bytes())
    (source,), (target,) = result.inputs, result.outputs
    given = (torch.round(x / source.scale)) * source.scale
    (got,) = run((given.permute(0, 2, 3, 1).contiguous(),))
    away = torch.from_numpy(got).permute(0, 3, 1, 2) - FUNCTIONS[name](given)
    assert float(away.abs().max()) <= 2 * target.scale
    assert float(away.abs().mean()) <= 0.6 * target.scale


@pytest.mark.parametrize("codebook", ["int8", "float32"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=2),
        lambda: nn.ConvTranspose2d(8, 12, 3, 2, dilation=2),
        lambda: nn.ConvTranspose2d(8, 12, 3, 2, 1, dilation=2, groups=4),
    ],
)
def test_transposed_convolutions_keep_their_codes(
    layer: Callable[[], nn.Module], codebook: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), layer(), nn.BatchNorm2d(12)).eval()
    if codebook == "int8":
        model[3].weight.data[::2] *= -1
    cluster_(model, 8, codebook_dtype=codebook)
    result = exported(model, maps(), tmp_path)
    rows = [row for row in result.tensors if row.parameter == "2.weight"]
    assert len(rows) == model[2].groups
    dilated = model[2].dilation != (1, 1)
    for row in rows:  # the zeros between the weights of a dilated kernel are a code too
        assert row.codes_match
        assert row.int8_codes <= row.n_clusters <= 8 + (codebook == "float32" and dilated)
    assert cpu_operators(result) == []
