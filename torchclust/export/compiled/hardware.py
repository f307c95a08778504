"""What the accelerator's size decides about the order of weights."""

from __future__ import annotations

from dataclasses import dataclass

from torchclust.export.compiled.errors import NotVerifiedError

_FAMILIES = ("ethos-u55", "ethos-u65", "ethos-u85")


@dataclass(frozen=True)
class Hardware:
    """An accelerator: ``macs`` a cycle over all cores, and the cores that share the channels."""

    family: str
    macs: int
    cores: int

    @property
    def name(self) -> str:
        """As `vela` takes it."""
        return f"{self.family}-{self.macs}"


def hardware(config: int) -> Hardware:
    """The accelerator by its configuration register, as the compiled file carries it.

    Raises:
        NotVerifiedError: none that is known.
    """
    product, macs = config >> 28, 1 << (config & 0xF)
    if product >= len(_FAMILIES):
        raise NotVerifiedError(f"an accelerator of the unknown product number {product}")
    family = _FAMILIES[product]
    cores = {"ethos-u65": {512: 2}, "ethos-u85": {512: 2, 1024: 4, 2048: 4}}.get(family, {})
    return Hardware(family, macs, cores.get(macs, 1))
