"""The built-in task: a network that classifies images, trained with Adam, judged by accuracy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchclust.data_aware.divergence import divergence
from torchclust.lightning.trees import installed
from torchclust.recipes.schema import Schedule
from torchclust.zoo.dataset import Batch

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule
else:
    LightningModule = installed()[0].LightningModule


TEMPERATURE = 2.0  # of `Distillation`: what a teacher makes of the wrong classes counts, too


@dataclass(frozen=True)
class Distillation:
    """What a teacher makes of the images, as a part of the loss (Hinton et al., 2015).

    Attributes:
        teacher: from images to logits, in eval mode; it does not change.
        weight: of the teacher in the loss, 0 to 1; the labels have the rest.
    """

    teacher: nn.Module
    weight: float

    def loss(self, images: Tensor, logits: Tensor, of_labels: Tensor) -> Tensor:
        """Return the loss, a scalar, of logits (n, classes) whose loss `of_labels` is known.

        The divergence at a temperature has gradients that fall with its square, which is made up
        for: so the weight means the same at any temperature.
        """
        with torch.no_grad():
            wanted = self.teacher.to(images.device)(images)
        apart = divergence(logits.float() / TEMPERATURE, wanted.float() / TEMPERATURE)
        return (1 - self.weight) * of_labels + self.weight * TEMPERATURE**2 * apart


class Classifier(LightningModule):
    """A `model` from images to logits, cross-entropy, and Adam at `lr`, or from there down to 0."""

    distillation: Distillation | None = None  # no submodule: neither trained nor saved

    def __init__(self, model: nn.Module, lr: float = 1e-3, schedule: Schedule = "constant") -> None:
        super().__init__()
        self.model, self.lr, self.schedule = model, lr, schedule

    def forward(self, images: Tensor) -> Any:
        """Return the logits."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, and show it in the progress bar."""
        images, labels = batch
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        if self.distillation is not None and self.distillation.weight:
            loss = self.distillation.loss(images, logits, loss)
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
