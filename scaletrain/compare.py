"""Runs side by side: accuracy against epochs, images and time, and when each reaches the other's final accuracy.

Accuracies are those of the protocol cards in RUN/evals, at the steps that were evaluated and nowhere in between. Hours are of
training alone, every step once: the steps between two records of RUN/metrics.jsonl take the seconds per step of the latter.
So waiting in a queue, start-up and what a resume repeats are free; the first step of a start, with compilation and whatever
the method does before it, counts as an ordinary one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt, PositiveInt, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from scaletrain import config
from scaletrain.progress import number
from scaletrain.recipe import ConfigError, nearest


class _Shards(BaseModel):
    sha256: str


class _Data(BaseModel):
    train: _Shards
    test: _Shards
    labels: Any = None  # a label subset


class _Card(BaseModel):
    """What is read of a card of `scaletrain eval`."""

    encoder: str
    step: NonNegativeInt
    metrics: dict[str, FiniteFloat]
    protocol: dict[str, Any]
    data: _Data


class _Record(BaseModel):
    """What is read of a line of metrics.jsonl."""

    step: NonNegativeInt
    steps_per_epoch: PositiveInt | None = None  # None: written before records had it
    epochs: FiniteFloat | None = None  # by the end of the step, and samples drawn; None: written before records had them
    samples: NonNegativeInt | None = None
    pace: FiniteFloat | None = Field(None, alias="speed/seconds_per_step")


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint."""

    step: int
    epochs: float | None  # None: no record tells how long an epoch is
    images: int
    hours: float | None  # None: the records do not tell
    accuracy: float  # per cent


@dataclass(frozen=True)
class Reach:
    """The first evaluated checkpoint of `run` that is as good as the last of `other`."""

    run: str
    other: str
    accuracy: float  # per cent, of the other's last checkpoint
    point: Point | None  # None: not reached
    images_share: float | None  # of what the other took
    hours_share: float | None


def compare(runs: Sequence[Path], metric: str | None = None) -> dict[str, Any]:
    """`metric` of the cards, by default the first that all runs have; points per run and reaches per ordered pair.

    Raises ConfigError where a run has no such cards, or a file that is damaged.
    """
    for path in runs:
        if not (path / "config.yaml").is_file():
            what = "it has no config.yaml" if path.is_dir() else "there is no such folder"
            raise ConfigError(f"no run folder {path}: {what}")
    if len(runs) < 2:
        raise ConfigError("one run has nothing to be compared with: name two or more")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice")
    found = {str(run): _cards(run) for run in runs}
    common = [m for m in next(iter(found.values())) if all(m in of for of in found.values())]
    if metric is None and not common:
        raise ConfigError(
            "these runs were not evaluated alike: no benchmark has cards of all; scaletrain eval RUN knn makes them"
        )
    metric = metric or common[0]
    for run, of in found.items():
        if metric not in of:
            raise ConfigError(f"{run}/evals has no cards of '{metric}'{nearest(metric, of)}; it has {', '.join(of) or 'none'}")
    points = {run: _points(Path(run), of[metric], metric) for run, of in found.items()}
    cards = [card for of in found.values() for card in of[metric]]
    measurements = {json.dumps([c.protocol, c.data.train.sha256, c.data.test.sha256], sort_keys=True) for c in cards}
    return {
        "metric": metric,
        "points": {run: [asdict(p) for p in of] for run, of in points.items()},
        "reached": [asdict(_reach(a, b, points)) for a, b in permutations(points, 2)],
        "alike": len(measurements) == 1,
    }


def _reach(run: str, other: str, points: dict[str, list[Point]]) -> Reach:
    last = points[other][-1]
    point = next((p for p in points[run] if p.accuracy >= last.accuracy), None)
    if point is None:
        return Reach(run, other, last.accuracy, None, None, None)
    hours = point.hours / last.hours if point.hours is not None and last.hours else None
    return Reach(run, other, last.accuracy, point, point.images / last.images if last.images else None, hours)


def _cards(run: Path) -> dict[str, list[_Card]]:
    """The cards of the trained encoder with all labels, by the name of each top-1 accuracy in them, ascending by step."""
    result: dict[str, list[_Card]] = {}
    for path in sorted((run / "evals").glob("*.json")):
        card = _parse(_Card, path.read_bytes(), f"{path} is no card of `scaletrain eval`; delete it or evaluate again")
        if card.encoder == "trained" and card.data.labels is None:
            for name in card.metrics:
                if f"{name}_per_class" in card.metrics:
                    result.setdefault(name, []).append(card)
    return {name: sorted(cards, key=lambda card: card.step) for name, cards in sorted(result.items())}


def _points(run: Path, cards: Sequence[_Card], metric: str) -> list[Point]:
    settings, records = config.load(run / "config.yaml"), _records(run / "metrics.jsonl")
    steps = [card.step for card in cards]
    hours = _hours(records, steps, settings.monitor.every)
    places = _places(records, steps, settings.batch)
    return [
        Point(c.step, epochs, images, spent, c.metrics[metric])
        for c, (epochs, images), spent in zip(cards, places, hours, strict=True)
    ]


def _places(records: Sequence[_Record], steps: Sequence[int], batch: int) -> list[tuple[float | None, int]]:
    """Epochs (None where no record tells) and images by the end of so many steps, under the batch of each step's own time."""
    per_epoch = records[-1].steps_per_epoch if records else None
    known = [(r.step + 1, r.epochs, r.samples) for r in records if r.epochs is not None and r.samples is not None]
    if not known or per_epoch is None:
        return [(step / per_epoch if per_epoch else None, step * batch) for step in steps]

    ends, epochs, samples = np.transpose([(0.0, 0.0, 0.0), *known])
    beyond = [max(0, step - ends[-1]) for step in steps]  # after the last record
    return [
        (float(np.interp(step, ends, epochs)) + more / per_epoch, round(np.interp(step, ends, samples) + more * batch))
        for step, more in zip(steps, beyond, strict=True)
    ]


def _hours(records: Sequence[_Record], steps: Sequence[int], every: int) -> list[float | None]:
    """What the first `steps` steps took; one is recorded in `every`."""
    paced = [(n, record.pace) for n, record in enumerate(records) if record.pace is not None]
    if not paced or any(record.steps_per_epoch is None for record in records):  # old records have no pace
        return [None] * len(steps)
    # a run that was stopped has steps after its last record; they and records without a pace go at that of their neighbours
    ends = [0, *(record.step + 1 for record in records), records[-1].step + 1 + every]
    paces = np.interp(np.arange(len(records) + 1), *np.transpose(paced))
    hours = np.cumsum([0.0, *np.diff(ends) * paces]) / 3600
    return [float(np.interp(step, ends, hours)) if step <= ends[-1] else None for step in steps]


def _records(path: Path) -> list[_Record]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    # what follows the last end of a line was cut short by a crash
    return [_parse(_Record, line, f"{path}, line {n}, is no record of a run") for n, line in enumerate(lines[:-1], 1)]


def _parse(model: type[M], text: bytes, problem: str) -> M:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{problem} ({'.'.join(map(str, first['loc'])) or 'whole'}: {first['msg']})") from None


def show(found: dict[str, Any], console: Console | None = None) -> None:
    """Print what compare() found: all points, then who reaches whom."""
    console = console or Console(highlight=False, markup=False)
    table = Table("run", title=f"{found['metric']}, top-1 accuracy, %", title_justify="left", box=box.SIMPLE)
    for column in ("step", "epochs", "images", "hours", "accuracy"):
        table.add_column(column, justify="right")
    for run, points in found["points"].items():
        for p in points:
            table.add_row(run, str(p["step"]), *_cells(p), f"{p['accuracy']:.2f}")
        table.add_section()
    console.print(table)
    table = Table("run", "reaches", title="time to the other's final accuracy", title_justify="left", box=box.SIMPLE)
    for column in ("at epoch", "images", "hours", "share of its images", "of its hours"):
        table.add_column(column, justify="right")
    for reach in found["reached"]:
        goal = f"{reach['accuracy']:.2f} of {reach['other']}"
        shares = ("-" if x is None else f"{x:.2f}" for x in (reach["images_share"], reach["hours_share"]))
        table.add_row(reach["run"], goal, *(_cells(reach["point"]) if reach["point"] else ("never", "-", "-")), *shares)
    console.print(table)
    if not found["alike"]:
        console.print("note: these cards differ in protocol or labelled data; the accuracies are not of one measurement")


def _cells(point: dict[str, Any]) -> tuple[str, str, str]:
    epochs, hours = (point[key] for key in ("epochs", "hours"))
    return "-" if epochs is None else f"{epochs:.1f}", number(point["images"]), "-" if hours is None else f"{hours:.2f}"
