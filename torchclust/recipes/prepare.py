"""From a checked recipe to its task; nothing is written to disk.

What only data and models can tell is found here, before a run begins: a misspelt network, a
missing data set, a checkpoint that does not fit, a clustering rule that matches nothing, a module
that can not take a step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchclust.allocation.sensitivity import class_divergence
from torchclust.data_aware.blocks import evaluating
from torchclust.export.accelerators import ACCELERATORS, Configuration
from torchclust.lightning.trees import installed
from torchclust.model.cluster import cluster_
from torchclust.model.clustering import is_clustered
from torchclust.recipes import own
from torchclust.recipes.checkpoint import load_checkpoint_
from torchclust.recipes.classifier import Classifier, accuracy
from torchclust.recipes.loaders import named_data
from torchclust.recipes.metric import Metric
from torchclust.recipes.schema import Recipe
from torchclust.recipes.section import RecipeError, nearest
from torchclust.recipes.subject import DataSection, ModelSection
from torchclust.recipes.targets import called, check_arguments, digest_of, import_target
from torchclust.recipes.task import Task, by_function
from torchclust.zoo.data import DATASETS
from torchclust.zoo.dataset import Data, DataError
from torchclust.zoo.networks import MODELS


@dataclass(frozen=True)
class Prepared:
    """A recipe with its task."""

    recipe: Recipe
    task: Task

    @property
    def model(self) -> nn.Module:
        """The network as it starts."""
        return self.task.network(self.task.module)


def prepare(recipe: Recipe) -> Prepared:
    """Load the data, build the model, try the rules on a copy of it.

    Raises:
        RecipeError: one line that names the key and the remedy (`DataError` for data).
    """
    if recipe.vela is not None:
        chip = recipe.vela
        named = (chip.system_config, chip.memory_mode, chip.config)
        _check_configuration("vela.accelerator", chip.accelerator, *named)
    if recipe.executorch is not None:
        program = recipe.executorch
        _check_configuration(
            "executorch.target", program.target, program.system_config, program.memory_mode
        )
    own.check_options(recipe)
    data = load_data(recipe.data) if recipe.data.name else None
    task = own.task_of(recipe, data) if recipe.module else classification(recipe, data)
    prepared = Prepared(recipe, task)
    if recipe.cluster is not None:
        try:
            tried = clustered_copy(recipe, prepared.model)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"cluster: {' '.join(str(error).split())}") from error
        if not is_clustered(tried):
            raise RecipeError("cluster: the rules leave every tensor alone; leave the section out")
    return prepared


def _check_configuration(key: str, accelerator: str, *named: Any) -> None:
    """Refuse an accelerator, a system, a memory mode that Vela does not know; `key` is the first's.

    Vela itself would be asked only after all of the training.
    """
    section = key.partition(".")[0]
    if accelerator not in ACCELERATORS:
        raise RecipeError(f"{key}: no {accelerator!r}; {nearest(accelerator, ACCELERATORS)}")
    try:
        Configuration.of(accelerator, *named)
    except OSError as error:
        file = Path(error.filename).absolute()
        raise RecipeError(f"{section}.config: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise RecipeError(f"{section}: {' '.join(str(error).split())}") from error


def classification(recipe: Recipe, data: Data | None) -> Task:
    """Return the task of a recipe that names a model: images of a named data set, accuracy."""
    assert recipe.model is not None
    assert data is not None
    model = build_model(recipe.model, data, recipe.seed, recipe.folder)
    target = recipe.model.target
    sources = [digest_of(import_target("model.target", target, recipe.folder))] if target else []
    loading = (installed()[0], data, recipe.data.batch_size, recipe.seed)
    return Task(
        module=Classifier(model, recipe.lr),
        exports="model",
        make_data=functools.partial(named_data, *loading),
        judge=by_function(accuracy),
        metric=Metric("accuracy", "max", "%"),
        distance=class_divergence,
        options=own.processes_forked(recipe.trainer),
        depends={"sources": sources},
    )


def clustered_copy(recipe: Recipe, network: nn.Module) -> nn.Module:
    """Return a copy of `network`, clustered as the recipe says (it must have that section)."""
    return cluster_network_(recipe, copy.deepcopy(network))


def cluster_network_(recipe: Recipe, network: nn.Module, inputs: Any = None) -> nn.Module:
    """Cluster `network` as the recipe says, in place.

    With `inputs`, unlabelled ones, it is clustered for the outputs that they give.
    """
    section = recipe.cluster
    if section is None:
        raise RecipeError("the recipe has no section cluster; add one:  cluster: {n_clusters: 16}")
    rules = section.all_rules
    return cluster_(network, rules, inputs=inputs, seed=recipe.seed, **section.options)


def load_data(section: DataSection) -> Data:
    """Load the data set that a recipe names, with the section's other keys as its arguments."""
    name = str(section.name)
    load = DATASETS.get(name)
    if load is None:
        raise RecipeError(f"data.name: no data set {name!r}; {nearest(name, DATASETS)}")
    check_arguments("data", name, load, section.arguments)
    try:
        return load(**section.arguments)
    except DataError as error:
        raise DataError(f"data: {error}") from error


def build_model(
    section: ModelSection, data: Data, seed: int, folder: str | None = None
) -> nn.Module:
    """Build the network that a recipe names, seeded, and load its checkpoint if it has one."""
    label, build = _builder(section, folder)
    given = section.arguments
    for name, value in (("input_shape", data.input_shape), ("n_classes", data.n_classes)):
        if section.name is not None:
            given.setdefault(name, value)
    torch.manual_seed(seed)
    model = called("model", label, build, given)
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model.target: {label} makes {model!r}, which is no torch.nn.Module")
    if section.checkpoint is not None:
        load_checkpoint_(model, section.checkpoint)
    _check_output(label, model, data)
    return model


def _builder(section: ModelSection, folder: str | None) -> tuple[str, Callable[..., Any]]:
    """Return a model's name for messages, and what builds it."""
    if section.target is not None:
        return section.target, import_target("model.target", section.target, folder)
    name = str(section.name)
    if name not in MODELS:
        raise RecipeError(f"model.name: no network {name!r}; {nearest(name, MODELS)}")
    return name, MODELS[name]


def _check_output(label: str, model: nn.Module, data: Data) -> None:
    """Send one image through, so that a model for other images is found out now."""
    image, _ = data.train[[0]]
    shape = tuple(image.shape)
    try:
        with torch.no_grad(), evaluating(model):
            logits = model(image)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(f"model: {label} does not take images of {shape}: {reason}") from error
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, data.n_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise RecipeError(
            f"model: {label} maps {shape} to {found}; the data need (1, {data.n_classes}) logits"
        )
