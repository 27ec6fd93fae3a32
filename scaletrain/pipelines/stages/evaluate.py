"""Evaluates a run, a step or an exported file, as `scaletrain eval`.

The results go where that command writes them, RUN/evals; `results.json` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from scaletrain.config.fields import Frozen, Place
from scaletrain.pipelines.context import StageContext
from scaletrain.runtime import durable


class Config(Frozen):
    target: Annotated[Place, Field(min_length=1)]
    """Run folder, one step of its checkpoints, or exported file."""

    benchmarks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Such as knn and linear."""

    train: Place = ""
    """Labelled shards; "": the run's own."""

    test: Place = ""
    """Labelled shards; "": the folder `test` or `val` next to `train`."""

    settings: Mapping[str, Any] = Field({})
    """Settings of benchmarks by dotted key, such as linear.epochs."""

    encoder: Literal["trained", "untrained", "pixels"] = "trained"
    """Which encoder to evaluate."""

    labels: Place = ""
    """Label subset of `train`, the only samples that are used of it."""

    same_numbers: bool = False
    """Both sets number their classes alike, whatever their classes.json say."""


def run(config: Config, context: StageContext) -> None:
    from scaletrain.evals import run as evals

    found = evals.run(
        Path(config.target),
        config.benchmarks,
        train=config.train or None,
        test=config.test or None,
        overrides=[f"{key}={json.dumps(value)}" for key, value in config.settings.items()],
        encoder=config.encoder,
        labels=Path(config.labels) if config.labels else None,
        same_numbers=config.same_numbers,
        notice=context.say,
    )

    kept = ("benchmark", "step", "metrics", "digest", "file")
    listed = [{key: result[key] for key in kept} for result in found]
    durable.write(context.output / "results.json", json.dumps(listed, indent=1) + "\n")
    for result in listed:
        for name, value in result["metrics"].items():
            context.say(f"{name} {value:.2f} %")
