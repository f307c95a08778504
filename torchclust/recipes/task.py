"""A task: what is trained, on what data, how it is judged, and which part becomes a file.

A classifier of images (`torchclust.recipes.classifier`) and a user's own LightningModule
(`torchclust.recipes.own`) are the two that there are; whatever comes after knows only this.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchclust.lightning.trees import tree_of
from torchclust.recipes.loaders import are_chosen, judge_on_
from torchclust.recipes.metric import Metric
from torchclust.recipes.network import Forward, joined, recorded, stand_in_
from torchclust.recipes.section import RecipeError
from torchclust.recipes.training import DEFAULTS, lightning_kept_quiet

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

_LIMITS = ("limit_test_batches", "overfit_batches", "fast_dev_run")
Judge = Callable[["LightningModule", "LightningDataModule"], float]


@dataclass(frozen=True)
class Task:
    """What a run trains, exports and judges.

    Attributes:
        module: as it starts; never trained itself, only copies of it.
        exports: path of its submodule that is compressed and becomes the file; "" is the module.
        make_data: a data module as new. Each training gets one of its own, so that no generator
            in it has moved on.
        judge: a module and a data module, whose test batches count -> a number.
        metric: that number's name.
        options: the Trainer's arguments.
        distance: between two outputs of the network: what a clustered tensor spoils.
        depends: what the above depends on beside the recipe, for the digests of stages.
    """

    module: LightningModule
    exports: str
    make_data: Callable[[], LightningDataModule]
    judge: Judge
    metric: Metric
    distance: Callable[[Any, Any], Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    depends: Mapping[str, Any] = field(default_factory=dict)

    def network(self, module: LightningModule) -> nn.Module:
        """Return the part of such a module that becomes the file."""
        return module.get_submodule(self.exports)

    def score(
        self,
        module: LightningModule,
        *,
        batches: Sequence[Any] | None = None,
        forward: Forward | None = None,
    ) -> float:
        """Return how good a module is on the test data, or on other `batches`.

        With a `forward`, that computes in the network's place, for example a file.
        """
        value = self.judged(module, batches=batches, forward=forward)
        if not math.isfinite(value):
            raise RecipeError(
                f"the metric {self.metric.name} is {value}, and a run compares models by it: look "
                "at the losses and rates of the training, or at how the metric is computed"
            )
        return value

    def judged(
        self,
        module: LightningModule,
        *,
        batches: Sequence[Any] | None = None,
        forward: Forward | None = None,
    ) -> float:
        """Return what `score` does, be it a number or not."""
        data, judged = self.make_data(), copy.deepcopy(module).eval()
        if batches is not None:
            judge_on_(data, batches)
        calls = None if forward is None else stand_in_(self.network(judged), forward)
        value = self.judge(judged, data)
        if calls is not None and not calls:
            raise RecipeError(_never_called(self.exports))
        return value

    def training_batches(self, count: int, seed: int) -> list[Any]:
        """Return the first batches of a training pass that hold `count` samples, if so many are."""
        return self._training_batches(self.make_data(), count, seed)

    def inputs(self, module: LightningModule, count: int, seed: int) -> tuple[Tensor, ...]:
        """Return what the network is called with for `count` training samples, input by input."""
        data, recording = self.make_data(), copy.deepcopy(module).eval()
        judge_on_(data, self._training_batches(data, count, seed))
        with recorded(self.network(recording)) as calls:
            self.judge(recording, data)
        if not calls:
            raise RecipeError(_never_called(self.exports))
        return joined(calls, count)

    def _training_batches(self, data: LightningDataModule, count: int, seed: int) -> list[Any]:
        tree = tree_of(self.module)
        assert tree is not None
        tree.seed_everything(seed, verbose=False)
        data.prepare_data()
        data.setup("fit")
        found: list[Any] = []
        for batch in data.train_dataloader():
            found.append(batch)
            count -= _samples_in(batch)
            if count <= 0:
                break
        return found


def by_function(function: Callable[[nn.Module, Iterable[Any]], float]) -> Judge:
    """Judge by a function of a module in eval mode and its test batches."""

    def judge(module: LightningModule, data: LightningDataModule) -> float:
        data.prepare_data()
        data.setup("test")
        with torch.inference_mode():
            return float(function(module.eval(), data.test_dataloader()))

    return judge


def by_test_step(name: str, options: Mapping[str, Any]) -> Judge:
    """Judge by what a module's own ``test_step`` logs under that name."""
    alone = {**in_one_process(options), "enable_progress_bar": False}

    def judge(module: LightningModule, data: LightningDataModule) -> float:
        tree = tree_of(module)
        assert tree is not None
        # A limit is on how many test batches judge; others are here because all are wanted.
        left_out = _LIMITS if are_chosen(data) else ()
        kept = {key: value for key, value in alone.items() if key not in left_out}
        with lightning_kept_quiet():
            trainer = tree.Trainer(**{**DEFAULTS, **kept})
            trainer.test(module, datamodule=data, verbose=False)
        logged = trainer.callback_metrics
        if name not in logged:
            names = ", ".join(sorted(logged))
            raise RecipeError(
                f"metric.name: test_step logs no {name!r}; "
                + (f"it logs {names}" if names else f"it logs nothing:  self.log({name!r}, value)")
            )
        return float(logged[name])

    return judge


def in_one_process(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for one device; where trainings fork, one that forks do not mind."""
    forks = "fork" in str(options.get("strategy"))
    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    return {**options, **alone, **({"accelerator": "cpu"} if forks else {})}


def _samples_in(batch: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(batch)
    return next((len(x) for x in leaves if isinstance(x, Tensor) and x.dim()), 1)


def _never_called(exports: str) -> str:
    name = repr(exports) if exports else "the module's forward"
    return (
        f"module.exports: {name} is never called when the module is judged, so its file can not be "
        "judged either; name the submodule that test_step calls"
    )


def as_batches(inputs: tuple[Tensor, ...] | None) -> Any:
    """Return inputs as `cluster_` and `distill_` take them: a tensor, or tuples of a few samples.

    Tuples are nested, which says that all that is in them is an input.
    """
    if inputs is None or len(inputs) == 1:
        return inputs[0] if inputs else None
    return [(part,) for part in zip(*(column.split(32) for column in inputs), strict=True)]
