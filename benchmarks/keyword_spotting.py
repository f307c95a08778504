"""MLPerf Tiny's keyword spotter clustered without labels, and how much hangs on which clips it saw.

    python benchmarks/keyword_spotting.py --models MODELS --data DATA --rates 0 0.0275 0.03
    python benchmarks/keyword_spotting.py --table

MODELS holds mlperf_tiny_kws_bn.safetensors, DATA the folder speech_commands, of which
docs/real-networks.md tells. Five times 1,000 clips of the training part are drawn; the network is
clustered to each of them, and judged on the test part beside the unclustered one, so that
differences are paired. One line of JSON for each, into benchmarks/results/keyword_spotting.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from rows import keep, measure_or_print, published
from torch import Tensor, nn

from torchclust import cluster_
from torchclust.data_aware.divergence import divergence
from torchclust.export import to_tflite, vela
from torchclust.recipes.prepare import load_checkpoint_
from torchclust.zoo import mlperf_kws
from torchclust.zoo.data import DATASETS
from torchclust.zoo.dataset import samples

RESULTS = Path(__file__).parent / "results" / "keyword_spotting.jsonl"
CLIPS, CALIBRATION = 1000, 128
CLUSTERS = {0.0: 16}  # without a price; with one 32, of which it leaves about 30


def encoded_bytes(model: nn.Module, clips: Tensor) -> int:
    """Vela's own figure for the int8 file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.tflite"
        to_tflite(model, clips[:1], path, calibration=[clips[:CALIBRATION]])
        return vela(path, accelerator="ethos-u55-128").encoded_weight_bytes


def measure(args: argparse.Namespace) -> None:
    model = mlperf_kws()
    load_checkpoint_(model, args.models / "mlperf_tiny_kws_bn.safetensors")
    model.eval()
    data = DATASETS["speech_commands"](args.data / "speech_commands")
    test, labels = data.test[range(len(data.test))]
    with torch.no_grad():
        wanted = model(test)
    right = (wanted.argmax(1) == labels).double()
    whole = encoded_bytes(model, samples(data.train, CALIBRATION, seed=0))
    for rate in args.rates:
        for seed in args.seeds:
            clips = samples(data.train, CLIPS, seed=seed)
            k = CLUSTERS.get(rate, 32)
            rules = {"*": k, "dw.*.conv.weight": 32}
            clustered = copy.deepcopy(model)
            cluster_(clustered, rules, codebook_dtype="int8", inputs=clips, rate=rate)
            with torch.no_grad():
                logits = clustered(test)
            change = (logits.argmax(1) == labels).double() - right
            keep(
                RESULTS,
                rate=rate,
                clusters=k,
                seed=seed,
                unclustered=round(100 * float(right.mean()), 2),
                points=round(100 * float(change.mean()), 2),
                points_error=round(100 * float(change.std()) / len(change) ** 0.5, 2),
                divergence=round(float(divergence(logits, wanted)), 4),
                share=round(encoded_bytes(clustered, clips) / whole, 4),
            )


def table() -> str:
    """Means over the draws, with the standard errors of drawing clips and of the test's."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    lines = ["| k | rate | draws | points | of draws | of the test | divergence | share |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for rate in sorted({row["rate"] for row in rows}):
        found = [row for row in rows if row["rate"] == rate]
        points = [row["points"] for row in found]
        lines.append(
            f"| {found[0]['clusters']} | {rate:g} | {len(found)} | {mean(points):+.2f} "
            f"| ± {stdev(points) / len(points) ** 0.5:.2f} "
            f"| ± {mean(row['points_error'] for row in found):.2f} "
            f"| {mean(row['divergence'] for row in found):.4f} "
            f"| {mean(row['share'] for row in found):.3f}x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = published(__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.0275, 0.03])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    measure_or_print(parser, measure, table)


if __name__ == "__main__":
    main()
