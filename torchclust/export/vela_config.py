"""Vela's configuration files, Arm's own and chip vendors': what they have to choose from.

A file in ini format has a section ``[System_Config.NAME]`` for each clock and memory system and a
section ``[Memory_Mode.NAME]`` for each way of using it. Vendors name them as they like.
"""

from __future__ import annotations

import configparser
import difflib
import importlib.util
import os
from dataclasses import dataclass, replace
from pathlib import Path

ARM = "Arm/vela.ini"  # the one that Vela brings, named as Vela finds it
_SYSTEM, _MEMORY = "System_Config.", "Memory_Mode."


@dataclass(frozen=True)
class VelaConfigs:
    """What a configuration file has to choose from. Prints as a list."""

    path: Path
    system_configs: tuple[str, ...]
    memory_modes: tuple[str, ...]

    def __str__(self) -> str:
        names = [
            ("system configurations", self.system_configs),
            ("memory modes", self.memory_modes),
        ]
        lines = [str(self.path)]
        for what, found in names:
            lines += [f"  {what}:", *(f"    {name}" for name in found)]
        return "\n".join(lines)


def read_vela_configs(path: str | os.PathLike[str]) -> VelaConfigs:
    """Read a vendor's configuration file.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "vendor.ini"
        >>> _ = file.write_text("[System_Config.Fast]\\ncore_clock=4e8\\n[Memory_Mode.Flash]\\n")
        >>> read_vela_configs(file).system_configs
        ('Fast',)
    """
    path, parser = Path(path), configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no file of Vela configurations: {error}") from error
    systems, modes = (
        tuple(s.removeprefix(kind) for s in parser.sections() if s.startswith(kind))
        for kind in (_SYSTEM, _MEMORY)
    )
    if not systems or not modes:
        raise ValueError(
            f"{path} is no file of Vela configurations: it needs at least one section "
            f"[{_SYSTEM}NAME] and one [{_MEMORY}NAME]"
        )
    return VelaConfigs(path, systems, modes)


def arms_file() -> Path | None:
    """The configuration file that the installed Vela brings; None where Vela is not installed."""
    found = importlib.util.find_spec("ethosu")
    folders = found.submodule_search_locations if found else None
    files = [Path(folder, "config_files", ARM) for folder in folders or ()]
    return next((file for file in files if file.is_file()), None)


def chosen(
    config: str | os.PathLike[str] | None,
    system_config: str | None,
    memory_mode: str | None,
    defaults: tuple[str, str],
) -> tuple[str, str, str]:
    """The file as Vela takes it, the system configuration and the memory mode.

    What is not named is the default where the file has it, or else the only one that it has.

    Raises:
        ValueError: the file has no such section, or several to choose from.
        OSError: it cannot be read.
    """
    is_arms = config is None or os.fspath(config) == ARM
    file = arms_file() if is_arms else config
    if file is None:  # nobody compiles without Vela, and who tries is told so
        return ARM, system_config or defaults[0], memory_mode or defaults[1]
    configs = read_vela_configs(file)
    # Vela looks for a relative FOLDER/FILE among its own files.
    named = ARM if is_arms else os.fspath(configs.path.resolve())
    configs = replace(configs, path=Path(ARM)) if is_arms else configs
    system = _one("system_config", system_config, defaults[0], configs.system_configs, configs)
    memory = _one("memory_mode", memory_mode, defaults[1], configs.memory_modes, configs)
    return named, system, memory


def _one(
    argument: str, name: str | None, default: str, there: tuple[str, ...], configs: VelaConfigs
) -> str:
    if name is None:
        name = default if default in there else there[0] if len(there) == 1 else None
    if name not in there:
        asked = "several to choose from" if name is None else f"no {name!r}"
        close = difflib.get_close_matches(name or "", there, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"{configs.path} has {asked}: {argument} must be one of {', '.join(map(repr, there))}"
            f"{meant}"
        )
    return name
