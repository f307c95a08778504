"""The task of a user's own LightningModule, data module or loaders, and metric.

Whatever does not work in it is found here, before a run writes anything: the module takes one
training step and judges one batch.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from torchclust.distillation.tasks import relative_distance
from torchclust.lightning.trees import installed, is_overridden, tree_of
from torchclust.model.restore import restore_
from torchclust.recipes.checkpoint import load_checkpoint_
from torchclust.recipes.loaders import PARTS, named_data, of_loaders
from torchclust.recipes.metric import Metric
from torchclust.recipes.pruning import NO_LENGTH
from torchclust.recipes.schema import Recipe
from torchclust.recipes.section import RecipeError, nearest
from torchclust.recipes.subject import MetricSection
from torchclust.recipes.targets import called, digest_of, import_target, told
from torchclust.recipes.task import Judge, Task, by_function, by_test_step, in_one_process
from torchclust.recipes.training import fit
from torchclust.zoo.dataset import Data

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

_LOADERS = '{"train": loader, "test": loader}'


def task_of(recipe: Recipe, named: Data | None) -> Task:
    """Return the task of a recipe with a module, which has been tried out.

    Args:
        recipe: has the section `module`.
        named: the data set, if the recipe names one, else its data are the user's too.
    """
    assert recipe.module is not None
    build = import_target("module.target", recipe.module.target, recipe.folder)
    module = build_module(recipe, build)
    tree = tree_of(module)
    assert tree is not None
    make_data, targets = _data_maker(recipe, tree, named)
    judge, metric, judging = _judge(recipe)
    task = Task(
        module=module,
        exports=recipe.module.exports,
        make_data=make_data,
        judge=judge,
        metric=metric,
        distance=relative_distance,
        options=processes_forked(recipe.trainer),
    )
    try_out(recipe, task)
    sources = [digest_of(target) for target in (build, *targets, *judging)]
    return replace(task, depends={"sources": sources})  # by now all is imported


def build_module(recipe: Recipe, build: Callable[..., Any]) -> LightningModule:
    """Build the module, seeded, and load its checkpoint if it has one."""
    section = recipe.module
    assert section is not None
    torch.manual_seed(recipe.seed)
    module = called("module", section.target, build, section.arguments)
    tree = tree_of(module)
    if tree is None or not isinstance(module, tree.LightningModule):
        raise RecipeError(
            f"module.target: {section.target} makes {type(module).__name__}, which is no "
            "LightningModule; a plain classifier goes under model:"
        )
    names = [name for name, _ in module.named_modules()]
    if section.exports not in names:
        meant = nearest(section.exports, names[1:])
        raise RecipeError(f"module.exports: no submodule {section.exports!r}; {meant}")
    if section.checkpoint is not None:
        load_checkpoint_(module, section.checkpoint, "module")
    made: LightningModule = module
    return made


def check_options(recipe: Recipe) -> None:
    """Refuse arguments of the Trainer that are the recipe's business, or that it does not have."""
    known = inspect.signature(installed()[0].Trainer).parameters
    for key in recipe.trainer:
        if key in _RECIPES_OWN:
            raise RecipeError(f"trainer.{key}: {_RECIPES_OWN[key]}")
        if key not in known:
            raise RecipeError(f"unknown key trainer.{key}; {nearest(key, known)}")


_RECIPES_OWN = {
    "max_epochs": "how long to train is train.epochs, finetune.epochs and prune.epochs",
    "callbacks": "return callbacks from the module's configure_callbacks",
    "enable_progress_bar": "--quiet leaves it out",
}


def processes_forked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with a strategy that starts its processes anew for each stage.

    Lightning's "ddp" runs the whole command again in every process; a run has several trainings,
    and stages, files and a report between them that are one process's work. Forked, not spawned:
    a clustered module can not be pickled.
    """
    strategy = options.get("strategy")
    if strategy in ("ddp", "ddp_find_unused_parameters_true"):
        return {**options, "strategy": str(strategy).replace("ddp", "ddp_fork", 1)}
    return dict(options)


def try_out(recipe: Recipe, task: Task) -> None:
    """Take one training step and judge one batch, on copies.

    Raises:
        RecipeError: one line that says what failed, and where in the user's code.
    """
    _try("module", lambda: _judge_a_batch(recipe, task))
    if any(section is not None for section in (recipe.train, recipe.prune, recipe.finetune)):
        _try("module", lambda: _train_a_step(recipe, task))


def _try(section: str, attempt: Callable[[], object]) -> None:
    try:
        attempt()
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"{section}: {told(error)}") from error


def _train_a_step(recipe: Recipe, task: Task) -> None:
    if recipe.prune is not None and "limit_train_batches" not in task.options:
        data = task.make_data()
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
            try:
                len(loader)
            except TypeError:
                raise RecipeError(NO_LENGTH) from None
    options = {**in_one_process(task.options), "fast_dev_run": 1}
    module, seed = copy.deepcopy(task.module), recipe.seed
    fit(module, task.make_data(), epochs=1, seed=seed, options=options, progress=False)
    try:
        restore_(copy.deepcopy(task.module), module.state_dict())
    except RuntimeError as error:
        raise RecipeError(
            f"module: what it has after training cannot be put back into a new one, "
            f"{' '.join(str(error).split())}; make all parameters and buffers in __init__, not in "
            "setup() or on the way"
        ) from error


def _judge_a_batch(recipe: Recipe, task: Task) -> None:
    data = task.make_data()
    data.prepare_data()
    data.setup("test")
    if not is_overridden("test_dataloader", data):
        raise RecipeError(
            f"data.target: {recipe.data.target} has no test loader; a run is judged by one:  "
            "def test_dataloader(self): return DataLoader(...)"
        )
    first = list(itertools.islice(data.test_dataloader(), 1))
    if not first:
        raise RecipeError(f"data.target: {recipe.data.target} has no test batches")
    task.inputs(task.module, 1, recipe.seed)
    if not math.isfinite(task.judged(task.module, batches=first)):
        task.score(task.module)  # one batch may be too little for a metric such as an AUC


def _data_maker(
    recipe: Recipe, tree: ModuleType, named: Data | None
) -> tuple[Callable[[], LightningDataModule], list[Callable[..., Any]]]:
    """Return what makes the data module, and the targets that it calls."""
    section = recipe.data
    if named is not None:
        return functools.partial(named_data, tree, named, section.batch_size, recipe.seed), []
    label = str(section.target)
    build = import_target("data.target", label, recipe.folder)

    def make() -> LightningDataModule:
        tree.seed_everything(recipe.seed, verbose=False)
        made = called("data", label, build, section.arguments)
        if isinstance(made, Mapping) and {"train", "test"} <= set(made) <= set(PARTS):
            return of_loaders(tree, **made)
        if not isinstance(made, tree.LightningDataModule):
            raise RecipeError(
                f"data.target: {label} makes {_kind(made)}; a module of {tree.__name__} takes "
                f"a LightningDataModule of that package, or a function that returns {_LOADERS}"
            )
        data: LightningDataModule = made
        return data

    return make, [build]


def _kind(made: object) -> str:
    cls = type(made)
    keys = f" with {', '.join(map(repr, made))}" if isinstance(made, Mapping) else ""
    return f"{cls.__module__}.{cls.__qualname__}{keys}"


def _judge(recipe: Recipe) -> tuple[Judge, Metric, list[Callable[..., Any]]]:
    """Return how modules are judged, the metric, and the targets that are called for it."""
    section = recipe.metric or MetricSection()  # type: ignore[call-arg]
    if recipe.score is None:
        options = processes_forked(recipe.trainer)
        return (
            by_test_step(section.name, options),
            Metric(section.name, section.mode, section.unit),
            [],
        )
    function = import_target("score", recipe.score, recipe.folder)
    named = section.name if recipe.metric else recipe.score.rpartition(".")[2]
    return by_function(function), Metric(named, section.mode, section.unit), [function]
