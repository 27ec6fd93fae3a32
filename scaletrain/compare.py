"""Runs side by side: accuracy against epochs, images and time, and when each reaches the other's final accuracy.

Accuracies are those of the protocol cards in RUN/evals, at the steps that were evaluated and nowhere in between. Hours are of
training alone: the images between two records of RUN/metrics.jsonl at the speed of that record, so waiting in a queue is free.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from scaletrain import config
from scaletrain.progress import number
from scaletrain.recipe import ConfigError, nearest


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint."""

    step: int
    epochs: float | None  # None: the records do not tell how long an epoch is
    images: int
    hours: float | None
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

    Raises ConfigError where a run has no such cards.
    """
    if len({str(run) for run in runs}) < len(runs):
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
    protocols = {
        json.dumps([c["protocol"], c["data"]["test"]["sha256"]], sort_keys=True) for of in found.values() for c in of[metric]
    }
    return {
        "metric": metric,
        "points": {run: [asdict(p) for p in of] for run, of in points.items()},
        "reached": [asdict(_reach(a, b, points)) for a, b in permutations(points, 2)],
        "alike": len(protocols) == 1,
    }


def _reach(run: str, other: str, points: dict[str, list[Point]]) -> Reach:
    last = points[other][-1]
    point = next((p for p in points[run] if p.accuracy >= last.accuracy), None)
    if point is None:
        return Reach(run, other, last.accuracy, None, None, None)
    hours = point.hours / last.hours if point.hours is not None and last.hours else None
    return Reach(run, other, last.accuracy, point, point.images / last.images if last.images else None, hours)


def _cards(run: Path) -> dict[str, list[Any]]:
    """The cards of the trained encoder with all labels, by the name of each top-1 accuracy in them, ascending by step."""
    result: dict[str, list[Any]] = {}
    for path in sorted((run / "evals").glob("*.json")):
        try:
            card = json.loads(path.read_text())
            if card["encoder"] == "trained" and "labels" not in card["data"]:
                for name in card["metrics"]:
                    if f"{name}_per_class" in card["metrics"]:
                        result.setdefault(name, []).append(card)
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no card of `scaletrain eval`; delete it or evaluate again") from None
    return {name: sorted(cards, key=lambda card: int(card["step"])) for name, cards in sorted(result.items())}


def _points(run: Path, cards: Sequence[Any], metric: str) -> list[Point]:
    batch = config.load(run / "config.yaml").batch
    records = _records(run)
    per_epoch = max((r["step"] // (r["epoch"] + 1) + 1 for r in records if r["epoch"]), default=None)
    steps = [0, *(r["step"] + 1 for r in records)]
    speeds = [r.get("speed/images_per_second") or np.nan for r in records]
    hours = np.concatenate([[0.0], np.cumsum(np.diff(steps) * batch / np.array(speeds) / 3600)])
    points = []
    for card in cards:
        step = int(card["step"])
        spent = float(np.interp(step, steps, hours)) if step <= steps[-1] else np.nan
        epochs = step / per_epoch if per_epoch else None
        points.append(Point(step, epochs, step * batch, None if np.isnan(spent) else spent, card["metrics"][metric]))
    return points


def _records(run: Path) -> list[dict[str, Any]]:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # cut short by a crash
            continue
    return records


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
        console.print("note: these cards differ in protocol or test set; the accuracies are not of one measurement")


def _cells(point: dict[str, Any]) -> tuple[str, str, str]:
    epochs, hours = (point[key] for key in ("epochs", "hours"))
    return "-" if epochs is None else f"{epochs:.1f}", number(point["images"]), "-" if hours is None else f"{hours:.2f}"
