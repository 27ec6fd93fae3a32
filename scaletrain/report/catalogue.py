"""What can be trained: every method and auxiliary with its paper, family, recipes and published
figures.

All of it is read where it stands: the paper in the first line of the docstring, the family in its
line `Family: ...`, the figures in the head comments of the recipes.
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

# characters of a published figure
WIDTH = 100


@dataclass(frozen=True)
class Entry:
    name: str
    # first line of the docstring
    paper: str
    # "" where the file names none
    family: str
    # name -> published figure, "" where the head gives none
    recipes: Mapping[str, str]


def entries(kind: str, configs: Path = recipe.CONFIGS) -> list[Entry]:
    """kind: `methods` or `auxiliaries`; a method's recipes are those without auxiliaries."""
    used: dict[str, dict[str, str]] = {}
    for path in sorted(configs.glob("*.yaml")):
        for name in _uses(recipe.read(path), kind):
            used.setdefault(name, {})[path.stem] = published(path.read_text())

    return [Entry(name, *_docstring(kind, name), used.get(name, {})) for name in components(kind)]


def published(text: str) -> str:
    """The sentence after `Published:` in a recipe's head."""
    head = " ".join(
        line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")
    )
    sentence = (
        head.partition("Published: ")[2].partition("Not measured here")[0].strip().removesuffix(".")
    )

    return sentence if len(sentence) <= WIDTH else f"{sentence[:WIDTH].rsplit(' ', 1)[0]} ..."


def _uses(raw: Mapping[str, Any], kind: str) -> list[str]:
    """Names of the leaves of a kind in a recipe."""
    added = [
        item if isinstance(item, str) else str(item["name"]) for item in raw.get("auxiliaries", ())
    ]
    if kind == "auxiliaries":
        return added

    method = recipe.long("method", raw.get("method", {}))
    return [] if added or "name" not in method else [str(method["name"])]


def _docstring(kind: str, name: str) -> tuple[str, str]:
    source = importlib.import_module(f"scaletrain.{kind}").__path__[0]
    text = ast.get_docstring(ast.parse((Path(source) / f"{name}.py").read_text())) or ""
    family = re.search(r"\bFamily: ([^.\n]+)", text)
    return re.sub(r" ?Family: .*", "", text.partition("\n")[0]), family[1] if family else ""


def lines(kind: str, configs: Path = recipe.CONFIGS) -> list[str]:
    """For a terminal: a line per leaf, and indented under it its family and a line per recipe."""
    found = entries(kind, configs)
    wide = max((len(name) for entry in found for name in entry.recipes), default=0)
    result = []

    for entry in found:
        result.append(f"{entry.name}  {entry.paper}")
        result += [f"    family: {entry.family}"] if entry.family else []
        result += [
            f"    {name:{wide}}  {figure}".rstrip() for name, figure in entry.recipes.items()
        ]

    return result
