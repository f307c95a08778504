"""The number by which a task is judged: its name, which way is better, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from torchclust.recipes.subject import Mode


@dataclass(frozen=True)
class Metric:
    """What reports and plots call it.

    >>> Metric("accuracy", "max", "%").change(97.5, 97.25)
    '-0.25 points'
    >>> Metric("test_loss", "min").text(0.123456), Metric("delay", "min", "ms").text(3.5)
    ('0.1235', '3.5000 ms')
    """

    name: str
    mode: Mode
    unit: str = ""

    @property
    def title(self) -> str:
        """The name as a sentence begins with it; one with underscores stays as it is logged."""
        return self.name if "_" in self.name else self.name[:1].upper() + self.name[1:]

    @property
    def label(self) -> str:
        """The name with its unit, as an axis or a column has it."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    def loss(self, before: float, after: float) -> float:
        """How much worse `after` is."""
        return before - after if self.mode == "max" else after - before

    def number(self, value: float) -> str:
        """The value without its unit."""
        return f"{value:.2f}" if self.unit == "%" else f"{value:,.4f}"

    def text(self, value: float) -> str:
        """The value with its unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def change(self, before: float, after: float) -> str:
        """The difference, in points where the unit is a percentage."""
        sign = "+" if after >= before else ""
        unit = "points" if self.unit == "%" else self.unit
        return f"{sign}{self.number(after - before)} {unit}".rstrip()
