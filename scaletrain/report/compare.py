"""Comparison of runs: scores against epochs, images and time, when each reaches another's final
score, and whether their final scores differ beyond chance.

Scores are those of the results in RUN/evals, all with one protocol and the same data, at the
evaluated steps only. Hours are those of training, with every step counted once: the steps between
two records of RUN/metrics.jsonl take the seconds per step of the latter. So queueing, start-up and
steps that a resume repeats do not count; the first step of a start, with compilation, counts as an
ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain.config import load
from scaletrain.config.recipe import ConfigError, nearest
from scaletrain.evals import results
from scaletrain.evals.errors import EvalError
from scaletrain.evals.paired import holm
from scaletrain.evals.results import Result
from scaletrain.report import scores
from scaletrain.runtime import tables
from scaletrain.train import records
from scaletrain.train.progress import number
from scaletrain.train.records import StepRecord

# the scalar with the seconds per step
PACE = "speed/seconds_per_step"
# by run, metric and protocol
Found = dict[str, dict[str, dict[str, list[Result]]]]


@dataclass(frozen=True)
class Point:
    """One evaluated checkpoint."""

    step: int
    # None: no record tells how long an epoch is
    epochs: float | None
    images: int
    # None: the records do not tell
    hours: float | None
    # per cent, with its 95 % interval; None: a result of an earlier version
    score: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Reach:
    """The first evaluated checkpoint of `run` that is at least as good as the last of `other`."""

    run: str
    other: str
    # per cent, of the other's last checkpoint
    score: float
    # None: not reached
    point: Point | None
    # of what the other took
    images_share: float | None
    hours_share: float | None


def compare(
    runs: Sequence[Path], metric: str | None = None, protocol: str | None = None
) -> dict[str, Any]:
    """`metric` of the trained encoders, by default the first main one that all runs have; points
    per run, reaches per ordered pair, and a paired test per pair of the last checkpoints.

    All are of one protocol: the one that all runs have results of, with the whole training set, or
    the one whose digest begins with `protocol`. Raises ConfigError where there is none or more than
    one.
    """
    for path in runs:
        if not (path / "config.yaml").is_file():
            what = "it has no config.yaml" if path.is_dir() else "there is no such folder"
            raise ConfigError(f"no run folder {path}: {what}")

    if len(runs) < 2:
        raise ConfigError("one run has nothing to be compared with: name two or more")
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice")

    found = {str(run): _results(run) for run in runs}
    common = [
        m for m in next(iter(found.values())) if all(m in metrics for metrics in found.values())
    ]
    metric = metric or next(
        (m for m in common if _fitting(_shared(found, m), protocol)), next(iter(common), None)
    )

    if metric is None:
        raise ConfigError(
            "these runs were not evaluated alike: no benchmark has results of all; scaletrain eval "
            "RUN knn makes them"
        )

    for run, metrics in found.items():
        if metric not in metrics:
            known = ", ".join(metrics) or "none"
            raise ConfigError(
                f"{run}/evals has no results of '{metric}'{nearest(metric, metrics)}; it has "
                f"{known}"
            )

    chosen = _one(found, metric, protocol)
    compared = {run: metrics[metric][chosen] for run, metrics in found.items()}
    points = {run: _points(Path(run), steps, metric) for run, steps in compared.items()}
    others = [
        len(steps)
        for metrics in found.values()
        for digest, steps in metrics[metric].items()
        if digest != chosen
    ]

    return {
        "metric": metric,
        "protocol": chosen,
        "described": next(iter(compared.values()))[0].described,
        "left_out": sum(others),
        "points": {run: [asdict(p) for p in of] for run, of in points.items()},
        "reached": [asdict(_reach(a, b, points)) for a, b in permutations(points, 2)],
        "paired": _paired({run: steps[-1] for run, steps in compared.items()}, metric),
    }


def _shared(found: Found, metric: str) -> dict[str, Result]:
    """The protocols of which all runs have results of a metric, each with one of them."""
    first, *others = (metrics[metric] for metrics in found.values())
    return {
        digest: steps[0]
        for digest, steps in first.items()
        if all(digest in other for other in others)
    }


def _fitting(shared: Mapping[str, Result], wanted: str | None) -> list[str]:
    """The protocols that a table may be of: what was asked for, else those with the whole training
    set.
    """
    return [
        digest
        for digest, result in shared.items()
        if (digest.startswith(wanted) if wanted else result.data.labels is None)
    ]


def _one(found: Found, metric: str, wanted: str | None) -> str:
    """The protocol of a table. Raises ConfigError, saying which there are and how they differ,
    unless it is clear.
    """
    shared = _shared(found, metric)
    fit = _fitting(shared, wanted)
    if len(fit) == 1:
        return fit[0]

    if not shared:
        every = {
            digest: steps[0]
            for metrics in found.values()
            for digest, steps in metrics[metric].items()
        }
        text = (
            f"these runs were not evaluated alike: no protocol has results of '{metric}' of "
            "all; there are"
        )

        raise ConfigError(f"{text} {_listed(every)}")

    if wanted:
        text = (
            f"--protocol {wanted} matches none, or more than one, of the protocols with results of "
            f"'{metric}' for all runs"
        )
    else:
        text = f"all runs have results of '{metric}' of " + (
            f"{len(fit)} protocols" if fit else "label subsets only"
        )

    raise ConfigError(f"{text}; choose one by --protocol: {_listed(shared)}")


def _listed(found: Mapping[str, Result]) -> str:
    """Each protocol with those of its settings that are not the same in all."""
    described = {digest: result.described for digest, result in found.items()}
    keys = dict.fromkeys(key for settings in described.values() for key in settings)
    differing = [
        key for key in keys if len({settings.get(key) for settings in described.values()}) > 1
    ]

    texts = []
    for digest, settings in described.items():
        text = ", ".join(f"{key}={settings[key]}" for key in differing if key in settings)
        texts.append(f"{digest} ({text})" if text else digest)

    return ", ".join(texts)


def _reach(run: str, other: str, points: dict[str, list[Point]]) -> Reach:
    last = points[other][-1]
    point = next((p for p in points[run] if p.score >= last.score), None)
    if point is None:
        return Reach(run, other, last.score, None, None, None)

    hours = point.hours / last.hours if point.hours is not None and last.hours else None
    return Reach(
        run, other, last.score, point, point.images / last.images if last.images else None, hours
    )


def _paired(last: Mapping[str, Result], metric: str) -> list[dict[str, Any]]:
    """Whether the last checkpoints differ, pair by pair; `missing` says why there is no test.

    `differ` is corrected for the number of pairs.
    """
    found: list[dict[str, Any]] = []
    for a, b in combinations(last, 2):
        steps = {"run": a, "step": last[a].step, "other": b, "other_step": last[b].step}
        try:
            found.append(steps | asdict(scores.paired(last[a], last[b], metric)))
        except EvalError as error:
            found.append(steps | {"missing": str(error)})

    tested = [one for one in found if "p" in one]
    for one, differ in zip(tested, holm([one["p"] for one in tested]), strict=True):
        one["differ"] = differ

    return found


def _results(run: Path) -> dict[str, dict[str, list[Result]]]:
    """The results of the run's trained encoder by metric, the main ones first, then by protocol,
    ascending by step.
    """
    found: dict[str, dict[str, list[Result]]] = {}
    main = set()

    for result in results.read(run / "evals"):
        if result.encoder == "trained" and not result.name:
            main.add(result.main)
            for name in result.metrics:
                found.setdefault(name, {}).setdefault(result.protocol, []).append(result)

    return dict(sorted(found.items(), key=lambda item: (item[0] not in main, item[0])))


def _points(run: Path, evaluated: Sequence[Result], metric: str) -> list[Point]:
    settings, metrics = load.load(run / "config.yaml"), records.read(run)
    metrics.check()
    recorded = metrics.steps
    per_epoch = recorded[-1].steps_per_epoch if recorded else None
    points = []
    hours = _hours(recorded, [result.step for result in evaluated], settings.monitor.every)
    for result, spent in zip(evaluated, hours, strict=True):
        # a checkpoint of before they were kept is of a run whose batch never changed
        images = (
            result.step * settings.batch
            if result.trained.samples is None
            else result.trained.samples
        )
        epochs = (
            result.trained.epochs
            if result.trained.epochs is not None
            else result.step / per_epoch
            if per_epoch
            else None
        )

        bounds = result.intervals.get(metric, (None, None))
        points.append(Point(result.step, epochs, images, spent, result.metrics[metric], *bounds))

    return points


def _hours(recorded: Sequence[StepRecord], steps: Sequence[int], every: int) -> list[float | None]:
    """What the first `steps` steps took; one is recorded in `every`."""
    paced = [
        (n, pace)
        for n, record in enumerate(recorded)
        if (pace := record.scalars.get(PACE)) is not None
    ]
    # old records have no pace
    if not paced or any(record.steps_per_epoch is None for record in recorded):
        return [None] * len(steps)

    # a run that was stopped has steps after its last record; they and records without a pace go at
    # that of their neighbours
    ends = [0, *(record.step + 1 for record in recorded), recorded[-1].step + 1 + every]
    paces = np.interp(np.arange(len(recorded) + 1), *np.transpose(paced))
    hours = np.cumsum([0.0, *np.diff(ends) * paces]) / 3600
    return [float(np.interp(step, ends, hours)) if step <= ends[-1] else None for step in steps]


def show(found: dict[str, Any], width: int | None = None) -> list[str]:
    """The result of compare() as text: all points, which run reaches which, and which differ."""
    sets = ", ".join(f"{name} {found['described'][name]}" for name in ("train", "test"))
    text = [f"{found['metric']} in per cent", f"protocol {found['protocol']}: {sets}"]
    columns = ("step", "epochs", "images", "hours", "score", scores.INTERVAL)

    for run, points in found["points"].items():
        rows = [
            (
                str(p["step"]),
                *_cells(p),
                f"{p['score']:.2f}",
                scores.between(p["low"], p["high"]),
            )
            for p in points
        ]
        text += ["", run, *tables.render(columns, rows, width=width).splitlines()]

    for reach in found["reached"]:
        last = found["points"][reach["other"]][-1]
        final = scores.text(reach["score"], last["low"], last["high"])
        text += ["", f"{reach['run']} to the final {final} of {reach['other']}"]
        if reach["point"] is None:
            text.append("never")
            continue

        share = {
            key: "-" if reach[key] is None else f"{reach[key]:.2f}"
            for key in ("images_share", "hours_share")
        }
        epochs, images, hours = _cells(reach["point"])
        costs = [
            ("epochs", epochs, ""),
            ("images", images, share["images_share"]),
            ("hours", hours, share["hours_share"]),
        ]

        text += tables.render(
            ("", "it takes", "share of the other's"), costs, width=width
        ).splitlines()

    for pair in found["paired"]:
        text += ["", *_difference(pair, width)]

    if found["left_out"]:
        text += [
            "",
            "note: results that are left out, as they are of another protocol or other data: "
            f"{found['left_out']}",
        ]

    return text


def _difference(pair: Mapping[str, Any], width: int | None) -> list[str]:
    """Whether the last checkpoints of two runs differ."""
    named = f"{pair['run']}, step {pair['step']}, and {pair['other']}, step {pair['other_step']}"
    if "missing" in pair:
        return [named, *tables.wrap(pair["missing"], width).splitlines()]

    rows = [
        ("difference", f"{pair['difference']:+.2f}"),
        (scores.INTERVAL, f"{pair['low']:+.2f} to {pair['high']:+.2f}"),
        ("p", f"{pair['p']:.2g} ({pair['test']})"),
        ("test samples", number(pair["samples"])),
        ("they resolve", f"{pair['resolvable']:.2f}"),
        ("so it is", "a difference" if pair["differ"] else "a tie"),
    ]
    return [named, *tables.render(("", ""), rows, width=width).splitlines()]


def _cells(point: dict[str, Any]) -> tuple[str, str, str]:
    epochs, hours = (point[key] for key in ("epochs", "hours"))
    return (
        "-" if epochs is None else f"{epochs:.1f}",
        number(point["images"]),
        "-" if hours is None else f"{hours:.2f}",
    )
