"""Evaluates a run, a step or an exported file, as `scaletrain eval`.

The results go where that command writes them, RUN/evals; `results.json` lists them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from scaletrain.config import recipe
from scaletrain.config.fields import Frozen, Place
from scaletrain.data.format.names import is_remote
from scaletrain.pipelines.context import StageContext
from scaletrain.runtime import durable

# Most bytes of the header of an exported file.
HEAD_BYTES = 64 << 20


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


def sources(config: Config) -> dict[str, str]:
    """The two sets that are used where they are not named either, as far as they are there."""
    from scaletrain.evals import folders

    train = config.train or _trained_on(Path(config.target))
    if not train or train == "synthetic" or is_remote(train):
        return {}

    neighbours = (str(folder) for folder in folders.next_to(train) if folder.is_dir())
    return {"the training set": train, "the test set": config.test or next(neighbours, "")}


def _trained_on(target: Path) -> str:
    """The data.path of a run, of a step or of an exported file."""
    if target.is_file():
        with target.open("rb") as opened:
            # The metadata of a safetensors file are in a JSON text at its beginning.
            size = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(min(size, HEAD_BYTES)))
        return str(json.loads(head["__metadata__"]["data"])["path"])

    run = target.parents[1] if target.parent.name == "checkpoints" else target
    file = run / "config.yaml"
    return str(recipe.document(file)["data"]["path"]) if file.is_file() else ""


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

    kept = ("benchmark", "step", "metrics", "intervals", "digest", "file")
    listed = [{key: result[key] for key in kept} for result in found]
    durable.write(context.output / "results.json", json.dumps(listed, indent=1) + "\n")
    for result in listed:
        for name, value in result["metrics"].items():
            low, high = result["intervals"][name]
            context.say(f"{name} {value:.2f} [{low:.2f}, {high:.2f}] %")
