"""report.png: sizes and accuracies before and after, and every clustered tensor's weights."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchclust.model.clustering import Clustering, named_clusterings
from torchclust.recipes.metric import Metric

BEFORE, AFTER, MARK = "#9aa5b1", "#1f6feb", "#d1242f"


def plot(
    report: Mapping[str, Any], trained: nn.Module, compressed: nn.Module | None, path: Path
) -> None:
    """Draw `report` and write it as a PNG file, whole or not at all.

    Args:
        report: report.json's content.
        trained: the model before compression, whose weights the histograms show.
        compressed: the clustered model, whose centroids are marked; None draws no histograms.
        path: the file.
    """
    clusterings = dict(named_clusterings(compressed)) if compressed else {}
    columns = 2 if len(clusterings) in (1, 2, 4) else 3
    rows = math.ceil(len(clusterings) / columns)
    heights = [3.6, *[2.4] * rows]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained", dpi=110)
    figure.suptitle(f"{report['name']}: before and after clustering", weight="bold")
    bands = list(figure.subfigures(1 + rows, 1, height_ratios=heights, squeeze=False).flat)
    sizes, accuracies = bands[0].subplots(1, 2, width_ratios=[2, 1])
    _plot_sizes(sizes, report)
    _plot_accuracies(accuracies, report["accuracy"], Metric(**report["metric"]))
    panels = [panel for band in bands[1:] for panel in band.subplots(1, columns)]
    if rows:
        text = "Weights before clustering (grey) and the values that they share since (red)"
        bands[1].suptitle(text, x=0.005, ha="left", fontsize=10)
    weights = dict(trained.named_parameters())
    for panel, (name, clustering) in zip(panels, clusterings.items(), strict=False):
        _plot_weights(panel, name, weights[name].detach(), clustering)
    for panel in panels[len(clusterings) :]:
        panel.set_axis_off()
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _plot_sizes(axes: Axes, report: Mapping[str, Any]) -> None:
    """Draw a pair of bars per kind of file, in KiB, with the factor between them."""
    size, vela, tables = report["bytes"], report["vela"], report["tflm"]
    pairs = {
        "float .tflite, zipped": (size["float_tflite_zip"], size["clustered_float_tflite_zip"]),
        "int8 .tflite, zipped": (size["baseline_int8_tflite_zip"], size["int8_tflite_zip"]),
        "encoded weights (Vela)": (
            vela["baseline_encoded_weight_bytes"],
            vela["encoded_weight_bytes"],
        ),
        "flash (Vela)": (vela["baseline_flash_bytes"], vela["flash_bytes"]),
        "flash (tflite-micro)": (tables["baseline_flash_bytes"], tables["flash_bytes"]),
        "packed, from float32": (size["float_tflite"], size["packed"]),
    }
    known = {name: pair for name, pair in pairs.items() if None not in pair and 0 not in pair}
    axes.set_title("Sizes in KiB", loc="left", fontsize=10)
    if not known:
        axes.set_axis_off()
        return
    places = np.arange(len(known))
    looks = ((-0.2, BEFORE, "not clustered"), (0.2, AFTER, "clustered"))
    for column, (offset, colour, label) in enumerate(looks):
        values = [pair[column] / 1024 for pair in known.values()]
        bars = axes.barh(places + offset, values, 0.38, color=colour, label=label)
        texts = [
            f"{value:,.0f}" + (f"   {pair[0] / pair[1]:.2f}x smaller" if column else "")
            for value, pair in zip(values, known.values(), strict=True)
        ]
        axes.bar_label(bars, texts, padding=4, fontsize=9)
    axes.set_yticks(places, list(known))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=9)
    _plain_frame(axes)


def _plot_accuracies(axes: Axes, accuracy: Mapping[str, float | None], metric: Metric) -> None:
    """Draw a dot per model, as the differences are far smaller than the values."""
    labels = {
        "float": "trained, float",
        "control": "control, float",
        "baseline_int8": "control, int8",
        "pruned": "pruned, float",
        "before_finetune": "clustered, not trained on",
        "clustered": "clustered, float",
        "int8": "clustered, int8",
    }
    values = {label: accuracy.get(key) for key, label in labels.items()}
    known = {label: value for label, value in values.items() if value is not None}
    unit = f", {metric.unit}" if metric.unit else ""
    axes.set_title(f"{metric.title} on the test data{unit}", loc="left", fontsize=10)
    if not unit:  # of a percentage one knows
        better = {"max": "larger is better", "min": "smaller is better"}[metric.mode]
        axes.set_xlabel(better, fontsize=8)
    for place, (label, value) in enumerate(known.items()):
        colour = BEFORE if label in list(labels.values())[:3] else AFTER
        axes.plot(value, place, "o", color=colour, markersize=9)
        axes.text(value, place, f"    {metric.number(value)}", va="center", fontsize=9)
    axes.set_yticks(range(len(known)), list(known))
    axes.invert_yaxis()
    low, high = min(known.values()), max(known.values())
    # Of a percentage half a point fills the axis at least, of other numbers half a hundredth.
    room = max(high - low, 0.5 if metric.unit == "%" else 0.005 * max(abs(low), abs(high)) or 1.0)
    axes.set_xlim(low - 0.3 * room, high + 0.6 * room)
    axes.grid(axis="y", color="#e5e7eb")
    _plain_frame(axes)


def _plot_weights(axes: Axes, name: str, weight: Tensor, clustering: Clustering) -> None:
    """Draw a tensor's weights before clustering as a histogram, and its centroids as lines.

    An int8 codebook's are in units of the channel's scale, where all channels share the codes.
    """
    unit, centroids = "weight", clustering.centroids.detach().reshape(-1).float()
    codes, scale = clustering.codes, clustering.scale
    if codes is not None and scale is not None:
        shape = [1] * weight.dim()
        shape[clustering.channel_dim] = -1
        safe = scale.detach().clamp_min(scale[scale > 0].amin()) if (scale > 0).any() else scale + 1
        weight, unit = weight / safe.reshape(shape), "weight / channel's scale"
        centroids = codes.float()
    values = weight.reshape(-1).cpu().numpy()
    edge = float(max(np.quantile(np.abs(values), 0.9995), centroids.abs().max())) * 1.03
    bins = int(np.clip(len(values) / 20, 20, 120))
    axes.hist(values, bins=np.linspace(-edge, edge, bins + 1).tolist(), color=BEFORE)
    for centroid in centroids.tolist():
        axes.axvline(centroid, color=MARK, linewidth=0.8, alpha=0.75)
    used = len(clustering.indices.unique())
    title = f"{name}   {' x '.join(map(str, weight.shape))}   {used} values"
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_xlim(-edge, edge)
    axes.tick_params(labelsize=8)
    axes.set_yticks([])
    _plain_frame(axes)


def _plain_frame(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
