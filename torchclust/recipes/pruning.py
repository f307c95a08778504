"""Pruning for recipes: ever more of the smallest weights, with dropout that falls along."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import prune

from torchclust.lightning.price import length_of_run
from torchclust.lightning.trees import Callback
from torchclust.recipes.section import RecipeError

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

NO_LENGTH = (
    "prune: the training data do not tell how many batches a pass has, and so when to prune how "
    "much. Give the dataset a length, or say it:  trainer: {limit_train_batches: 500}"
)
_RATE = {
    nn.modules.dropout._DropoutNd: "p",
    nn.MultiheadAttention: "dropout",
    nn.RNNBase: "dropout",
}


class SparseDropout(Callback):
    """While training, drop out less of a network that has lost connections.

    Pruning takes capacity as dropout does, for good. So the rates are those of the dense network
    times the root of the share of weights that are left (Han et al., "Learning both weights and
    connections for efficient neural networks", 2015, equation 2). Afterwards they are as they were.

    Args:
        sparsity: share of the weights that are zero.
        path: of the network in the module.
    """

    def __init__(self, sparsity: float = 0.0, path: str = "") -> None:
        self.sparsity, self.path = sparsity, path
        self._dense: list[tuple[nn.Module, str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lower the rates to what the sparsity asks for."""
        self._dense = [
            (module, name, getattr(module, name))
            for module in pl_module.get_submodule(self.path).modules()
            for kind, name in _RATE.items()
            if isinstance(module, kind)
        ]
        self.lower(self.sparsity)

    def lower(self, sparsity: float) -> None:
        """Set the rates for another sparsity, in between."""
        for module, name, rate in self._dense:
            setattr(module, name, rate * math.sqrt(1 - sparsity))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the rates back."""
        self.lower(0.0)


class GradualPruning(Callback):
    """Set the smallest weights to zero, more and more of them while the others train on.

    Magnitudes are compared over all Linear and convolution weights together (depthwise ones left
    alone), so a layer keeps what it needs; the share of zeros rises to `sparsity` along the cubic
    of Zhu & Gupta, "To prune, or not to prune" (2017), over the first three quarters of the
    steps. Lightning's own ModelPruning changes the share between epochs only, which one epoch of
    pruning does not have. At the end the masks are gone and the zeros stay. Dropout falls along
    (`SparseDropout`).
    """

    UPDATES = 30

    def __init__(self, sparsity: float, path: str = "") -> None:
        self.sparsity = sparsity
        self.path = path
        self.dropout = SparseDropout(path=path)
        self._done = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find what drops out."""
        self.dropout.on_fit_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what has no end."""
        if not math.isfinite(trainer.num_training_batches):
            raise RecipeError(NO_LENGTH)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune further when the schedule has come to its next update."""
        # Batches, not optimizer steps: of these a module with two optimizers takes two a batch.
        a_pass = int(trainer.num_training_batches)
        ramp = 0.75 * length_of_run(trainer)
        seen = trainer.current_epoch * a_pass + batch_idx + 1
        due = min(self.UPDATES, int(self.UPDATES * seen / ramp))
        if due > self._done:
            self._done = due
            share = self._share()
            weights = prunable(pl_module.get_submodule(self.path))
            _make_permanent(weights)
            prune.global_unstructured(weights, prune.L1Unstructured, amount=share)
            self.dropout.lower(share)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the zeros permanent, and say where the run ended before they were all there."""
        if 0 < self._done < self.UPDATES:
            warnings.warn(
                f"pruning came to {self._share():.0%} zeros of {self.sparsity:.0%}: the run ended "
                "before its last epoch. Ask for fewer prune.epochs, or take out what ends it early",
                stacklevel=2,
            )
        _make_permanent(prunable(pl_module.get_submodule(self.path)))
        self.dropout.on_fit_end(trainer, pl_module)

    def _share(self) -> float:
        """Zeros after the updates that are done."""
        return self.sparsity * (1 - (1 - self._done / self.UPDATES) ** 3)


def prunable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights of Linear and of dense convolutions, as (module, "weight")."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        (module, "weight")
        for module in model.modules()
        if isinstance(module, kinds) and getattr(module, "groups", 1) == 1
    ]


def _make_permanent(weights: Iterable[tuple[nn.Module, str]]) -> None:
    """Take the masks off; what they set to zero stays so, as +0.0.

    A mask times a negative weight is -0.0, a second kind of zero, which would cost a packed file up
    to a bit for every zero.
    """
    for module, name in weights:
        if prune.is_pruned(module):
            prune.remove(module, name)
            with torch.no_grad():
                getattr(module, name).add_(0.0)
