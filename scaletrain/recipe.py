"""Recipes as text: YAML files with `base:`, dotted overrides, and how they merge. Plain mappings in and out.

YAML 1.2 rules hold: `1e-6` is a number and `on` is a word.
"""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


class ConfigError(ValueError):
    """A recipe or an override that cannot be used; the text says which key of which file, and the cure."""


_SHORT = {"data": "path", "method": "name", "engine": "name"}  # sections that a plain word may stand for


def long(key: str, value: Any) -> Any:
    """`method: byol` means `method: {name: byol}`, and `data: synthetic` means `data: {path: synthetic}`."""
    return {_SHORT[key]: value} if key in _SHORT and isinstance(value, str) else value


def shards(value: Any) -> Any:
    """A list of folders and patterns as one text, `[A, B]`, which data/selection.py takes apart."""
    if not isinstance(value, list | tuple) or not all(isinstance(path, str) for path in value):
        return value
    if wrong := next((path for path in value if re.search(r",(?![^{]*\})", path)), None):
        raise ValueError(f"'{wrong}' has a comma, where a path of a list ends")
    return f"[{', '.join(value)}]"


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def yaml() -> Any:
    result: Any = YAML(typ="safe", pure=True)
    result.default_flow_style = None  # lists of numbers on one line
    result.width = 120
    result.sort_base_mapping_type_on_output = False  # keep the schema's order
    return result


def read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe with its bases merged under it."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base:` leads back to itself")
    try:
        raw = yaml().load(path.read_text())
    except FileNotFoundError:
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise ConfigError(f"{path}: no such recipe{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of keys, not a {type(raw).__name__}")
    base = raw.pop("base", None)
    return raw if base is None else merge(read(path.parent / str(base), (*seen, path)), raw)


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins, deeply; a leaf with another `name` replaces the whole leaf, since the keys belong to the name."""
    result = dict(under)
    for key, value in over.items():
        old, new = long(key, result.get(key)), long(key, value)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            renamed = key in ("method", "engine") and "name" in new and new["name"] != old.get("name", new["name"])
            result[key] = dict(new) if renamed else merge(old, new)
        elif isinstance(old, list) and isinstance(new, Mapping):
            result[key] = _merge_items(key, old, new)
        else:
            result[key] = value
    return result


def _merge_items(key: str, old: list[Any], new: Mapping[str, Any]) -> list[Any]:
    """`data.views.1.size=96`: a mapping of positions over a list."""
    places = [str(i) for i in range(len(old))]
    if bad := [name for name in new if name not in places]:
        raise ConfigError(f"'{key}' is a list; its items are {', '.join(places) or 'none'}, not '{bad[0]}'")
    merged = merge(dict(zip(places, old, strict=True)), new)
    return [merged[place] for place in places]


def apply(raw: Mapping[str, Any], overrides: Iterable[str]) -> Mapping[str, Any]:
    """`raw` with dotted overrides such as `optim.lr=0.45` or `data.views.1.size=96` merged over it, later ones last."""
    # A new name replaces its section, so names go first: `method.tau=.9 method.name=byol` keeps tau.
    for text in sorted(overrides, key=lambda text: not re.match(r"(method|engine)(\.name)?=", text)):
        raw = merge(raw, _override(text))
    return raw


def _override(text: str) -> dict[str, Any]:
    """`optim.lr=0.45` -> {"optim": {"lr": 0.45}}; the value is read as YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key or not all(key.split(".")):
        raise ConfigError(f"'{text}': an override has the form key.subkey=value, e.g. optim.lr=0.45")
    try:
        result: Any = yaml().load(io.StringIO(value))
    except YAMLError as error:
        raise ConfigError(f"'{text}': the value is not valid YAML: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        result = {part: result}
    return cast(dict[str, Any], result)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, under dotted keys."""
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{prefix}.{key}" if prefix else key).items()}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}.{i}").items()}
    return {prefix: value}
