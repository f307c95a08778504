"""The sections that say what is trained, on what, and how it is judged.

A network of `torchclust.zoo` (or a class of one's own) that classifies images of a named data set,
or a LightningModule with its own data, losses, optimizers and metric.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from torchclust.recipes.section import AnyPath, Section, known_keys

Mode = Literal["max", "min"]


class DataSection(Section):
    """What to train and test on; a bare string is a `name`.

    With `target`, all other keys are arguments of that class or function. A function returns
    `{"train": loader, "test": loader}`, and `"val"` too if there is one.
    """

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="a data set of torchclust.zoo, such as mnist5k")
    target: str | None = Field(
        None, description="or yours: module.Class of a LightningDataModule, or a function"
    )
    batch_size: int = Field(128, ge=1, description="images per training step")
    root: AnyPath | None = Field(None, description="folder of the files, where a data set has one")
    image_size: int | None = Field(None, ge=8, description="pixels a side, for image_folder")
    download: bool | None = Field(None, description="true: fetch what is not there; --download")

    @property
    def arguments(self) -> dict[str, Any]:
        """What `target` is called with, or the named data set's loader."""
        given = self.model_dump(include=self.model_fields_set, exclude={"name", "target"})
        given |= self.model_extra or {}
        if self.target is None:
            given.pop("batch_size", None)
            given = {k: v.absolute() if isinstance(v, Path) else v for k, v in given.items()}
        else:
            given = {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}
        return {key: value for key, value in given.items() if value is not None}

    @model_validator(mode="after")
    def _one_of(self) -> DataSection:
        if (self.name is None) == (self.target is None):
            raise ValueError("give either name (a data set) or target (module.DataModule)")
        if self.target is None:
            known_keys(self.model_extra or {}, list(type(self).model_fields), "data.")
        return self


class ModelSection(Section):
    """Which network; other keys are arguments of its builder. A bare string is a `name`."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="a network of torchclust.zoo")
    target: str | None = Field(None, description="or yours: package.module.Class (or a function)")
    checkpoint: AnyPath | None = Field(None, description="state dict to load, from torch.save")

    @property
    def arguments(self) -> dict[str, Any]:
        """The builder's keyword arguments."""
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _one_of(self) -> ModelSection:
        if (self.name is None) == (self.target is None):
            raise ValueError(
                "give either name (a network of torchclust.zoo) or target (package.module.Class)"
            )
        return self


class ModuleSection(Section):
    """In the place of `model`, a LightningModule with its own losses, optimizers and metrics.

    Other keys are its arguments. What is clustered, pruned, packed and written as a file is the
    submodule that `exports` names; the rest trains along.
    """

    model_config = ConfigDict(extra="allow")

    target: str = Field(description="module.Class, importable, or beside the recipe")
    checkpoint: AnyPath | None = Field(None, description="its checkpoint, Lightning's or plain")
    exports: str = Field("", description="submodule that becomes the file; default: its forward")

    @property
    def arguments(self) -> dict[str, Any]:
        """The class's keyword arguments."""
        return dict(self.model_extra or {})


class MetricSection(Section):
    """What a module's `test_step` logs and a run reports, compares and keeps within budgets.

    In its place, `score: module.function` names a function of a module and a loader of test
    batches that returns a number; `metric` then gives that number's name, mode and unit.
    """

    name: str = Field("score", description="as test_step logs it: self.log(name, ...)")
    mode: Mode = Field("max", description="which is better: max or min")
    unit: str = Field("", description="to print behind the value")
