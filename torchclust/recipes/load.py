"""From a file of YAML, and ``--set`` settings, to a valid `Recipe`, or one line of error."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import (
    BaseModel,
    ValidationError,
)

from torchclust.recipes.schema import Recipe
from torchclust.recipes.section import RecipeError, nearest
from torchclust.weight.config import ClusterConfig


def load_recipe(file: Path | str, settings: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe; each of `settings` is a ``key=value`` that overrides the file.

    `file` may also be a ``report.json`` of an earlier run, whose recipe is taken. A setting's key
    is dotted (``cluster.n_clusters=8``), its value is YAML (``prune=null`` leaves a stage out); a
    bare ``data=NAME`` or ``model=NAME`` changes the name and keeps the section's other keys.

    Raises:
        RecipeError: one line: the file, the key, what is wrong, what to write.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"cannot read {Path(file).absolute()}: {error.strerror or error}"
        ) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is not a YAML file: {error}") from None
    content = parse_yaml(text, source=f"{file} is not a YAML file")
    if isinstance(content, dict) and isinstance(content.get("recipe"), dict):
        content = content["recipe"]
    if not isinstance(content, dict):
        raise RecipeError(f"{file} is not a recipe: it holds no 'key: value' lines")
    for setting in settings:
        override(content, setting)
    if any(_has_target(content.get(key)) for key in ("data", "model", "module")):
        content["folder"] = content.get("folder") or str(Path(file).parent)
    return parse_recipe(content, source=str(file))


def _has_target(section: Any) -> bool:
    return isinstance(section, dict) and "target" in section


def parse_recipe(content: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Check a recipe that is already a mapping; `source` begins the error message.

    >>> content = {"name": "mine", "data": "mnist5k", "model": "arm_mlp", "train": {"epochs": 1}}
    >>> recipe = parse_recipe(content)
    >>> recipe.train.lr, recipe.cluster
    (0.001, None)
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def override(content: dict[str, Any], setting: str) -> None:
    """Apply one ``key.key=value`` to a recipe's mapping, in place.

    >>> content = {"data": {"name": "mnist5k", "batch_size": 64}}
    >>> override(content, "data=fashion_mnist")
    >>> override(content, "cluster.n_clusters=8")
    >>> content
    {'data': {'name': 'fashion_mnist', 'batch_size': 64}, 'cluster': {'n_clusters': 8}}
    """
    dotted, equals, text = setting.partition("=")
    *parents, last = dotted.strip().split(".")
    if not equals or not last or not all(parents):
        raise RecipeError(f"--set {setting}: expected key=value, e.g. --set cluster.n_clusters=8")
    value = parse_yaml(text, source=f"--set {setting}")
    if parents[:2] == ["cluster", "rules"] and len(parents) > 2 and last not in _RULE_FIELDS:
        name = ".".join([*parents[2:], last])
        raise RecipeError(
            f"--set {setting}: a tensor's name has dots, which here divide keys; give its rule in "
            f"braces:  --set 'cluster.rules={{{name}: {text}}}'"
        )
    for key in parents:
        below = content.get(key)
        if isinstance(below, str):  # a bare name
            below = {"name": below}
        elif below is None:
            below = {}
        elif not isinstance(below, dict):
            raise RecipeError(f"--set {setting}: {key} is {below!r}, which has no keys")
        content[key] = below
        content = below
    before = content.get(last)
    keeps = isinstance(value, str) and isinstance(before, dict) and "name" in before
    content[last] = {**before, "name": value} if keeps else value  # type: ignore[dict-item]


def parse_yaml(text: str, *, source: str) -> Any:
    """Return the value that YAML `text` holds; `source` begins the `RecipeError`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: {_one_line(error)}") from None


_RULE_FIELDS = {field.name for field in dataclasses.fields(ClusterConfig)}


class _Loader(yaml.SafeLoader):
    """YAML in which ``1e-3`` is a number (as in YAML 1.2) and a key written twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _one_line(error: Exception) -> str:
    """Return a YAML error as one line, with its place."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _explain(error: ValidationError) -> str:
    """Turn the first of pydantic's errors into ``key: what is wrong``."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = ".".join(location)
    if first["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        return f"unknown key {where}; {nearest(location[-1], section.model_fields)}"
    if first["type"] == "missing":
        return f"the key {where} is missing"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return f"{where}: {message}" if where else message
    if first["type"] in ("model_type", "dict_type"):
        return (
            f"{where}: should be a mapping, as in {where}: {{key: value}}, got {first['input']!r}"
        )
    return f"{where}: {first['msg'].partition(' ')[2]}, got {first['input']!r}"


def _section_at(location: list[str]) -> type[BaseModel]:
    """Return the section class at a location, for its list of valid keys."""
    model: type[BaseModel] = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation
        model = next(c for c in (annotation, *get_args(annotation)) if _is_section(c))
    return model


def _is_section(candidate: Any) -> bool:
    return isinstance(candidate, type) and issubclass(candidate, BaseModel)
