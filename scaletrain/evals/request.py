"""What an evaluation is asked for: the options of `scaletrain eval` as one value, which a fleet can
pass on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scaletrain.config import recipe, schema, validation
from scaletrain.evals import benchmark
from scaletrain.evals.encoders.encoder import EncoderConfig, EncoderKind
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import FeatureConfig


@dataclass(frozen=True)
class Request:
    """Benchmarks and everything that decides what they measure, besides the encoder.

    dataset: name or file of a descriptor; else `train` and `test` are folders or addresses of
    labelled shards, by default the run's own data and a folder `test` or `val` next to it.
    data_root: folder of the descriptors' shards. overrides: such as `linear.epochs=20` or
    `features.size=224`, of a benchmark, of the features or of the encoder. kind: the trained
    encoder or a baseline. labels: a label subset of the training shards; only its samples are used
    for training. Without it all are, also where the run itself was trained on a data.subset, which
    the result then says. same_numbers: both sets number their classes alike, whatever their
    classes.json say. results: folder of the results; None: that of the encoder. store: folder of
    the features; None: next to the results.
    """

    benchmarks: tuple[str, ...]
    dataset: str = ""
    train: str | None = None
    test: str | None = None
    data_root: Path | None = None
    overrides: tuple[str, ...] = ()
    kind: EncoderKind = "trained"
    labels: Path | None = None
    same_numbers: bool = False
    results: Path | None = None
    store: Path | None = None

    def arguments(self, benchmarks: Sequence[str]) -> list[str]:
        """The same request of some of its benchmarks, as arguments of `scaletrain eval TARGET`."""
        options: dict[str, object] = {
            "--dataset": self.dataset,
            "--train": self.train,
            "--test": self.test,
            "--data-root": self.data_root,
            "--labels": self.labels,
            "--results": self.results,
            "--store": self.store,
        }
        words = [*benchmarks, "--encoder", self.kind]
        for name, value in options.items():
            words += [name, str(value)] if value else []

        for override in self.overrides:
            # Of a benchmark that is left out, it would be refused.
            if override.partition(".")[0] in (*benchmarks, "encoder", "features"):
                words += ["--set", override]

        return [*words, *(["--same-numbers"] if self.same_numbers else [])]


def settings(benchmarks: Sequence[str], overrides: Iterable[str]) -> dict[str, schema.Frozen]:
    """Validated settings of "encoder", "features" and of each benchmark, in the given order. Raises
    EvalError.
    """
    if not benchmarks:
        raise EvalError(f"no benchmark given; available: {', '.join(benchmark.names())}")

    models: dict[str, type[schema.Frozen]] = {
        "encoder": EncoderConfig,
        "features": FeatureConfig,
        **{name: benchmark.load(name).Config for name in benchmarks},
    }
    raw: Mapping[str, Any] = recipe.apply({}, overrides)

    for section in raw:
        if section not in models:
            hint = recipe.nearest(section, models) or f"; this evaluation has: {', '.join(models)}"
            raise EvalError(f"override of '{section}', which is not evaluated{hint}")

    return {name: _validate(model, raw.get(name, {}), name) for name, model in models.items()}


def _validate(model: type[schema.Frozen], raw: Any, name: str) -> schema.Frozen:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        text = validation.explain(error, lambda loc: _hint(str(loc[-1]), model), name)
        raise EvalError(text) from None


def _hint(key: str, model: type[schema.Frozen]) -> str:
    fields = model.model_fields
    return recipe.nearest(key, fields) or f"; available: {', '.join(fields)}"
