"""Write docs/recipes.md from the recipe's schema:  python docs/recipe_reference.py

What the schema says of a key (type, limits, default, meaning) is said there and nowhere else; a
test compares the file with what this script makes of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from torchclust.recipes.schema import Recipe
from torchclust.zoo import DATASETS, MODELS

PAGE = Path(__file__).parent / "recipes.md"
WORDS = {"boolean": "`true`, `false`", "object": "mapping", "string": "text"}
LIMITS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
INTRODUCTION = """\
# Recipes

<!-- Written by docs/recipe_reference.py from torchclust/recipes/schema.py: change it there. -->

A recipe is a YAML file that says what `torchclust run` does. Each section is a stage, and a section
that is absent (or `null`) is a stage that is not run. Unknown keys are errors that name the nearest
valid one, and so are values of the wrong type.

```yaml
{example}```

```sh
torchclust check recipes/mnist_cnn.yaml --set model.batch_norm=true
torchclust run recipes/mnist_cnn.yaml --set cluster.n_clusters=16 --output runs/sixteen
torchclust sweep recipes/mnist_cnn.yaml --set cluster.n_clusters=4,8,16,32
```

`check` reads the recipe and the data and shows what would be clustered; nothing is trained or
written. `--set` overrides any key, may be repeated, and takes YAML: `--set prune=null` leaves a
stage out, a key's `null` is its default, `--set data=fashion_mnist` changes a name and keeps the
section's other keys.

A run that was interrupted goes on with `--resume`: stages that were done are kept, and the one that
was interrupted starts anew. They are kept by what they depend on, so a sweep trains once: the
recipe's sections, the checkpoint, versions, and your own modules that its targets import. What is
in the folders of your data is not looked at: after other data, name another `--output`.

Relative paths, those in a recipe too (`checkpoint`, `root`, `vela.config`), begin in the folder
where the command runs; targets are looked for beside the recipe, then there. The `report.json`,
`recipe.yaml` and `chosen.yaml` of a run are recipes too, and find their targets from any folder.

A run writes into its folder: `report.md` for people and `report.json` for scripts, `report.png`,
`float.tflite`, `int8.tflite` (clustered), `baseline_int8.tflite` (the *control*, trained for as
long without clustering), what Vela made of both, `model.packed`, and the recipe as it was run.

A LightningModule of your own, with its data and its metric, stands in the place of `model`:
[your network, your data, your loss](your-project.md).
"""


def page() -> str:
    """Return the whole of docs/recipes.md."""
    sections = {name: _section_class(field) for name, field in Recipe.model_fields.items()}
    recipe = (PAGE.parent.parent / "recipes" / "mnist_cnn.yaml").read_text(encoding="utf-8")
    example = [line for line in recipe.splitlines(keepends=True) if not line.startswith("#")]
    parts = [
        INTRODUCTION.format(example="".join(example)),
        _keys("The file", Recipe),
        *(_keys(f"`{name}`", section) for name, section in sections.items() if section),
        _names("Networks", "`model.name` is one of these; arguments are further keys.", MODELS),
        _names("Data sets", "`data.name` is one of these.", DATASETS),
    ]
    return "\n".join(parts)


def _section_class(field: FieldInfo) -> type[BaseModel] | None:
    candidates = (field.annotation, *get_args(field.annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _keys(heading: str, section: type[BaseModel]) -> str:
    """Return a heading, the class's docstring, and a table of its keys."""
    schema = section.model_json_schema()
    rows = [
        (f"`{key}`", _type(key, told), _default(key, told, schema.get("required", [])), _say(told))
        for key, told in schema["properties"].items()
    ]
    table = _table(("key", "values", "default", "meaning"), rows)
    return "\n".join([f"## {heading}", "", _prose(section), "", *table]) + "\n"


def _type(key: str, told: Mapping[str, Any]) -> str:
    """Return a JSON schema's type in words, limits included."""
    choices = [choice for choice in told.get("anyOf", [told]) if choice.get("type") != "null"]
    return " or ".join(_one_type(key, choice) for choice in choices)


def _one_type(key: str, told: Mapping[str, Any]) -> str:
    if "$ref" in told:
        return f"[section](#{key})"
    if "enum" in told:
        return ", ".join(f"`{value}`" for value in told["enum"])
    kind = told.get("format") or told["type"]
    limits = [f"{words} {told[limit]:g}" for limit, words in LIMITS.items() if limit in told]
    return ", ".join([WORDS.get(kind, kind), *limits])


def _default(key: str, told: Mapping[str, Any], required: Iterable[str]) -> str:
    if key in required:
        return "needed"
    value = told.get("default")
    return "none" if value in (None, {}, "") else f"`{_yaml(value)}`"


def _say(told: Mapping[str, Any]) -> str:
    return str(told.get("description", "")).replace("|", "\\|")


def _names(heading: str, text: str, builders: Mapping[str, Callable[..., Any]]) -> str:
    """Return a table of named builders, the first sentence on each, and what else they take."""
    rows = []
    for name, build in builders.items():
        sentence = " ".join(_prose(build).partition("\n\n")[0].split())
        parameters = inspect.signature(build).parameters.values()
        keywords = [p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        arguments = ", ".join(f"`{p.name}: {_yaml(p.default)}`" for p in keywords)
        rows.append((f"`{name}`", sentence.removeprefix("Build "), arguments))
    table = _table(("name", "what it is", "arguments"), rows)
    return "\n".join([f"## {heading}", "", text, "", *table]) + "\n"


def _prose(documented: Any) -> str:
    """Return a docstring with Markdown's backticks."""
    return (inspect.getdoc(documented) or "").replace("``", "`")


def _yaml(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = (head, ("---",) * len(head), *rows)
    return ["| " + " | ".join(cells).rstrip() + " |" for cells in lines]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
