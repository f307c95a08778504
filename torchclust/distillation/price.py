"""What the weights of a stage pay for their bits while they are brought nearer to the teacher.

In: weights with a `rate`, assigned anew. A bit in every such weight of the model costs `rate` of
what the outputs vary by: the unit in which `tasks` measure distances, and in which
``cluster_(inputs=, rate=)`` has assigned. So the price is due in full from the first step.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from torchclust.model.charge import PricedWeight, priced_weights
from torchclust.weight.bits import CHARGED


@dataclass(frozen=True)
class Price:
    """Of the bits of some weights, beside a stage's distance."""

    weights: Sequence[PricedWeight]

    @classmethod
    def of(cls, model: nn.Module, parameters: Collection[Tensor]) -> Price:
        """Return the price of those weights of the model that are among the parameters."""
        return cls(priced_weights(model, parameters))

    @property
    def state(self) -> list[Tensor]:
        """What charging changes beside the gradients: running counts, and the share charged."""
        return [priced.weight.get_buffer(n) for priced in self.weights for n in CHARGED]

    def charge_(self) -> None:
        """Add the bits' gradient to that of the distance."""
        for priced in self.weights:
            priced.charge_(1.0)

    def due(self) -> float:
        """What all indices cost at present."""
        return math.fsum(
            price * weight.spent_bits(latent) for weight, latent, price in self.weights
        )
