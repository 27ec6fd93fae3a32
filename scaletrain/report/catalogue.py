"""A catalogue of all methods and auxiliaries, each with its paper, family, recipes and published
figures.

The paper is the first line of the file's docstring and the family its line `Family: ...`; figures
are the key `published` of the recipes.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.config import recipe
from scaletrain.config.schema import components


@dataclass(frozen=True)
class MethodEntry:
    name: str
    # first line of the docstring
    paper: str
    # "" where the file names none
    family: str
    # name -> published figure, "" where the recipe has none
    recipes: Mapping[str, str]


def entries(kind: str, configs: Path = recipe.CONFIGS) -> list[MethodEntry]:
    """kind: `methods` or `auxiliaries`; a method's recipes are those without auxiliaries."""
    used: dict[str, dict[str, str]] = {}
    for path in sorted(configs.glob("*.yaml")):
        raw = recipe.read(path)
        for name in _uses(raw, kind):
            used.setdefault(name, {})[path.stem] = str(raw.get("published", ""))

    return [
        MethodEntry(name, *_docstring(kind, name), used.get(name, {})) for name in components(kind)
    ]


def _uses(raw: Mapping[str, Any], kind: str) -> list[str]:
    """Names of the components of a kind in a recipe."""
    added = [
        item if isinstance(item, str) else str(item["name"]) for item in raw.get("auxiliaries", ())
    ]
    if kind == "auxiliaries":
        return added

    method = recipe.long("method", raw.get("method", {}))
    return [] if added or "name" not in method else [str(method["name"])]


def _docstring(kind: str, name: str) -> tuple[str, str]:
    """The paper and the family."""
    package = importlib.import_module(f"scaletrain.{kind}")
    (file,) = (
        path for folder in package.__path__ if (path := Path(folder) / f"{name}.py").exists()
    )
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    family = re.search(r"\bFamily: ([^.\n]+)", text)
    return re.sub(r" ?Family: .*", "", text.partition("\n")[0]), family[1] if family else ""


def lines(kind: str, configs: Path = recipe.CONFIGS) -> list[str]:
    """For a terminal: a line per component, and indented under it its family and a line per
    recipe.
    """
    listed = entries(kind, configs)
    wide = max((len(name) for entry in listed for name in entry.recipes), default=0)
    result = []

    for entry in listed:
        result.append(f"{entry.name}  {entry.paper}")
        result += [f"    family: {entry.family}"] if entry.family else []
        result += [
            f"    {name:{wide}}  {figure}".rstrip() for name, figure in entry.recipes.items()
        ]

    return result
