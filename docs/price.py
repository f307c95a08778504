"""Draw docs/price.png, what a price of bits does to cells and to bytes:  python docs/price.py

Weights are normal variates; the frontier is of `fit_codebook` alone, without training or inputs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import torchclust

PICTURE = Path(__file__).parent / "price.png"
SHOWN = (0.0, 0.03, 0.1, 0.3)
RATES = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)


def bits_and_error(book: torchclust.Codebook, weights: Tensor) -> tuple[float, float]:
    """Entropy of the indices, and squared error over the variance."""
    share = torch.bincount(book.indices.int()).double() / len(weights)
    share = share[share > 0]
    return float(-(share * share.log2()).sum()), book.inertia / float(weights.square().sum())


def cells(axes: Axes, weights: Tensor) -> None:
    """Draw which weights share a value, a row for each price."""
    edges = np.linspace(-3.5, 3.5, 281)
    middle = torch.from_numpy((edges[1:] + edges[:-1]) / 2).float()
    for row, rate in enumerate(reversed(SHOWN)):
        book = torchclust.fit_codebook(weights, 16, rate=rate)
        order = weights.argsort()
        index = book.indices[order][
            torch.searchsorted(weights[order], middle).clamp_max(len(order) - 1)
        ]
        height, _ = np.histogram(weights.numpy(), edges)
        shades = np.where(index.numpy() % 2 == 0, "tab:blue", "tab:orange")
        axes.bar(middle.numpy(), 0.85 * height / height.max(), 0.026, row, color=shades)
        bits, error = bits_and_error(book, weights)
        axes.plot(book.centroids, np.full(len(book.centroids), row - 0.05), "k^", markersize=4)
        text = f"rate {rate:g}: {len(book.centroids)} values, {bits:.2f} bits, error {error:.3f}"
        axes.text(-3.5, row + 0.5, text.replace(", ", "\n"), fontsize=8, va="center")
    axes.set_title("cells as the price rises", fontsize=10)
    axes.set_axis_off()


def frontier(axes: Axes, weights: Tensor) -> None:
    """Draw error over bits: k-means, and prices."""
    kmeans = [bits_and_error(torchclust.fit_codebook(weights, k), weights) for k in range(2, 25)]
    priced = [
        bits_and_error(torchclust.fit_codebook(weights, 64, rate=rate), weights) for rate in RATES
    ]
    axes.plot(*zip(*kmeans, strict=True), "s-", label="k-means, 2 to 24 values", markersize=4)
    axes.plot(*zip(*priced, strict=True), "o-", label="at a price, rate 0.3 to 0.003", markersize=4)
    bits = np.linspace(0.6, 4.6, 50)
    axes.plot(bits, 4.0**-bits, "k:", label="the limit, of any code")
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight, entropy of the indices")
    axes.set_ylabel("squared error / variance")
    axes.set_title("what a bit buys", fontsize=10)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw both."""
    weights = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    figure = Figure(figsize=(10, 3.8), layout="constrained", dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=[5, 4])
    cells(left, weights)
    frontier(right, weights)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
