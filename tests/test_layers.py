"""Who may import whom, read from the syntax trees: what stands left never imports what stands right
of it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = (
    ("core", "config", "dist", "environment", "exit_codes", "peers", "rng"),
    ("runtime",),
    ("ops",),
    ("nn", "optim", "data", "checkpoint"),
    ("methods", "auxiliaries", "importers", "engines"),
    ("train",),
    ("evals",),
    ("saliency", "pipelines", "curation", "estimate", "doctor"),
    ("report",),
    ("launch",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
DATA = (
    ("errors",),
    ("sampling", "transforms"),
    ("format",),
    ("storage",),
    ("reading",),
    ("loading",),
)  # likewise, within data/
DATA_LEVEL = {name: level for level, names in enumerate(DATA) for name in names}
COLLECTIVES = {"dist", "engines", "estimate"}  # the only packages that know torch.distributed
PLUGINS = {  # packages whose files do not know each other, but for what they share
    "methods": ("base",),
    "auxiliaries": ("base",),
    "importers": (
        "command",
        "dedup",
        "idx",
        "journal",
        "listing_source",
        "sources",
        "tar_source",
        "write",
    ),
    "engines": (
        "base",
        "config",
        "deepspeed_config",
        "gradient_cache",
        "non_finite",
        "placement",
    ),
    "evals.benchmarks": (),
    "evals.encoders.foreign": (),
    "pipelines.stages": (),
}
SOURCES = sorted((ROOT / "scaletrain").rglob("*.py"))
ALL = [
    p
    for room in ("scaletrain", "launchers", "shards", "benchmarks", "tests")
    for p in sorted((ROOT / room).rglob("*.py"))
]


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names that a module's source imports or reaches through `torch.`, relative ones
    resolved; lazy ones included.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield ast.unparse(node)


def package(module: str) -> str:
    """`scaletrain.nn.norm` -> `nn`."""
    return [*module.split("."), ""][1]


def plugin(module: str) -> tuple[str, str]:
    """The package of plugins and the file in it: `scaletrain.methods.byol` -> ("methods", "byol"),
    else two empty texts.
    """
    for kind, shared in PLUGINS.items():
        name = f"{module}.".removeprefix(f"scaletrain.{kind}.").partition(".")[0]
        if f"{module}.".startswith(f"scaletrain.{kind}.") and name and name not in shared:
            return kind, name
    return "", ""


def faults(module: str, source: str, *, is_package: bool = False) -> list[str]:
    here, found = package(module), []
    kind, leaf = plugin(module)
    for name in set(imports(module, source, is_package=is_package)):
        there = package(name)
        if name.split(".")[0] == "scaletrain" and there in LEVEL:
            if LEVEL[there] > LEVEL[here] or (here != there and LEVEL[there] == LEVEL[here] > 0):
                found.append(f"{module} imports {name}, which does not stand left of it")
            inner, outer = module.split(".")[2:3], name.split(".")[2:3]
            if here == there == "data" and DATA_LEVEL.get(*outer, 0) > DATA_LEVEL.get(*inner, 0):
                found.append(f"{module} imports {name}, which does not stand left of it in data/")
            other_kind, other = plugin(name)
            if kind and other_kind == kind and other != leaf:
                found.append(f"{module} imports {name}: plugins do not know each other")
            if kind in ("methods", "auxiliaries") and there == "data":
                found.append(
                    f"{module} imports {name}: a method or auxiliary does not know where its "
                    "batches come from"
                )
            if there == "importers" and here not in ("importers", "cli"):
                found.append(
                    f"{module} imports {name}: what reads shards does not know what writes them"
                )
            if here == "evals" and there in ("methods", "engines"):
                found.append(
                    f"{module} imports {name}; a saved network is rebuilt by scaletrain.train.build"
                )
        if f"{name}.".startswith("torch.distributed.") and here not in COLLECTIVES:
            found.append(f"{module} imports {name}; go through scaletrain.dist")
        if here == "core" and name.split(".")[0] in ("scaletrain", "numpy", "pydantic"):
            found.append(f"{module} imports {name}; the nouns need torch only")
        if name.split(".")[0] in ("launchers", "shards", "benchmarks", "tests"):
            found.append(f"{module} imports {name}: these import scaletrain, never the other way")
    return sorted(found)


def cycle(edges: Mapping[str, Collection[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one found; empty where there is
    none.
    """
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for other in sorted(edges.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in sorted(edges) if (found := visit(module, []))), [])


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", [p for p in SOURCES if package(name_of(p))], ids=name_of)
def test_imports_follow_the_order(path: Path) -> None:
    module = name_of(path)
    assert package(module) in LEVEL, (
        f"{path} has no place in the order of imports; give it one here and in the design"
    )
    assert faults(module, path.read_text(), is_package=path.name == "__init__.py") == []


def test_no_files_import_each_other_in_a_circle() -> None:
    modules = {name_of(path): path for path in SOURCES}
    edges = {}
    for module, path in modules.items():
        names = imports(module, path.read_text(), is_package=path.name == "__init__.py")
        edges[module] = {
            near
            for name in names
            if (near := name if name in modules else name.rpartition(".")[0]) in modules
        }
    assert cycle({module: near - {module} for module, near in edges.items()}) == []


def test_a_circle_is_found() -> None:
    assert cycle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_packages_hold_no_code_of_their_own() -> None:
    """What is imported stands in a file that can be named."""
    assert [
        str(path) for path in SOURCES if path.name == "__init__.py" and path.read_text().strip()
    ] == []


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_are_small_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.name not in ("utils.py", "helpers.py", "misc.py", "common.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scaletrain.methods.x", "from scaletrain.engines import ddp"),
        ("scaletrain.methods.x", "from scaletrain.train import monitor"),
        ("scaletrain.methods.x", "from ..data.loading import loader"),
        ("scaletrain.methods.x", "def f():\n    import scaletrain.data.sampling.plan"),
        ("scaletrain.methods.x", "from scaletrain.methods import byol"),
        ("scaletrain.methods.x", "from .byol import Model"),
        ("scaletrain.methods.x", "import torch\nw = torch.distributed.get_world_size()"),
        ("scaletrain.methods.x", "from torch import distributed"),
        ("scaletrain.checkpoint.writer", "import torch.distributed as c10d"),
        ("scaletrain.checkpoint.writer", "from ..train import loop"),
        ("scaletrain.dist", "from .nn.norm import Norm"),
        ("scaletrain.nn.norm", "from scaletrain.data.sampling.plan import Plan"),
        ("scaletrain.core", "import numpy as np"),
        ("scaletrain.importers.write", "from shards import folder"),
        ("scaletrain.importers.cifar", "from scaletrain.importers import listing"),
        ("scaletrain.data.format.tar", "from scaletrain.data.storage import cache"),
        ("scaletrain.train.loop", "from scaletrain.importers import write"),
        ("scaletrain.evals.features", "from scaletrain.methods import byol"),
        ("scaletrain.evals.benchmarks.linear", "from . import knn"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "scaletrain.methods.x",
            "from scaletrain import dist\nfrom scaletrain.nn import norm\nfrom ..core import Batch",
        ),
        (
            "scaletrain.engines.x",
            "from torch.distributed.fsdp import fully_shard\nfrom . import base",
        ),
        (
            "scaletrain.checkpoint.writer",
            "from .. import dist\nfrom . import files\nfrom ..core import Piece",
        ),
        ("scaletrain.cli", "def f():\n    from scaletrain.train.loop import train"),
        (
            "scaletrain.data.loading.loader",
            "from scaletrain.data.errors import DataError\nfrom ..sampling import plan",
        ),
    ],
)
def test_a_right_import_is_let_through(module: str, source: str) -> None:
    assert faults(module, source) == []


def test_relative_imports_of_a_package_start_in_it() -> None:
    assert "scaletrain.evals.knn" in set(
        imports("scaletrain.evals", "from . import knn", is_package=True)
    )
    assert "scaletrain.evals.knn" in set(imports("scaletrain.evals.linear", "from . import knn"))
    assert "scaletrain.core.Batch" in set(
        imports("scaletrain.evals.linear", "from ..core import Batch")
    )
