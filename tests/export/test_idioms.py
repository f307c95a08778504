"""Copies, products, maxima and statistics as networks write them: right, and all on the NPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.export import TFLiteExport, to_tflite, vela
from torchclust.export.layout import prepare

Function = Callable[[Tensor], Tensor]

GENERATOR = torch.Generator().manual_seed(0)
MATRIX, HEADS, VECTOR = (
    torch.randn(shape, generator=GENERATOR) / 4 for shape in ((8, 8), (4, 2, 2), (64,))
)


def trained(norm: nn.Module) -> nn.Module:
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return norm.eval()


CHANNELS = trained(nn.GroupNorm(2, 8))
INSTANCES = trained(nn.InstanceNorm2d(8, affine=True))
TRACKED = trained(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))
WHOLE = trained(nn.LayerNorm([8, 8, 8]))


def pixels(y: Tensor) -> Tensor:
    return y.mean((2, 3), keepdim=True)


def heads(y: Tensor) -> Tensor:
    return y.view(-1, 4, 2, 64)


def standardized(y: Tensor) -> Tensor:
    variance, mean = torch.var_mean(y, (2, 3), keepdim=True)
    return (y - mean) * torch.rsqrt(variance + 1e-3)


# All take and give maps of 8 channels and 8 x 8 pixels.
FUNCTIONS: dict[str, Function] = {
    "expand as": lambda y: y * pixels(y).expand_as(y),
    "expand in front": lambda y: pixels(y).expand(-1, -1, 8, 8) + y,
    "expand, joined": lambda y: torch.cat([y[:, 4:], pixels(y[:, :4]).expand(-1, -1, 8, 8)], 1),
    "expand, both": lambda y: pixels(y).expand_as(y) + pixels(y.relu()).expand_as(y),
    "broadcast": lambda y: torch.broadcast_to(y[:, :1], y.shape),
    "repeat": lambda y: y[:, :4].repeat(1, 2, 1, 1),
    "repeat, two axes": lambda y: y[:, :, :4, :4].repeat(1, 1, 2, 2),
    "repeat interleave": lambda y: y[:, :4].repeat_interleave(2, 1),
    "repeat interleave, flat": lambda y: y[:, :4].repeat_interleave(2).view(y.shape),
    "tile": lambda y: torch.tile(y[..., :4], (2,)),
    "circular": lambda y: (
        F.pad(y, (1, 2, 1, 0), mode="circular")[:, :, :8, :8]
        + F.pad(y, (0, 2, 0, 1), mode="circular")[:, :, 1:, 2:]
    ),
    "maximum of channels": lambda y: y - y.max(1, keepdim=True)[0],
    "maximum of channels, dropped": lambda y: y - y.max(1)[0][:, None],
    "maximum of pixels": lambda y: y * y.flatten(2).max(-1)[0][..., None, None],
    "maximum of a sequence": lambda y: y * (y.flatten(2) * 2).amax(2)[..., None, None],
    "maximum of heads": lambda y: (heads(y) - heads(y).amax(3, keepdim=True)).view(y.shape),
    "matrix in front": lambda y: (MATRIX @ y.flatten(2)).view(y.shape),
    "matrix in front, bmm": lambda y: torch.bmm(MATRIX[None], y.flatten(2)).view(y.shape),
    "matrices in front": lambda y: (HEADS @ heads(y)).view(y.shape),
    "matrices behind": lambda y: (heads(y).mT @ HEADS).mT.reshape(y.shape),
    "vector behind": lambda y: y * (y.flatten(2) @ VECTOR)[..., None, None],
    "sum of products": lambda y: y * torch.einsum("bchw->bc", y)[..., None, None] / 64,
    "cosine": lambda y: y * F.cosine_similarity(y, y.relu(), dim=1)[:, None],
    "norm of heads": lambda y: F.normalize(heads(y), dim=-1).reshape(y.shape),
    "mean of heads": lambda y: (heads(y) - heads(y).mean(-1, keepdim=True)).reshape(y.shape),
    "sum over heads": lambda y: (heads(y) * heads(y).sum(1, keepdim=True)).reshape(y.shape),
    "group norm": CHANNELS,
    "instance norm": INSTANCES,
    "instance norm, tracked": TRACKED,
    "layer norm of maps": WHOLE,
    "layer norm, no shift": trained(nn.LayerNorm([8, 8, 8], bias=False)),
    "group norm, plain": lambda y: F.group_norm(y, 8),
    "rms norm": lambda y: F.rms_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2),
    "tokens, averaged": lambda y: (
        y * pixels(F.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2))
    ),
    "tokens, pooled": lambda y: (
        y * F.adaptive_avg_pool2d(F.layer_norm(y.permute(0, 2, 3, 1), (8,)).permute(0, 3, 1, 2), 1)
    ),
    "softmax of rows": lambda y: y.softmax(2),
    "softmax of heads": lambda y: heads(y).softmax(1).view(y.shape),
    "maximum, adaptive": lambda y: y * F.adaptive_max_pool1d(y.flatten(2), 1)[..., None],
    "maximum, adaptive, two": lambda y: (
        F.adaptive_max_pool1d(y.flatten(2), 8).repeat_interleave(8, 2).view(y.shape)
    ),
    "column behind": lambda y: (
        y * (y.flatten(2) @ y.flatten(2).mean(1).softmax(-1)[..., None])[..., None]
    ),
    "nearest in a row": lambda y: F.interpolate(y.flatten(2)[:, :, :32], scale_factor=2).view(
        y.shape
    ),
    "variance": lambda y: y * y.var((2, 3), keepdim=True),
    "variance and mean": lambda y: standardized(y),
    "minimum": lambda y: torch.minimum(y, y * -0.5),
    "clip": lambda y: torch.clip(y, max=0.3),
    "cube": lambda y: y**3,
    "root": lambda y: y.relu() ** 0.5,
    "rrelu": nn.RReLU().eval(),
    "softshrink": nn.Softshrink(0.1),
    "celu": nn.CELU(0.5),
}


UNTOUCHED = ("matrices behind", "sum of products", "tokens, pooled")  # right in the float file


class Chain(nn.Module):
    """Functions between convolutions, behind each other."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.functions = [FUNCTIONS[name] for name in names]
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in names)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for function, conv in zip(self.functions, self.convs, strict=True):
            y = conv(function(y))
        return y


def images(count: int = 8) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def exported(model: nn.Module, folder: Path) -> TFLiteExport:
    return to_tflite(model.eval(), images(1), folder / "a.tflite", calibration=[images()])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_substitutes_compute_what_the_model_computes(name: str) -> None:
    model, x = Chain(name).eval(), images(1)
    prepared = prepare(model, x, last=False)
    assert prepared.module.traced.substitutes or name in UNTOUCHED
    torch.testing.assert_close(prepared.module(x)[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ("expand as", "expand in front", "expand, joined", "broadcast"),
        ("repeat", "repeat, two axes", "tile", "circular"),
        ("repeat interleave", "repeat interleave, flat"),
        ("maximum of channels", "maximum of channels, dropped", "maximum of pixels"),
        ("maximum of a sequence", "maximum of heads"),
        ("maximum, adaptive", "maximum, adaptive, two"),
        ("column behind",),
        ("nearest in a row",),
        ("variance", "variance and mean", "minimum", "clip"),
        ("matrix in front", "matrix in front, bmm", "vector behind"),
        ("matrices in front", "matrices behind"),
        ("cosine", "norm of heads", "mean of heads", "sum over heads"),
        ("group norm", "instance norm", "instance norm, tracked"),
        ("layer norm of maps", "rms norm"),
        ("tokens, averaged", "tokens, pooled"),
        ("softmax of rows", "softmax of heads"),
        ("cube", "root", "rrelu", "softshrink"),
        ("celu",),
    ],
    ids=lambda names: names[0],
)
def test_the_npu_runs_all_of_it(names: tuple[str, ...], tmp_path: Path) -> None:
    result = exported(Chain(*names), tmp_path)
    report = vela(result.path)
    assert [row.operator for row in report.cpu_operators] == []
    assert result.float_operators == ()
    assert result.sqnr_db is not None
    assert result.sqnr_db > 20
    if names[0] != "celu":  # tflite-micro has no EXP in int8
        assert result.micro_difference is not None
        assert result.micro_difference <= 1


def test_a_sum_that_the_converter_makes_does_not_saturate(tmp_path: Path) -> None:
    result = exported(Chain("sum of products"), tmp_path)
    assert "SUM" not in result.operators
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25  # 2 as LiteRT sums


def test_integers_are_left_alone(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(8, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(torch.minimum(ids.clamp(max=6), ids.repeat(1, 1))).amax(1))

    ids = torch.randint(0, 8, (8, 5), generator=torch.Generator().manual_seed(0))
    model = Tokens().eval()
    prepared = prepare(model, ids[:1], last=True)
    torch.testing.assert_close(prepared.module(ids[:1])[0], model(ids[:1]))


def test_which_one_is_the_largest_may_be_asked() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1)), images(1)

    class Asking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, places = model(x).max(1)
            return values + places

    prepared = prepare(Asking(), x, last=False)
    torch.testing.assert_close(prepared.module(x)[0], Asking()(x))


def test_a_matrix_in_front_keeps_its_codes(tmp_path: Path) -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mix = nn.Linear(8, 8, bias=False)
            self.stem = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix.weight @ self.stem(x).flatten(2)

    model = cluster_(Mixing(), {"*": 4}, codebook_dtype="int8")
    result = exported(model, tmp_path)
    codes = {row.parameter: row.int8_codes for row in result.tensors}
    assert set(codes) == {"mix.weight", "stem.weight"}
    assert all(count is not None and count <= 4 for count in codes.values())


def test_a_kernel_of_tflite_micro_that_ends_the_process_ends_no_export(tmp_path: Path) -> None:
    """The decomposition of logsumexp is such a file: to run it aborts."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Reduced(), nn.Conv2d(8, 4, 1))
    result = exported(model, tmp_path)
    assert result.micro_difference is None
    assert result.sqnr_db is not None


class Reduced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.logsumexp(1, keepdim=True)


@pytest.mark.parametrize("codebook_dtype", ["float32", "int8"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_trained_transformer_keeps_its_codes(
    tmp_path: Path, norm_first: bool, codebook_dtype: str
) -> None:
    """The converter folds a LayerNorm's gain into the columns of the linear layer behind it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
    model = nn.Sequential(layer, trained(nn.LayerNorm(16)), nn.Linear(16, 4)).eval()
    trained(layer.norm1), trained(layer.norm2)
    cluster_(model, 8, codebook_dtype=codebook_dtype)
    x = torch.randn(64, 12, 16)
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    assert len(result.tensors) == 5
    assert all(row.codes_match for row in result.tensors)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 25
    assert vela(result.path).cpu_operators == ()


@pytest.mark.parametrize("shape", [(8, 12, 16), (8, 16)])
@pytest.mark.parametrize("affine", [{}, {"bias": False}, {"elementwise_affine": False}])
def test_layer_norms_of_a_last_axis(shape: tuple[int, ...], affine: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(trained(nn.LayerNorm(16, eps=0.1, **affine)), nn.Linear(16, 4)).eval()
    x = 3 + torch.randn(shape)
    prepared = prepare(model, x, last=False)
    assert prepared.module.traced.substitutes
    torch.testing.assert_close(prepared.module(x)[0], model(x), rtol=1e-4, atol=1e-5)
