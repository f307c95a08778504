"""From a checked recipe to its data and its starting model; nothing is written to disk.

What only data and models can tell is found here, before a run begins: a misspelt network, a
missing data set, a checkpoint that does not fit, a clustering rule that matches nothing.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from torchclust.export.accelerators import ACCELERATORS
from torchclust.model.cluster import cluster_
from torchclust.model.clustering import is_clustered
from torchclust.model.restore import restore_
from torchclust.recipes.schema import DataSection, ModelSection, Recipe, RecipeError, nearest
from torchclust.zoo.data import DATASETS
from torchclust.zoo.dataset import Data, DataError
from torchclust.zoo.networks import MODELS


@dataclass(frozen=True)
class Prepared:
    """A recipe with its data and its starting model."""

    recipe: Recipe
    data: Data
    model: nn.Module


def prepare(recipe: Recipe) -> Prepared:
    """Load the data, build the model, try the rules on a copy of it.

    Raises:
        RecipeError: one line that names the key and the remedy (`DataError` for data).
    """
    if recipe.vela is not None:
        _check_accelerator("vela.accelerator", recipe.vela.accelerator)
    if recipe.executorch is not None:
        _check_accelerator("executorch.target", recipe.executorch.target)
    data = load_data(recipe.data)
    model = build_model(recipe.model, data, recipe.seed)
    if recipe.cluster is not None:
        try:
            tried = clustered_copy(recipe, model)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"cluster: {' '.join(str(error).split())}") from error
        if not is_clustered(tried):
            raise RecipeError("cluster: the rules leave every tensor alone; leave the section out")
    return Prepared(recipe, data, model)


def _check_accelerator(key: str, given: str) -> None:
    if given not in ACCELERATORS:
        raise RecipeError(f"{key}: no {given!r}; {nearest(given, ACCELERATORS)}")


def clustered_copy(recipe: Recipe, model: nn.Module, inputs: Tensor | None = None) -> nn.Module:
    """Return a copy of `model`, clustered as the recipe says (it must have that section).

    With `inputs`, unlabelled images, it is clustered for the outputs that they give.
    """
    section = recipe.cluster
    if section is None:
        raise RecipeError("the recipe has no section cluster; add one:  cluster: {n_clusters: 16}")
    rules = section.all_rules
    return cluster_(copy.deepcopy(model), rules, inputs=inputs, seed=recipe.seed, **section.options)


def load_data(section: DataSection) -> Data:
    """Load the data set that a recipe names, with the section's other keys as its arguments."""
    load = DATASETS.get(section.name)
    if load is None:
        meant = nearest(section.name, DATASETS)
        raise RecipeError(f"data.name: no data set {section.name!r}; {meant}")
    given = section.model_dump(exclude={"name", "batch_size"}, exclude_none=True)
    _check_arguments("data", section.name, load, given)
    try:
        return load(**given)
    except DataError as error:
        raise DataError(f"data: {error}") from error


def build_model(section: ModelSection, data: Data, seed: int) -> nn.Module:
    """Build the network that a recipe names, seeded, and load its checkpoint if it has one."""
    label, build = _builder(section)
    given = section.arguments
    for name, value in (("input_shape", data.input_shape), ("n_classes", data.n_classes)):
        if section.name is not None:
            given.setdefault(name, value)
    _check_arguments("model", label, build, given)
    torch.manual_seed(seed)
    try:
        model = build(**given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"model: {label} can not be built: {error}") from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model.target: {label} makes {model!r}, which is no torch.nn.Module")
    if section.checkpoint is not None:
        load_checkpoint_(model, section.checkpoint)
    _check_output(label, model, data)
    return model


def load_checkpoint_(model: nn.Module, file: Path) -> nn.Module:
    """Load a state dict, clustered or plain, into `model`, in place.

    Takes what ``torch.save(model.state_dict(), file)`` writes, ``.safetensors``, and Lightning's
    checkpoints, whose names then lose their leading ``model.``.
    """
    try:
        content = _read_checkpoint(file)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(f"model.checkpoint: cannot read {file}: {reason}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        found = type(content).__name__
        raise RecipeError(f"model.checkpoint: {file} holds a {found}, no state dict")
    if content and all(str(name).startswith("model.") for name in content):
        content = {name.removeprefix("model."): value for name, value in content.items()}
    try:
        return restore_(model, content)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"model.checkpoint: {file} does not fit the model: {reason}") from error


def _read_checkpoint(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _builder(section: ModelSection) -> tuple[str, Callable[..., Any]]:
    """Return a model's name for messages, and what builds it."""
    if section.name is not None:
        if section.name not in MODELS:
            meant = nearest(section.name, MODELS)
            raise RecipeError(f"model.name: no network {section.name!r}; {meant}")
        return section.name, MODELS[section.name]
    target = str(section.target)
    module, _, attribute = target.rpartition(".")
    try:
        build = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RecipeError(
            f"model.target: cannot import {target!r}: {error} (expected package.module.Class, "
            "importable from the folder where you run, or installed)"
        ) from error
    if not callable(build):
        raise RecipeError(f"model.target: {target} is {build!r}, which can not be called")
    return target, build


def _check_arguments(
    section: str, label: str, function: Callable[..., Any], given: dict[str, Any]
) -> None:
    """Refuse keys that are no parameters of `function`, naming the nearest that is."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    valid = [name for name in parameters if name not in ("input_shape", "n_classes")]
    for key in given:
        if key not in parameters:
            raise RecipeError(
                f"unknown key {section}.{key}: {label} takes "
                + (f"no such argument; {nearest(key, valid)}" if valid else "no arguments")
            )
    for key, parameter in parameters.items():
        fixed = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if fixed and parameter.default is parameter.empty and key not in given:
            raise RecipeError(f"{label} needs {section}.{key}:  --set {section}.{key}=...")


def _check_output(label: str, model: nn.Module, data: Data) -> None:
    """Send one image through, so that a model for other images is found out now."""
    image, _ = data.train[[0]]
    shape, training = tuple(image.shape), model.training
    try:
        with torch.no_grad():
            logits = model.eval()(image)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).split("\n", 1)[0]
        raise RecipeError(f"model: {label} does not take images of {shape}: {reason}") from error
    finally:
        model.train(training)
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, data.n_classes):
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise RecipeError(
            f"model: {label} maps {shape} to {found}; the data need (1, {data.n_classes}) logits"
        )
