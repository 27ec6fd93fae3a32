"""Recipes to validated configurations and back, with errors that name the nearest key; the JSON
schema for editors.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from scaletrain.config import renamed
from scaletrain.config.recipe import ConfigError as ConfigError
from scaletrain.config.recipe import apply, flat, long, nearest, read, yaml
from scaletrain.config.schema import Config, component_config, components
from scaletrain.config.validation import explain


def _nearest_key(loc: tuple[int | str, ...], raw: Mapping[str, Any]) -> str:
    """A hint for an unknown key: its present name, the same name in another section, or the nearest
    name in its own.
    """
    if now := renamed.present_name(loc):
        return f"; it was renamed to '{now}'"
    prefix, name = ".".join(str(part) for part in loc[:-1]), str(loc[-1])

    for section, field in Config.model_fields.items():
        inner = _inner(field.annotation)
        if inner and section != prefix and name in inner.model_fields and name != "name":
            return f"; did you mean '{section}.{name}'?"

    return nearest(name, _siblings(loc, raw)).replace("'", f"'{prefix}." if prefix else "'", 1)


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The first model in an annotation: `View` in `tuple[View, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _inner(part))), None)


def _siblings(loc: tuple[int | str, ...], raw: Mapping[str, Any]) -> list[str]:
    """The valid names in the section of an unknown key."""
    model: type[BaseModel] = Config
    for depth, part in enumerate(loc[:-1]):
        if part in ("method", "engine") and depth == 0:
            model = component_config(f"{part}s", raw[part]["name"])
        elif depth and loc[0] == "auxiliaries" and isinstance(part, int):
            model = component_config("auxiliaries", raw["auxiliaries"][part]["name"])
        elif isinstance(part, str) and part in model.model_fields:
            model = _inner(model.model_fields[part].annotation) or model

    return list(model.model_fields)


def build(raw: Mapping[str, Any], source: str = "configuration") -> Config:
    """Validate a mapping; a `method` or `engine` section without a name sets keys of the default
    one.
    """
    for key in ("method", "engine"):
        section = long(key, raw.get(key, {}))
        if isinstance(section, Mapping):
            raw = {**raw, key: {**Config.model_fields[key].default, **section}}

    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        text = explain(error, lambda loc: _nearest_key(loc, raw))
        raise ConfigError(f"{source}: {text}") from None


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a recipe, its bases and the overrides into one validated, frozen Config. Raises
    ConfigError.
    """
    raw, changes = read(Path(path)), tuple(overrides)
    if Path(path).name == renamed.SAVED:
        raw = renamed.translated(raw)
    # Overrides that cannot be parsed are refused before methods are imported, which takes time.
    apply({}, changes)
    # Validated alone, so that its errors are not blamed on the command line.
    recipe = build(raw, str(path))

    return (
        build(apply(recipe.model_dump(mode="json"), changes), "command line") if changes else recipe
    )


def dump(config: Config) -> str:
    """YAML that `load` turns into an equal Config."""
    text = io.StringIO()
    yaml().dump(config.model_dump(mode="json"), text)
    return text.getvalue()


def diff(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
    """The dotted keys whose values differ, with both values; a key that one side lacks has None
    there. `published` is left out, since it changes nothing in a run.
    """
    a, b = (flat(c.model_dump(mode="json", exclude={"published"})) for c in (before, after))
    return [
        (key, a.get(key), b.get(key)) for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)
    ]


def schema() -> dict[str, Any]:
    """JSON schema of a recipe for editors, with the keys of every method, auxiliary and engine."""
    result = Config.model_json_schema()
    definitions = result["$defs"]
    for section, kind in (
        ("method", "methods"),
        ("engine", "engines"),
        ("auxiliaries", "auxiliaries"),
    ):
        names = components(kind)
        for name in names:
            # Two components may each have a model named Head, so definitions are filed under the
            # component's name.
            place = f"#/$defs/{section}.{name}"
            option = component_config(kind, name).model_json_schema(ref_template=place + ".{model}")
            definitions.update(
                {f"{section}.{name}.{key}": value for key, value in option.pop("$defs", {}).items()}
            )
            option["properties"]["name"] = {"const": name}
            definitions[f"{section}.{name}"] = option | {"title": name}

        options = [{"$ref": f"#/$defs/{section}.{name}"} for name in names]
        choice = {"anyOf": [*options, {"enum": list(names)}]}
        result["properties"][section] = (
            choice if section != kind else {"type": "array", "items": choice}
        )

    result["properties"]["data"] = {"anyOf": [result["properties"]["data"], {"type": "string"}]}
    result["properties"]["base"] = {"type": "string", "description": "recipe that this one extends"}
    return result
