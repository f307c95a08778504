"""MLPerf Tiny's five networks, clustered, run on Ethos-U alone, and alike in both interpreters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from export_networks import randomize_norms
from torch import nn

from torchclust import cluster_
from torchclust.export import to_tflite, vela
from torchclust.recipes.prepare import load_checkpoint_
from torchclust.zoo import mlperf_ad, mlperf_ic, mlperf_kws, mlperf_sww, mlperf_vww

REFERENCE = Path(__file__).parents[3] / "shared" / "real" / "models"


@dataclass(frozen=True)
class Network:
    """How one is built, what it takes, and its published weights' file."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    file: str


NETWORKS = {
    "kws": Network(mlperf_kws, (1, 49, 10), "mlperf_tiny_kws_bn"),
    "vww": Network(mlperf_vww, (3, 96, 96), "mlperf_tiny_vww_bn"),
    "ic": Network(mlperf_ic, (3, 32, 32), "mlperf_tiny_ic_bn"),
    "ad": Network(mlperf_ad, (640,), "mlperf_tiny_ad_bn"),
    "sww": Network(mlperf_sww, (40, 30, 1), "mlperf_tiny_sww_bn"),
}


def weights_of(network: Network, published: bool) -> nn.Module:
    torch.manual_seed(0)
    if not published:
        return randomize_norms(network.build().eval(), tiny=False)
    file = REFERENCE / f"{network.file}.safetensors"
    if not file.is_file():
        pytest.skip("the published weights are not here")
    return load_checkpoint_(network.build(), file).eval()


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True], ids=["random", "published"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_to_the_processor(name: str, published: bool, tmp_path: Path) -> None:
    network = NETWORKS[name]
    model = weights_of(network, published)
    samples = torch.rand(16, *network.shape, generator=torch.Generator().manual_seed(1))
    depthwise = {"dw.*.conv.weight": 16} if hasattr(model, "dw") else {}
    cluster_(model, {"*": 16, **depthwise}, codebook_dtype="int8")
    written = to_tflite(model, samples[:1], tmp_path / "net.tflite", calibration=[samples])
    assert "TRANSPOSE" not in written.operators
    assert written.float_operators == ()
    assert written.micro_difference == 0
    for accelerator in ("ethos-u55-128", "ethos-u85-256"):
        assert vela(written.path, accelerator=accelerator).cpu_ops == 0
