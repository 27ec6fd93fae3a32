"""A catalogue of all methods and auxiliaries, each with its paper, kind, recipes and published
figures.

The paper is the first paragraph of the file's docstring, the kind the attribute `kind` of its
class; figures are the key `published` of the recipes. Files are read without being imported.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaletrain.config import recipe
from scaletrain.config.schema import components


@dataclass(frozen=True)
class MethodEntry:
    name: str
    # first paragraph of the docstring
    paper: str
    # as core.Kind; "" for an auxiliary
    kind: str
    # name -> published figure, "" where the recipe has none
    recipes: Mapping[str, str]


def entries(package: str, configs: Path = recipe.CONFIGS) -> list[MethodEntry]:
    """package: `methods` or `auxiliaries`; a method's recipes are those without auxiliaries."""
    used: dict[str, dict[str, str]] = {}
    for path in sorted(configs.glob("*.yaml")):
        raw = recipe.read(path)
        for name in _uses(raw, package):
            used.setdefault(name, {})[path.stem] = str(raw.get("published", ""))

    return [
        MethodEntry(name, *_described(package, name), used.get(name, {}))
        for name in components(package)
    ]


def _uses(raw: Mapping[str, Any], package: str) -> list[str]:
    """Names of the components of a package in a recipe."""
    added = [
        item if isinstance(item, str) else str(item["name"]) for item in raw.get("auxiliaries", ())
    ]
    if package == "auxiliaries":
        return added

    method = recipe.long("method", raw.get("method", {}))
    return [] if added or "name" not in method else [str(method["name"])]


def _described(package: str, name: str) -> tuple[str, str]:
    """The paper and the kind."""
    folders = importlib.import_module(f"scaletrain.{package}").__path__
    (file,) = (path for folder in folders if (path := Path(folder) / f"{name}.py").exists())
    tree = ast.parse(file.read_text())

    kinds = [
        str(ast.literal_eval(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kind"
    ]
    paper = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    return paper, kinds[0] if kinds else ""


def lines(package: str, configs: Path = recipe.CONFIGS) -> list[str]:
    """For a terminal: a line per component; indented under it, its kind and a line per recipe."""
    listed = entries(package, configs)
    wide = max((len(name) for entry in listed for name in entry.recipes), default=0)
    result = []

    for entry in listed:
        result.append(f"{entry.name}  {entry.paper}")
        result += [f"    kind: {entry.kind}"] if entry.kind else []
        result += [
            f"    {name:{wide}}  {figure}".rstrip() for name, figure in entry.recipes.items()
        ]

    return result
