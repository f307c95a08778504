"""ExecuTorch programs: the trained codes in what Vela compiles, int8 ends, and clear errors.

`make test-executorch` runs these in an environment that has the extra. What needs nothing of it is
at the end and runs everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_networks import CASES, MUST_SHOW, Case, head, randomize_norms, resnet
from torch import Tensor, nn

from torchclust import ClusterConfig, cluster_, named_clusterings, strip_
from torchclust.activations.quantized import activation_ranges, quantize_activations_
from torchclust.export import (
    ExportError,
    PTEExport,
    VelaError,
    backends,
    layout,
    to_pte,
    to_tflite,
    vela,
)
from torchclust.export.accelerators import Configuration
from torchclust.export.executorch import lowering, packages
from torchclust.export.executorch.observed import layers, observe, observers
from torchclust.export.executorch.scales import calibrate, set_weights
from torchclust.export.executorch.stream import unverified
from torchclust.export.executorch.tosa import TosaFile
from torchclust.export.runner import Runner

INT8 = ClusterConfig(n_clusters=16, codebook_dtype="int8")
needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="make test-executorch"
)
IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def clustered(model: nn.Module, config: ClusterConfig = INT8) -> nn.Module:
    """All weights, depthwise ones too."""
    depthwise = {
        f"{name}.weight": config
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    }
    return cluster_(model, {"*": config, **depthwise}, strict=False).eval()


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), *head(8, 4))


@dataclasses.dataclass(frozen=True)
class Exported:
    model: nn.Module
    done: PTEExport
    folder: Path


@pytest.fixture(scope="module", params=MUST_SHOW)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = clustered(randomize_norms(MUST_SHOW[request.param]()))
    done = to_pte(model, IMAGES[:1], folder / "model.pte", calibration=[IMAGES])
    return Exported(model, done, folder)


@pytest.mark.executorch
@needs_executorch
def test_every_clustered_tensor_is_compiled_with_the_trained_codes(exported: Exported) -> None:
    """Histograms of magnitudes, against the clusterings and TOSA's own reading of the file."""
    trained = dict(named_clusterings(exported.model))
    rows = exported.done.tensors
    assert {row.parameter for row in rows} == set(trained)
    weights = {w.name: w for part in exported.done.run.parts for w in part.tosa.weights}  # type: ignore[attr-defined]
    assert len(weights) == len(rows)
    for row in rows:
        clustering = trained[row.parameter]
        weight = clustering.module.weight.detach()
        scale = clustering.scale.detach().reshape(-1, *[1] * (weight.ndim - 1))
        codes = (weight / scale).round().abs().int().numpy()
        found = np.abs(weights[row.name].matrix.astype(int))
        alive = found.any(axis=1)  # a channel that BatchNorm wiped out has one code, 0
        assert alive.sum() >= len(alive) - 4
        rows_of_codes = codes.reshape(len(codes), -1)[alive]
        assert np.array_equal(np.sort(rows_of_codes), np.sort(found[alive]))
        assert row.int8_codes <= 15
        assert row.codes_match


@pytest.mark.executorch
@needs_executorch
def test_a_program_is_as_small_as_the_file_of_the_other_road(exported: Exported) -> None:
    pytest.importorskip("litert_torch", reason="the other road's packages are not here")
    model, folder = exported.model, exported.folder
    file = to_tflite(model, IMAGES[:1], folder / "m.tflite", calibration=[IMAGES])
    on_u85 = "ethos-u85-256"
    other = to_pte(model, IMAGES[:1], folder / "u85.pte", calibration=[IMAGES], target=on_u85)
    for done, target in ((exported.done, "ethos-u55-128"), (other, on_u85)):
        assert done.unverified == ()
        # The file's MEAN is a kernel of ones to Vela, 100 to 300 bytes; the program's is not.
        theirs = vela(file.path, accelerator=target).encoded_weight_bytes
        assert theirs - 300 <= done.encoded_weight_bytes <= 1.02 * theirs
        ends = [(p.shape, p.dtype) for p in (*done.inputs, *done.outputs)]
        assert ends == [(p.shape, p.dtype) for p in (*file.inputs, *file.outputs)]


@pytest.mark.executorch
@needs_executorch
def test_a_program_is_as_exact_as_the_file_of_the_other_road(exported: Exported) -> None:
    pytest.importorskip("litert_torch", reason="the other road's packages are not here")
    file = to_tflite(exported.model, IMAGES[:1], exported.folder / "n.tflite", calibration=[IMAGES])
    images = torch.randn(64, *IMAGES.shape[1:], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = exported.model(images).numpy()
    noise = []
    for run in (exported.done.run, Runner(file.path.read_bytes(), reference=True)):
        outputs = [run((x[None].permute(0, 2, 3, 1).contiguous(),))[0] for x in images]
        noise.append(np.square(np.concatenate(outputs) - wanted).mean())
    assert 10 * np.log10(noise[0] / noise[1]) < 1  # decibels


@pytest.mark.executorch
@needs_executorch
def test_everything_runs_on_the_npu_in_int8(exported: Exported) -> None:
    done = exported.done
    assert done.cpu_operators == ()
    assert [p.dtype for p in (*done.inputs, *done.outputs)] == ["int8", "int8"]
    assert done.operators["CONV2D"] >= 5
    assert "TRANSPOSE" not in done.operators
    (report,) = done.compiled
    assert report.cpu_ops == 0
    assert report.vela_version == metadata.version("ethos-u-vela")
    assert done.cycles == report.cycles > 0
    assert done.size_bytes == done.path.stat().st_size > report.encoded_weight_bytes
    assert (done.calibration_samples, done.compared_samples) == (7, 1)
    assert done.sqnr_db > 30
    assert done.top1_agreement == 1


@pytest.mark.executorch
@needs_executorch
def test_executorchs_own_runtime_reads_the_program(exported: Exported) -> None:
    runtime = packages.load("executorch.runtime").Runtime.get()
    about = runtime.load_program(exported.done.path).metadata("forward")
    assert (about.num_inputs(), about.num_outputs()) == (1, 1)
    char = 1  # ScalarType.CHAR
    ends = about.input_tensor_meta(0), about.output_tensor_meta(0)
    assert [int(end.dtype()) for end in ends] == [char, char]
    assert [tuple(end.sizes()) for end in ends] == [(1, 16, 16, 3), (1, 10)]


@pytest.mark.executorch
@needs_executorch
def test_the_compiled_weights_lie_in_the_file(exported: Exported) -> None:
    content = exported.done.path.read_bytes()
    assert all(part.compiled in content for part in exported.done.run.parts)  # type: ignore[attr-defined]


@pytest.mark.executorch
@needs_executorch
def test_the_accelerator_decodes_the_trained_codes(exported: Exported) -> None:
    """Value by value, from Vela's streams; other weights, or a damaged stream, are noticed."""
    assert exported.done.unverified == ()
    (part,) = exported.done.run.parts  # type: ignore[attr-defined]
    weights = part.tosa.weights
    first = dataclasses.replace(weights[0], matrix=-weights[0].matrix)
    with pytest.raises(ExportError, match=r"does not hold the weights that it was given.*differ"):
        unverified(part.compiled, (first, *weights[1:]))
    middle = part.compiled.index(b"weight_data") + 32 + 200
    damaged = bytes([*part.compiled[:middle], *8 * b"\xff", *part.compiled[middle + 8 :]])
    with pytest.raises(ExportError, match="does not hold the weights that it was given"):
        unverified(damaged, weights)


@pytest.mark.executorch
@needs_executorch
def test_what_vela_rearranged_is_named(exported: Exported) -> None:
    (part,) = exported.done.run.parts  # type: ignore[attr-defined]
    weights = [dataclasses.replace(w, operator="CONV3D") for w in part.tosa.weights]
    assert unverified(part.compiled, weights) == tuple(w.name for w in weights)


def prepared_program(
    model: nn.Module, folder: Path, *, told: bool
) -> tuple[nn.Module, lowering.Lowered]:
    """The road by hand: the quantized graph in torch, and the program made of it."""
    ready = layout.prepare(model, IMAGES[:1], last=True)
    spec = lowering.compile_spec(Configuration.of("ethos-u55-128", None, None), folder)
    graph = observe(ready, spec)
    calibrate(graph, [ready.to_file_layout([x[None]]) for x in IMAGES])
    if told:
        set_weights(graph, [])
    converted = lowering.quantized(graph)
    return converted, lowering.lower(converted, ready.example, spec)


@pytest.mark.executorch
@needs_executorch
def test_without_being_told_the_observers_break_clusters(tmp_path: Path) -> None:
    """The control: what everybody else's exporter makes of the same weights."""
    torch.manual_seed(0)
    model = clustered(randomize_norms(resnet()))
    _, program = prepared_program(model, tmp_path, told=False)
    weights = program.parts[0].tosa.weights
    assert max(len(np.unique(w.matrix)) for w in weights) > 16


@pytest.mark.executorch
@needs_executorch
def test_torch_and_tosa_compute_the_same_but_for_one_rounding(tmp_path: Path) -> None:
    """Torch rounds quotients of floats, TOSA fixed-point products: a step apart, here and there."""
    torch.manual_seed(0)
    converted, program = prepared_program(randomize_norms(resnet()), tmp_path, told=True)
    step = program.outputs[0].scale
    apart = []
    for image in IMAGES:
        x = image[None].permute(0, 2, 3, 1).contiguous()
        with torch.no_grad():
            (want,) = converted(x)
        apart.append(np.abs(program([x])[0] - want.numpy()) / step)
    assert np.max(apart) <= 2.01
    assert np.mean(apart) < 0.5


ON_U85 = ("two_in_two_out", "encoder_decoder", "conv1d", "grouped", "lstm", "flattened")


@pytest.mark.executorch
@needs_executorch
@pytest.mark.parametrize("name", ON_U85)
def test_every_construct_keeps_its_codes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case: Case = CASES[name]
    model = clustered(randomize_norms(case.build()))
    names = [n for n, _ in named_clusterings(model)]
    batches = [case.inputs(seed) for seed in range(4)]
    done = to_pte(
        model, batches[0], tmp_path / "m.pte", calibration=batches, target="ethos-u85-256"
    )
    assert [row.parameter for row in done.tensors if row.codes_match and row.int8_codes <= 15]
    assert {row.parameter for row in done.tensors} == set(names)
    assert tuple(p.shape for p in done.inputs) == case.reads
    if case.writes:
        assert tuple(p.shape for p in done.outputs) == case.writes
    assert (done.cpu_operators, done.unverified) == ((), ())
    compiled = sum(len(part.compiled) for part in done.run.parts)  # type: ignore[attr-defined]
    assert done.size_bytes < compiled + 8000  # no float copy of any weight
    assert done.sqnr_db > 20


@pytest.mark.executorch
@needs_executorch
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_float_codebook_keeps_its_clusters_stripped_or_not(
    granularity: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = ClusterConfig(n_clusters=12, granularity=granularity)
    model = cluster_(small().eval(), {"0.weight": config})
    plain = strip_(copy.deepcopy(model))
    first, second = (
        to_pte(m, IMAGES[:1], tmp_path / f"{i}.pte", calibration=[IMAGES])
        for i, m in enumerate((model, plain))
    )
    assert all(row.codes_match and row.int8_codes <= 12 for row in first.tensors)
    for done in (first, second):
        rows = done.run.parts[0].tosa.weights[0].matrix  # type: ignore[attr-defined]
        assert max(len(np.unique(row)) for row in rows) <= 12
    if granularity == "tensor":  # a stripped channel no longer tells which of its values is whose
        assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.executorch
@needs_executorch
def test_learned_ranges_are_the_programs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantize_activations_(clustered(small()), IMAGES).eval()
    with torch.no_grad():
        model.activation_ranges.mul_(1.25)
    done = to_pte(model, IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])
    (low, high), *_ = activation_ranges(model).values()
    assert done.inputs[0].scale == pytest.approx((high - low) / 255)
    assert done.calibrated == ()


@pytest.mark.executorch
@needs_executorch
def test_what_stays_on_the_cpu_is_listed_with_its_module(tmp_path: Path) -> None:
    """Ethos-U55 resizes nothing; the maps before and after are two parts."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(8, 4, 3),
    )
    done = to_pte(clustered(model), IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])
    assert {op.module for op in done.cpu_operators if "upsample" in op.operator} == {"1"}
    assert len(done.compiled) == 2
    assert [row.int8_codes <= 15 for row in done.tensors] == [True, True]
    assert [p.dtype for p in (*done.inputs, *done.outputs)] == ["int8", "int8"]
    assert done.sqnr_db > 20


@pytest.mark.executorch
@needs_executorch
def test_an_embedding_stays_on_the_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES["embedding"]
    batches = [case.inputs(seed) for seed in range(4)]
    path = tmp_path / "m.pte"
    with pytest.raises(ExportError, match=r"'table.weight' \(50, 16\).*codes cannot be kept"):
        to_pte(clustered(case.build()), batches[0], path, calibration=batches)
    model = cluster_(case.build(), {"*": INT8, "table.weight": None})
    done = to_pte(model, batches[0], path, calibration=batches)
    assert [p.dtype for p in done.inputs] == ["int64"]
    assert "index_select" in {op.operator for op in done.cpu_operators}
    assert [row.parameter for row in done.tensors] == ["head.weight"]


@pytest.mark.executorch
@needs_executorch
def test_a_clustered_layer_on_the_cpu_is_refused(tmp_path: Path) -> None:
    """Convolutions with a kernel beyond the NPU's limit are left out of its parts."""
    model = clustered(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, (1, 80))))
    wide = torch.randn(4, 3, 3, 90)
    with pytest.raises(ExportError, match=r"'1.weight' .* in no part that runs on the NPU"):
        to_pte(model, wide[:1], tmp_path / "m.pte", calibration=[wide])


class Chosen(nn.Module):
    """As many values as are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return y[y > 0]


class Unknown(nn.Module):
    """A Bessel function: ExecuTorch's portable kernels have none."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.head(x))


@pytest.mark.executorch
@needs_executorch
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Chosen(), r"gives a shape that depends on the data.*needs fixed shapes"),
        (
            Unknown(),
            r"no kernel on the CPU for what the NPU does not take: aten::special_bessel_j0",
        ),
    ],
)
def test_what_cannot_be_planned_or_run_is_one_error(
    model: nn.Module, message: str, tmp_path: Path
) -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ExportError, match=f"(?s){message}"):
        to_pte(model, x[:1], tmp_path / "m.pte", calibration=[x])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.executorch
@needs_executorch
def test_a_compiler_that_fails_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = clustered(small()), tmp_path / "m.pte"
    with pytest.raises(ValueError, match="has no 'Nonsense': system_config must be one of"):
        to_pte(model, IMAGES[:1], path, calibration=[IMAGES], system_config="Nonsense")
    unknown = Configuration("ethos-u55-128", "Nonsense", "Shared_Sram")
    monkeypatch.setattr(Configuration, "of", lambda *given: unknown)
    with pytest.raises(VelaError, match="backend cannot compile this model for ethos-u55-128"):
        to_pte(model, IMAGES[:1], path, calibration=[IMAGES])
    with pytest.raises(ExportError, match="the Ethos-U quantizer cannot take"):
        observe(layout.prepare(model, IMAGES[:1], last=True), None)


@pytest.mark.executorch
@needs_executorch
def test_other_codes_than_trained_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An observer that was told nothing stands for a backend that does not listen."""
    torch.manual_seed(0)
    monkeypatch.setattr("torchclust.export.executorch.program.set_weights", lambda *given: None)
    model = clustered(randomize_norms(resnet()))
    with pytest.raises(ExportError, match="did not keep the scales it was given"):
        to_pte(model, IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])


@pytest.mark.executorch
@needs_executorch
def test_nothing_is_written_to_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    to_pte(clustered(small()), IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])
    assert capfd.readouterr().out == ""


@pytest.mark.executorch
@needs_executorch
def test_every_activation_has_an_observer(tmp_path: Path) -> None:
    spec = lowering.compile_spec(Configuration.of("ethos-u55-128", None, None), tmp_path)
    graph = observe(layout.prepare(clustered(small()), IMAGES[:1], last=True), spec)
    assert len(list(layers(graph))) == 2
    assert len(observers(graph)) >= 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "ethos-u77"}, ValueError, "accelerator must be one of .*got 'ethos-u77'"),
        ({"calibration": None}, ValueError, r"needs calibration data, got None:  to_pte\(model"),
        ({"calibration": 3}, TypeError, "must be an iterable of batches"),
        ({"path": "nowhere/m.pte"}, FileNotFoundError, "the folder nowhere does not exist"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"path": tmp_path / "m.pte", "calibration": [IMAGES], **arguments}
    with pytest.raises(error, match=message):
        to_pte(small(), IMAGES[:1], **given)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r"'executorch', which is not installed:  pip install"):
        to_pte(small(), IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])


def test_an_extra_that_is_half_there_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.5.1")
    find, lacking = importlib.util.find_spec, {"tosa"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in lacking else find("torch")
    )
    with pytest.raises(ImportError, match=r"needs the package 'tosa', which is not installed"):
        to_pte(small(), IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])


@pytest.mark.parametrize("version", ["1.4.0", "1.50", "2.0"])
def test_another_version_is_refused(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(
        ImportError, match=f"executorch {version} is installed, and to_pte is tested with 1.5"
    ):
        to_pte(small(), IMAGES[:1], tmp_path / "m.pte", calibration=[IMAGES])
    assert backends.INSTALL != packages.INSTALL


def test_a_reference_model_that_refuses_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    status = types.SimpleNamespace(TOSA_VALID="valid")
    model = types.SimpleNamespace(run=lambda *given: ([], "unpredictable"), GraphStatus=status)
    monkeypatch.setattr(packages, "load", lambda name: model)
    with pytest.raises(ExportError, match="reference model refuses the file: unpredictable"):
        TosaFile(b"", (), {}).run([])
