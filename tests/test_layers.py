"""Who may import whom, read from the syntax trees: what stands left never imports what stands right of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    ("core", "compiled", "config", "recipe", "marks", "tables", "versions", "exit_codes", "durable"),
    ("dist", "peers"),
    ("ops", "nn", "optim", "placement"),
    ("data",),
    ("methods", "auxiliaries"),
    ("engines", "gradient_cache"),
    ("checkpoint", "saved", "files", "monitor", "board", "progress", "interrupt", "resume"),
    ("rehearsal", "initial_weights", "run_folder"),
    ("train",),
    ("evals", "saliency", "doctor", "memory", "sizes", "traffic", "compare", "catalogue"),
    ("report",),
    ("cli", "slurm"),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
COLLECTIVES = {"dist", "engines", "traffic"}  # the only rooms that know torch.distributed
LEAVES = {"methods", "auxiliaries"}  # one paper, one file: they know the nouns and the mathematics, not each other
SOURCES = sorted((ROOT / "scaletrain").rglob("*.py"))
ALL = [p for room in ("scaletrain", "launchers", "shards", "benchmarks", "tests") for p in sorted((ROOT / room).rglob("*.py"))]


def imports(module: str, source: str, *, package: bool = False) -> Iterator[str]:
    """Dotted names that a module's source imports or reaches through `torch.`, relative ones resolved; lazy ones included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield ast.unparse(node)


def room(module: str) -> str:
    """`scaletrain.nn.norm` -> `nn`."""
    return [*module.split("."), ""][1]


def faults(module: str, source: str, *, package: bool = False) -> list[str]:
    here, found = room(module), []
    for name in set(imports(module, source, package=package)):
        there = room(name)
        if name.split(".")[0] == "scaletrain" and there in LEVEL:
            own_leaf = module.split(".")[:3] == name.split(".")[:3]
            if LEVEL[there] > LEVEL[here]:
                found.append(f"{module} imports {name}, which stands right of it")
            elif here in LEAVES and there in {*LEAVES, "data"} and not own_leaf:
                found.append(f"{module} imports {name}: a leaf knows neither data nor other leaves")
        if f"{name}.".startswith("torch.distributed.") and here not in COLLECTIVES:
            found.append(f"{module} imports {name}; go through scaletrain.dist")
        if here == "core" and name.split(".")[0] in ("scaletrain", "numpy", "pydantic"):
            found.append(f"{module} imports {name}; the nouns need torch only")
        if name.split(".")[0] in ("launchers", "shards", "benchmarks", "tests"):
            found.append(f"{module} imports {name}: these import scaletrain, never the other way")
    return sorted(found)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [p for p in SOURCES if room(name_of(p))], ids=name_of)
def test_imports_follow_the_order(path: Path) -> None:
    module = name_of(path)
    assert room(module) in LEVEL, f"{path} has no place in the order of imports; give it one here and in the design"
    assert faults(module, path.read_text(), package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scaletrain.methods.x", "from scaletrain.engines import ddp"),
        ("scaletrain.methods.x", "from scaletrain import monitor"),
        ("scaletrain.methods.x", "from ..data import loader"),
        ("scaletrain.methods.x", "def f():\n    import scaletrain.data.plan"),
        ("scaletrain.methods.x", "from scaletrain.methods import byol"),
        ("scaletrain.methods.x", "from .byol import Model"),
        ("scaletrain.methods.x", "import torch\nw = torch.distributed.get_world_size()"),
        ("scaletrain.methods.x", "from torch import distributed"),
        ("scaletrain.checkpoint", "import torch.distributed as c10d"),
        ("scaletrain.checkpoint", "from .train import train"),
        ("scaletrain.dist", "from .nn.norm import Norm"),
        ("scaletrain.nn.norm", "from scaletrain.data.plan import Plan"),
        ("scaletrain.core", "import numpy as np"),
        ("scaletrain.data.write", "from shards import folder"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scaletrain.methods.x", "from scaletrain import dist\nfrom scaletrain.nn import norm\nfrom ..core import Batch"),
        ("scaletrain.engines.x", "from torch.distributed.fsdp import fully_shard\nfrom . import base"),
        ("scaletrain.checkpoint", "from . import dist, files\nfrom .core import Piece"),
        ("scaletrain.cli", "def f():\n    from scaletrain.train import train"),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_relative_imports_of_a_package_start_in_it() -> None:
    assert "scaletrain.evals.knn" in set(imports("scaletrain.evals", "from . import knn", package=True))
    assert "scaletrain.evals.knn" in set(imports("scaletrain.evals.linear", "from . import knn"))
    assert "scaletrain.core.Batch" in set(imports("scaletrain.evals.linear", "from ..core import Batch"))
