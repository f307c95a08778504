"""The built-in task: a network that classifies images, trained with Adam, judged by accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchclust.lightning.trees import installed
from torchclust.recipes.schema import Schedule
from torchclust.zoo.dataset import Batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    LightningModule = installed()[0].LightningModule


class Classifier(LightningModule):
    """A `model` from images to logits, cross-entropy, and Adam at `lr`, or from there down to 0."""

    def __init__(self, model: nn.Module, lr: float = 1e-3, schedule: Schedule = "constant") -> None:
        super().__init__()
        self.model, self.lr, self.schedule = model, lr, schedule

    def forward(self, images: Tensor) -> Any:
        """Return the logits."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch, and show it in the progress bar."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return Adam over the parameters that train, and the schedule of its rate."""
        trained = (p for p in self.parameters() if p.requires_grad)
        optimizer = torch.optim.Adam(trained, lr=self.lr)
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the percentage of images whose largest logit is their label's."""
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total
