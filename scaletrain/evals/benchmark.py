"""What a benchmark declares of itself, and how its file is found.

A benchmark is a file in benchmarks/, named by its file name, with a frozen `Config` and

- `needs(config, encoder) -> Needs`: what it will use. It is known before anything is opened, so
  that a fleet can plan with it.
- `measure(config, context) -> Score`: see predictions.py.

A benchmark of more than the encoder also has `identity(context)`, which identifies the rest.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from scaletrain.config import recipe, schema
from scaletrain.evals import benchmarks as package
from scaletrain.evals.errors import EvalError
from scaletrain.evals.open_dataset import SplitName


@dataclass(frozen=True)
class Needs:
    """What a benchmark uses.

    splits: of the dataset, under the test transform, so that their features are stored. augmented:
    whether it also encodes random views of training images. network: whether it scores the whole
    network of a run, which the encoder alone does not have. gpus: of its job, where there are any.
    """

    splits: tuple[SplitName, ...]
    augmented: bool = False
    network: bool = False
    gpus: int = 1


class Benchmark(Protocol):
    """The content of a benchmark's file."""

    Config: type[schema.Frozen]

    def needs(self, config: Any, encoder: Any) -> Needs: ...
    def measure(self, config: Any, context: Any) -> Any: ...


def names() -> tuple[str, ...]:
    """Names of all benchmarks."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__)))


def load(name: str) -> Benchmark:
    """A benchmark by name. Raises EvalError for an unknown one."""
    if name not in names():
        raise EvalError(
            f"unknown benchmark '{name}'{recipe.closest(name, names())}; available: "
            f"{', '.join(names())}"
        )

    module: Any = importlib.import_module(f"{package.__name__}.{name}")
    return module  # type: ignore[no-any-return]


def identity(benchmark: Benchmark, context: Any) -> Mapping[str, Any]:
    """What defines a measurement besides the encoder, its settings and the dataset."""
    further = getattr(benchmark, "identity", None)
    return further(context) if further else {}
