"""Which accelerators there are, and the clocks and memories that Vela assumes for them."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torchclust.export.vela_config import ARM, chosen

# Vela's own defaults per family, passed explicitly: figures mean nothing without them.
_FAMILIES = {
    "ethos-u55": ((32, 64, 128, 256), "Ethos_U55_High_End_Embedded", "Shared_Sram"),
    "ethos-u65": ((256, 512), "Ethos_U65_High_End", "Dedicated_Sram"),
    "ethos-u85": ((128, 256, 512, 1024, 2048), "Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB"),
}
# Of a convolution. Vela cuts up those that go further, but no depthwise and no padded ones.
MOST_STRIDE = 3
ACCELERATORS = tuple(f"{family}-{n}" for family, (sizes, _, _) in _FAMILIES.items() for n in sizes)


@dataclass(frozen=True)
class Configuration:
    """What Vela compiles for: an accelerator, its clocks and memories, and their file."""

    accelerator: str
    system_config: str
    memory_mode: str
    config: str = ARM

    @classmethod
    def of(
        cls,
        accelerator: str,
        system_config: str | None,
        memory_mode: str | None,
        config: str | os.PathLike[str] | None = None,
    ) -> Configuration:
        """The defaults of the accelerator's family, or a vendor's file's only one, for None."""
        if accelerator not in ACCELERATORS:
            raise ValueError(
                f"accelerator must be one of {', '.join(ACCELERATORS)}, got {accelerator!r}"
            )
        _, *defaults = _FAMILIES[accelerator.rpartition("-")[0]]
        file, system, memory = chosen(
            config, system_config, memory_mode, (defaults[0], defaults[1])
        )
        return cls(accelerator, system, memory, file)
