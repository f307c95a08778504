"""Files as written: every trained code, int8 throughout, the same answers in every runtime."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from export_networks import CASES, MUST_SHOW, Case, flattened, randomize_norms, resnet
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from torchclust import cluster_, named_clusterings, strip_
from torchclust.export import ExportError, TFLiteExport, backends, inspect_tflite, to_tflite, vela
from torchclust.export.graph import read_graph
from torchclust.export.runner import Runner

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Exported:
    model: nn.Module
    result: TFLiteExport
    images: Tensor

    @property
    def path(self) -> Path:
        return self.result.path


def interpreter(path: Path, *, keep_all: bool = False) -> Interpreter:
    found = Interpreter(
        str(path),
        experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=keep_all,
    )
    found.allocate_tensors()
    return found


def weights(path: Path) -> dict[str, tuple[Array, Array]]:
    """Every int8 constant with a scale per channel, and its scales, as LiteRT itself reads them."""
    runtime = interpreter(path)
    return {
        detail["name"]: (
            runtime.get_tensor(detail["index"]),
            detail["quantization_parameters"]["scales"],
        )
        for detail in runtime.get_tensor_details()
        if detail["dtype"] is np.int8 and len(detail["quantization_parameters"]["scales"]) > 1
    }


@pytest.fixture(scope="module", params=MUST_SHOW)
def mobile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(1)
    model = randomize_norms(MUST_SHOW[request.param]())
    cluster_(model, 16, codebook_dtype="int8")
    images = torch.randn(24, 3, 32, 32)
    path = tmp_path_factory.mktemp("mobile") / "int8.tflite"
    result = to_tflite(model, images, path, calibration=[images])
    return Exported(model, result, images)


def test_every_clustered_tensor_holds_the_trained_codes(mobile: Exported) -> None:
    clusterings = dict(named_clusterings(mobile.model))
    stored = weights(mobile.path)
    assert [row.parameter for row in mobile.result.tensors] == list(clusterings)
    for row in mobile.result.tensors:
        codes, _ = stored[row.name]
        trained = clusterings[row.parameter].codes
        assert trained is not None
        assert set(np.unique(codes)) <= set(trained.tolist())
        assert len(np.unique(codes)) == row.int8_codes <= row.n_clusters == 16
        assert row.codes_match


def folded(model: nn.Module) -> Iterator[tuple[str, Array]]:
    """Convolutions with the BatchNorm behind them, computed here, as (O, H, W, I)."""
    modules = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    for (name, conv), (_, norm) in itertools.pairwise(modules):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weight = conv.weight * factor[:, None, None, None]
            yield f"{name}.weight", weight.detach().permute(0, 2, 3, 1).numpy()


def test_weights_equal_batchnorm_folded_by_hand(mobile: Exported) -> None:
    plain = strip_(copy.deepcopy(mobile.model)).eval()
    expected = dict(folded(plain))
    stored, checked = weights(mobile.path), 0
    for row in mobile.result.tensors:
        if row.parameter in expected:
            codes, scales = stored[row.name]
            back = codes * scales[:, None, None, None]
            want = expected[row.parameter]
            # A channel folded to next to 0 keeps its codes under the least scale a bias allows.
            np.testing.assert_allclose(back[4:], want[4:], rtol=1e-5, atol=1e-12)
            assert np.abs(back[:4]).max() < 1e-4
            checked += 1
    assert checked >= 4


def test_nothing_is_left_to_the_cpu(mobile: Exported, tmp_path: Path) -> None:
    assert mobile.result.float_operators == ()
    assert "TRANSPOSE" not in mobile.result.operators
    assert {p.dtype for p in (*mobile.result.inputs, *mobile.result.outputs)} == {"int8"}
    for accelerator in ("ethos-u55-128", "ethos-u85-256"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # unclustered depthwise layers
            report = vela(mobile.path, accelerator=accelerator, output_dir=tmp_path)
        assert (report.cpu_ops, report.cpu_operators) == (0, ())


def test_reference_kernels_and_tflite_micro_agree_to_the_bit(mobile: Exported) -> None:
    """Every operator's output, not the last one's only."""
    from tflite_micro.python.tflite_micro import runtime

    keep = runtime.InterpreterConfig.kPreserveAllTensors
    micro = runtime.Interpreter.from_file(str(mobile.path), intrepreter_config=keep)
    litert = interpreter(mobile.path, keep_all=True)
    graph = read_graph(mobile.path.read_bytes())
    seen = set()
    for _ in range(20):
        image = np.random.default_rng(len(seen)).integers(-128, 128, (1, 32, 32, 3), np.int8)
        micro.set_input(image, 0)
        micro.invoke()
        litert.set_tensor(litert.get_input_details()[0]["index"], image)
        litert.invoke()
        for operator in graph.operators:
            answer = litert.get_tensor(operator.outputs[0])
            other = np.asarray(micro.GetTensor(operator.outputs[0], 0)["tensor_data"])
            np.testing.assert_array_equal(other.ravel(), answer.ravel(), err_msg=operator.name)
        seen.add(answer.tobytes())
    assert len(seen) > 10  # a network that answers alike to everything would prove nothing


def test_outputs_are_those_of_the_float_model(mobile: Exported) -> None:
    litert = interpreter(mobile.path)
    (source,), (target,) = litert.get_input_details(), litert.get_output_details()
    model = copy.deepcopy(mobile.model).eval()
    wanted, got = [], []
    for image in mobile.images[:8]:
        scale, zero = source["quantization"]
        q = torch.round(image.permute(1, 2, 0)[None] / scale + zero).clamp(-128, 127)
        litert.set_tensor(source["index"], q.to(torch.int8).numpy())
        litert.invoke()
        scale, zero = target["quantization"]
        got.append((litert.get_tensor(target["index"]).astype(np.float64) - zero) * scale)
        with torch.no_grad():
            wanted.append(model(image[None]).numpy())
    signal, noise = np.square(wanted).sum(), np.square(np.subtract(wanted, got)).sum()
    assert signal > 300 * noise
    assert mobile.result.sqnr_db is not None
    assert mobile.result.sqnr_db > 25
    assert mobile.result.top1_agreement is not None
    assert mobile.result.top1_agreement >= 0.9
    assert mobile.result.calibration_samples == 21
    assert mobile.result.compared_samples == 3
    assert mobile.result.micro_difference == 0


@pytest.fixture(scope="module", params=CASES)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Case, Exported]:
    torch.manual_seed(0)
    case: Case = CASES[request.param]
    model = cluster_(randomize_norms(case.build(), tiny=False), 8, codebook_dtype="int8")
    calibration = [case.inputs(seed) for seed in range(64)]
    path = tmp_path_factory.mktemp("case") / "int8.tflite"
    with warnings.catch_warnings():
        if case.vocabulary:  # a scale per row of a table, of which tflite-micro reads one
            warnings.filterwarnings("ignore", "tflite-micro answers otherwise", UserWarning)
        result = to_tflite(strip_(model), case.inputs(0), path, calibration=calibration)
    return case, Exported(model, result, torch.empty(0))


def test_every_construct_keeps_its_codes(case: tuple[Case, Exported], tmp_path: Path) -> None:
    expected, exported = case
    result = exported.result
    weights = {n for n, p in exported.model.named_parameters() if p.ndim > 1}
    assert {row.parameter for row in result.tensors} == weights
    assert all(row.codes_match and row.int8_codes <= row.n_clusters <= 7 for row in result.tensors)
    assert tuple(p.shape for p in result.inputs) == expected.reads
    assert tuple(p.shape for p in result.outputs) == expected.writes
    inputs = "int32" if expected.vocabulary else "int8"
    assert {p.dtype for p in result.inputs} == {inputs}
    assert {p.dtype for p in result.outputs} == {"int8"}
    assert {row.operator for row in result.float_operators} == set(expected.on_cpu)
    assert result.operators.get("TRANSPOSE", 0) == expected.transposes
    assert result.sqnr_db is not None
    assert result.sqnr_db > 22  # of samples that calibration has not seen
    report = vela(result.path, output_dir=tmp_path)
    assert {row.operator for row in report.cpu_operators} == set(expected.on_cpu)
    assert report.cpu_ops == len(report.cpu_operators)


def small(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), *([nn.BatchNorm2d(8)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 16, 4))


IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "options",
    [
        {"n_clusters": 4},
        {"n_clusters": 16, "assignment": "nearest"},
        {"n_clusters": 4, "granularity": "channel"},
        {"n_clusters": 4, "granularity": "group", "group_size": 3},
    ],
    ids=lambda o: o.get("granularity", o.get("assignment", "fixed")),
)
def test_a_float_codebook_keeps_its_clusters(options: dict[str, Any], tmp_path: Path) -> None:
    model = small(norm=True)
    model[1].weight.data.uniform_(0.1, 3)
    cluster_(model, {"*": options})
    result = to_tflite(model, IMAGES, tmp_path / "a.tflite", calibration=[IMAGES])
    assert [r.parameter for r in result.tensors] == ["0.weight", "4.weight"]
    assert all(r.codes_match and r.int8_codes <= r.n_clusters for r in result.tensors)
    if "granularity" not in options:
        for row, found in zip(result.tensors, inspect_tflite(result.path), strict=True):
            assert row.int8_codes == found.codes <= options["n_clusters"]


def test_a_mirrored_float_codebook_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = small(norm=True)
    model[1].weight.data[::2] *= -1
    path = tmp_path / "a.tflite"
    path.write_bytes(b"the old file")
    with pytest.raises(
        ExportError, match=r"'0.weight' would have 1[56] codes for 8 clusters"
    ) as info:
        to_tflite(cluster_(model, 8), IMAGES, path, calibration=[IMAGES])
    assert "negative for 4 of its 8 channels" in str(info.value)
    assert 'codebook_dtype="int8"' in str(info.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tflite"]
    assert path.read_bytes() == b"the old file"


def test_values_that_only_look_clustered_may_be_mirrored(tmp_path: Path) -> None:
    """A filter that blurs, before a norm with negative factors; one that was clustered is told."""
    blur, norm = nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.BatchNorm2d(4)
    blur.weight.data[:] = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
    norm.weight.data[::2] *= -1
    model = nn.Sequential(nn.Conv2d(3, 4, 1), blur, norm).eval()
    result = to_tflite(model, IMAGES, tmp_path / "a.tflite", calibration=[IMAGES])
    assert result.tensors == ()
    assert result.sqnr_db is not None
    assert result.sqnr_db > 24
    model = small(norm=True)
    model[1].weight.data[::2] *= -1
    strip_(cluster_(model, {"0.weight": 8}))
    with pytest.warns(UserWarning, match=r"'0.weight' would have .* codes, if it was clustered"):
        result = to_tflite(model, IMAGES, tmp_path / "a.tflite", calibration=[IMAGES])
    assert result.tensors == ()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("disk full")

    path = tmp_path / "a.tflite"
    path.write_bytes(b"the old file")
    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        to_tflite(small(), IMAGES, path, calibration=None, float=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tflite"]
    assert path.read_bytes() == b"the old file"


def test_a_tensor_of_samples_calibrates_as_its_batches_do(tmp_path: Path) -> None:
    for name, calibration in (("tensor", IMAGES), ("batches", IMAGES.split(5))):
        result = to_tflite(small(), IMAGES, tmp_path / name, calibration=calibration)
        assert result.calibration_samples == 14 == len(IMAGES) - result.compared_samples
    assert (tmp_path / "tensor").read_bytes() == (tmp_path / "batches").read_bytes()


@pytest.mark.parametrize("calibration", [{"x": IMAGES}, 16])
def test_one_batch_is_no_iterable_of_batches(calibration: Any, tmp_path: Path) -> None:
    got = type(calibration).__name__
    match = rf"calibration must be an iterable .*, got {got}\. .* list:  calibration=\[batch\]"
    with pytest.raises(TypeError, match=match):
        to_tflite(small(), IMAGES, tmp_path / "a.tflite", calibration=calibration)


def test_clustered_and_stripped_models_export_alike(tmp_path: Path) -> None:
    model = randomize_norms(resnet())
    cluster_(model, 16, codebook_dtype="int8")
    files = []
    for name in ("clustered", "stripped"):
        path = tmp_path / name
        to_tflite(model, torch.ones(1, 3, 8, 8), path, calibration=[torch.randn(4, 3, 8, 8)])
        files.append({n: w for n, (w, _) in weights(path).items()})
        strip_(model)
    assert files[0].keys() == files[1].keys()
    for name, codes in files[0].items():
        # A channel's codes are known up to a factor; equal up to it, and no more of them.
        assert len(np.unique(codes)) >= len(np.unique(files[1][name]))
        assert np.array_equal(codes == 0, files[1][name] == 0)


def test_a_stripped_part_keeps_its_codes_beside_a_clustered_one(tmp_path: Path) -> None:
    """A backbone that was clustered once, and a new head."""
    model = cluster_(small(), {"0.weight": 8}, codebook_dtype="int8")
    strip_(model)
    cluster_(model, {"*": 4, "0.weight": None}, codebook_dtype="int8")
    result = to_tflite(model, IMAGES[:1], tmp_path / "a.tflite", calibration=[IMAGES])
    assert {row.parameter: row.int8_codes for row in result.tensors} == {
        "0.weight": 7,
        **{name: 3 for name, _ in named_clusterings(model)},
    }
    assert len(result.tensors) == 2


def test_a_layer_of_zeros_is_nobodys(tmp_path: Path) -> None:
    """It is a multiple of every clustered weight of its shape."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(*layers)
    layers[0].weight.data.zero_()
    cluster_(model, {"1.weight": 8}, codebook_dtype="int8")
    result = to_tflite(model, IMAGES[:1], tmp_path / "a.tflite", calibration=[IMAGES])
    assert [(row.parameter, row.int8_codes) for row in result.tensors] == [("1.weight", 7)]


def test_a_float_file_may_answer_with_infinity(tmp_path: Path) -> None:
    """As where classes are masked."""

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(torch.tensor([False, True, False]), -torch.inf)

    x = torch.rand(4, 5)
    result = to_tflite(Masked(5, 3), x[:1], tmp_path / "a.tflite", calibration=[x], float=True)
    assert result.sqnr_db is not None
    assert result.sqnr_db > 100


# torch 2.13's compiler imports its own deprecated torch.jit, 2026-11.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["clustered", "plain", "training", "half", "compiled"])
def test_any_model_exports_and_stays_as_it_is(mode: str, tmp_path: Path) -> None:
    model: nn.Module = small(norm=True)
    if mode != "plain":
        cluster_(model, 16, codebook_dtype="int8")
    model.train(mode == "training")
    model(IMAGES).sum().backward()
    if mode == "half":
        model.bfloat16()
    if mode == "compiled":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loader = DataLoader(TensorDataset(IMAGES, torch.arange(16)), batch_size=5)
    result = to_tflite(model, IMAGES[:2], tmp_path / "a.tflite", calibration=loader)
    assert len(result.tensors) == (0 if mode == "plain" else 2)
    assert result.calibration_samples == 14
    assert model.training == (mode == "training")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse"])
def test_ranges_are_chosen_as_asked(ranges: Any, tmp_path: Path) -> None:
    images = IMAGES.repeat(8, 1, 1, 1)
    images[0, 0, 0, 0] = 40  # an outlier
    path = tmp_path / "a.tflite"
    result = to_tflite(small(), IMAGES, path, calibration=[images], ranges=ranges)
    (port,) = result.inputs
    top = (127 - port.zero_point) * port.scale
    assert (top > 39) == (ranges != "percentile")


def test_channels_first_keeps_the_models_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.tflite"
    result = to_tflite(small(), IMAGES, path, calibration=[IMAGES], channels_last=False)
    assert [p.shape for p in result.inputs] == [(1, 3, 6, 6)]
    assert result.operators["TRANSPOSE"] == 1
    assert result.sqnr_db is not None
    assert result.sqnr_db > 30


@pytest.mark.parametrize("calibration", [None, [IMAGES]])
def test_a_float_file_computes_what_the_model_computes(calibration: Any, tmp_path: Path) -> None:
    model = cluster_(flattened(), 16)
    images = torch.randn(4, 3, 16, 16)
    calibration = calibration and [images]
    path = tmp_path / "a.tflite"
    result = to_tflite(model, images, path, calibration=calibration, float=True)
    assert {p.dtype for p in (*result.inputs, *result.outputs)} == {"float32"}
    assert [(r.parameter, r.int8_codes) for r in result.tensors] == [
        ("0.weight", None),
        ("5.weight", None),
        ("7.weight", None),
    ]
    assert [row.codes for row in inspect_tflite(path)] == [16, 16, 16]
    runtime = interpreter(path)
    runtime.set_tensor(0, images[:1].permute(0, 2, 3, 1).contiguous().numpy())
    runtime.invoke()
    answer = runtime.get_tensor(runtime.get_output_details()[0]["index"])
    torch.testing.assert_close(torch.tensor(answer), model.eval()(images[:1]).detach())
    assert (result.sqnr_db is None) == (calibration is None)
    assert result.sqnr_db is None or result.sqnr_db > 100


def test_what_stays_in_float_is_listed_with_its_module(tmp_path: Path) -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x.relu() + 1)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Logarithm(), nn.Conv2d(8, 4, 1))
    result = to_tflite(model, IMAGES, tmp_path / "a.tflite", calibration=[IMAGES])
    found = {(row.operator, row.module) for row in result.float_operators}
    assert ("LOG", "1") in found
    report = vela(result.path)
    left = {(row.operator, row.module) for row in report.cpu_operators}
    assert ("LOG", "1") in left
    assert report.cpu_ops == len(report.cpu_operators)


def test_a_layer_that_cannot_be_int8_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers with weights the quantizer is known to leave none in float; one might."""
    monkeypatch.setattr("torchclust.export.tflite.quantize", lambda content, *_: bytes(content))
    match = r"'0.weight' \(CONV_2D\) is not int8 in the file"
    with pytest.raises(ExportError, match=match):
        to_tflite(cluster_(small(), 4), IMAGES, tmp_path / "a.tflite", calibration=[IMAGES])
    assert list(tmp_path.iterdir()) == []


def test_what_litert_or_its_quantizer_refuses_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is known that gets this far; a damaged file and a failing quantizer do."""
    with pytest.raises(ExportError, match=r"LiteRT cannot run this file: .*\n.*sort or topk"):
        Runner(b"no file of that format at all")

    def fails(*_: object, **__: object) -> None:
        raise ValueError("parameters for tensor missing")

    monkeypatch.setattr(backends.quantizer()[0].Quantizer, "quantize", fails)
    with pytest.raises(ExportError, match="the quantizer cannot quantize this model: parameters"):
        to_tflite(
            nn.Linear(8, 8), torch.randn(4, 8), tmp_path / "a", calibration=[torch.randn(4, 8)]
        )
    assert list(tmp_path.iterdir()) == []


def test_a_clustered_weight_that_the_converter_changes_is_refused(tmp_path: Path) -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.linear.weight**2 + 1).T

    match = r"no weight of the converted file is 'linear.weight' \(8, 8\)"
    images = torch.randn(2, 8)
    with pytest.raises(ExportError, match=match):
        to_tflite(cluster_(Squared(), 4), images, tmp_path / "a", calibration=[images])
    with pytest.warns(UserWarning, match=match + ".*, if it was clustered: it holds few values"):
        to_tflite(strip_(cluster_(Squared(), 4)), images, tmp_path / "a", calibration=[images])


def test_what_the_converter_cannot_take_is_one_error(tmp_path: Path) -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(x)

    with pytest.raises(ExportError, match=r"litert-torch cannot convert Unsupported: "):
        to_tflite(Unsupported(), IMAGES, tmp_path / "a", calibration=[IMAGES])


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: x.topk(2).values, "becomes STABLEHLO_SORT, which has no int8 form"),
        (
            lambda x: x.scatter(1, torch.zeros(1, 1, dtype=torch.long), 1.0),
            "becomes STABLEHLO_SCATTER, which has no int8 form",
        ),
    ],
)
def test_what_litert_and_its_quantizer_cannot_take_is_one_error(
    function: Callable[[Tensor], Tensor], match: str, tmp_path: Path
) -> None:
    class Unsupported(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return function(super().forward(x))

    x = torch.randn(4, 8)
    with pytest.raises(ExportError, match=match):
        to_tflite(Unsupported(nn.Linear(8, 8)), x, tmp_path / "a", calibration=[x])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"calibration": None}, ValueError, r"an int8 file needs calibration data, got None"),
        ({"calibration": []}, ValueError, r"calibration is empty"),
        ({"calibration": iter(())}, ValueError, r"calibration is empty"),
        ({"calibration": [IMAGES * torch.nan]}, ValueError, r"batch 0, input 0 holds NaN"),
        (
            {"calibration": [IMAGES], "ranges": "max"},
            ValueError,
            r"ranges must be one of 'minmax', 'percentile', 'mse', got 'max'",
        ),
        (
            {"calibration": [IMAGES], "path": "missing/a.tflite"},
            FileNotFoundError,
            r"the folder .*missing does not exist",
        ),
        (
            {"calibration": [IMAGES], "path": "."},
            IsADirectoryError,
            r"it is a folder; name a file in it",
        ),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], match: str, tmp_path: Path
) -> None:
    path = tmp_path / arguments.pop("path", "a.tflite")
    with pytest.raises(error, match=match):
        to_tflite(small(), IMAGES, path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_to_the_terminal(tmp_path: Path) -> None:
    code = (
        "import torch, sys; from torchclust.export import to_tflite, vela, inspect_tflite\n"
        "assert not {'litert_torch', 'ai_edge_litert', 'ethosu'} & set(sys.modules)\n"
        "x = torch.randn(2, 3, 6, 6)\n"
        f"to_tflite(torch.nn.Conv2d(3, 4, 3), x, r'{tmp_path}/a.tflite', calibration=[x])\n"
        f"vela(r'{tmp_path}/a.tflite')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", ["litert_torch", "ai_edge_quantizer", "ai_edge_litert"])
def test_a_missing_package_names_the_extra(
    missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install .torchclust\[export\]"):
        to_tflite(small(), IMAGES, tmp_path / "a", calibration=[IMAGES])


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_whatever_happens(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with contextlib.suppress(ExportError), backends.uncollected():
            assert not gc.isenabled()
            raise ExportError("no")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_quantizers_new_name_serves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.quantizer()
    new = "litert_quantizer"
    for name in ("", ".quantizer", ".recipe", ".qtyping"):
        monkeypatch.setitem(sys.modules, new + name, types.ModuleType(new + name))
        monkeypatch.setitem(sys.modules, "ai_edge_quantizer" + name, None)
    found = [module.__name__ for module in backends.quantizer()]
    assert found == [f"{new}.quantizer", f"{new}.recipe", f"{new}.qtyping"]


def test_third_party_noise_is_shown_when_it_failed(capfd: pytest.CaptureFixture[str]) -> None:
    def noisy(fail: bool) -> None:
        with backends.quietly():
            print("from deep inside", file=sys.stderr, flush=True)
            warnings.warn("and a warning", stacklevel=1)
            if fail:
                raise RuntimeError("broken")

    noisy(False)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(RuntimeError, match="broken"):
        noisy(True)


def test_inspection_prints_and_indexes(mobile: Exported) -> None:
    found = inspect_tflite(mobile.path)
    assert len(found) == len(list(found)) == len(found.rows)
    text = str(found)
    assert f"{found[0].operator:<18}" in text
    assert "int8 1x32x32x3, scale" in text
    for row in found:
        assert row.dtype == "int8"
        assert row.scales == row.scale_values.size > 1
        assert 0 <= row.entropy_bits <= np.log2(row.codes) + 1e-9
    assert found.size_bytes == mobile.path.stat().st_size == mobile.result.size_bytes


@pytest.mark.parametrize("content", [b"", b"garbage that is no flatbuffer"])
def test_inspecting_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tflite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.tflite: not a TFLite file"):
        inspect_tflite(path)


@pytest.mark.parametrize("stripped", [False, True])
def test_a_clustered_bias_is_no_weight_with_codes(stripped: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 8))
    cluster_(model.eval(), {"*": 5, "*.bias": 3}, codebook_dtype="int8")
    if stripped:
        strip_(model)
    images = torch.randn(16, 2, 6, 6)
    done = to_tflite(model, images[:1], tmp_path / "m.tflite", calibration=[images])
    assert [row.parameter for row in done.tensors] == ["0.weight", "3.weight"]
    assert done.sqnr_db is not None
    assert done.sqnr_db > 25


class Standardized(nn.Conv2d):
    """Its weights have mean 0 and variance 1 in every channel, computed with every forward."""

    def standardized(self) -> Tensor:
        flat = self.weight.flatten(1)
        flat = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return flat.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.standardized(), self.bias)


def test_a_weight_that_is_computed_from_the_parameter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, x = Standardized(3, 8, 3), torch.randn(8, 3, 8, 8)
    plain = nn.Conv2d(3, 8, 3)
    plain.weight.data = layer.standardized().detach()
    match = r"no weight of .* is '0.weight' \(8, 3, 3, 3\).*as weight standardization does. Put"
    model = cluster_(nn.Sequential(layer), 8, codebook_dtype="int8")
    with pytest.raises(ExportError, match=match):
        to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    model = cluster_(nn.Sequential(plain), 8, codebook_dtype="int8")
    result = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    assert result.tensors[0].codes_match


def test_layers_that_are_copies_of_each_other_are_one_in_the_file(tmp_path: Path) -> None:
    """As those of an untrained nn.TransformerEncoder: nothing is missing, and nothing is said."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16), torch.randn(64, 16)
    model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer), nn.ReLU(), nn.Linear(16, 4))
    cluster_(model.eval(), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = to_tflite(model, x[:1], tmp_path / "a.tflite", calibration=[x])
    assert [row.parameter for row in done.tensors] == ["0.weight", "4.weight"]
