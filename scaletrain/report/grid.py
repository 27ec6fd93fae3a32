"""Grids of runs: overrides with several values each, a run folder for every combination, and a
table of their results.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from scaletrain.config.recipe import ConfigError, brief, document, parse, shipped
from scaletrain.runtime import durable
from scaletrain.train import records

if TYPE_CHECKING:
    from scaletrain.evals.results import Result

# Files in the folder of the runs.
SPEC, TABLE = "grid.json", "grid.csv"
# What the columns of a metric's 95 % interval end with.
BOUNDS = ("_low", "_high")
# Most runs of a grid.
MOST = 10_000


def combinations(axes: Iterable[str], seeds: int) -> list[tuple[str, ...]]:
    """('optim.lr=0.2,0.3', ...) -> every combination as overrides; `seeds` adds seed=0 ... to each.
    Raises ConfigError.

    Values are YAML: a comma inside brackets or quotes does not part two of them. An axis may also
    be a YAML file, or the name of one of configs/studies: a list whose items are lists of
    overrides, one item for each run.
    """
    choices = [_values(axis) if (path := _study(axis)) is None else _file(path) for axis in axes]

    count = math.prod(map(len, choices)) * seeds
    if count > MOST:
        raise ConfigError(f"a grid of {count:,} runs is more than {MOST:,}: launch parts of it")

    if seeds > 1:
        choices.append([(f"seed={seed}",) for seed in range(seeds)])

    keys = [
        key
        for points in choices
        for key in {text.partition("=")[0] for point in points for text in point}
    ]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ConfigError(f"--grid names {', '.join(sorted(twice))} twice")

    elements = [tuple(itertools.chain(*points)) for points in itertools.product(*choices)]
    if len({folder(Path(), element) for element in elements}) < len(elements):
        raise ConfigError(
            "--grid names a value twice, or values whose folders would have the same name"
        )

    return elements


def folder(run: Path, overrides: Sequence[str]) -> Path:
    """Where a combination runs, e.g. RUN/optim.lr=0.2,seed=1."""
    return run / re.sub(r"[^\w.=,+-]+", "_", ",".join(overrides))


def save(run: Path, grid: Sequence[Sequence[str]]) -> None:
    """Record the runs of a grid in `run`, together with those of earlier launches."""
    run.mkdir(parents=True, exist_ok=True)
    known = elements(run) if (run / SPEC).exists() else []
    added = [list(new) for new in grid if list(new) not in known]
    durable.write(run / SPEC, json.dumps(known + added, indent=1))


def elements(run: Path) -> list[list[str]]:
    """The runs that `save` recorded in `run`. Raises ConfigError."""
    path = run / SPEC
    if not path.exists():
        raise ConfigError(f"{run} contains no grid: launch one with --grid or --seeds")

    try:
        return TypeAdapter(list[list[str]]).validate_json(path.read_bytes())
    except ValidationError:
        raise ConfigError(
            f"{path} is not a list of a grid's runs: delete it, and launch the grid again"
        ) from None


def table(run: Path, states: Mapping[Path, str] | None = None) -> list[dict[str, Any]]:
    """A row for each run of the grid in `run`: its overrides, state, last scalars and evaluations
    with their intervals; also as grid.csv.
    """
    evaluated = {
        overrides: _evaluated(folder(run, overrides)) for overrides in map(tuple, elements(run))
    }
    names = _columns(result for found in evaluated.values() for result in found)
    rows = []

    for overrides, found in evaluated.items():
        place = folder(run, overrides)
        row = dict(item.split("=", 1) for item in overrides)
        scores = {
            names[name, result.protocol]: _short(value)
            for result in found
            for name, value in _figures(result)
        }

        rows.append(
            {
                **row,
                **({"state": states.get(place, "")} if states else {}),
                **_reached(place),
                **scores,
            }
        )

    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)

    durable.write(run / TABLE, text.getvalue())

    return [{column: row.get(column, "") for column in columns} for row in rows]


def printed(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells of a table for a terminal: of accuracies the top-1 alone, each with its
    interval.
    """
    hidden = ("_top5", "_per_class", *BOUNDS)
    columns = [name for name in rows[0] if not name.split()[0].endswith(hidden)]
    return columns, [[_cell(row, name) for name in columns] for row in rows]


def _cell(row: Mapping[str, Any], column: str) -> Any:
    name, space, digest = column.partition(" ")
    low, high = (row.get(f"{name}{bound}{space}{digest}", "") for bound in BOUNDS)
    return row[column] if low == "" else f"{row[column]:.2f} [{low:.2f}, {high:.2f}]"


def _study(axis: str) -> Path | None:
    """The file that an axis names, a path or one of configs/studies; None for KEY=VALUE,VALUE."""
    if "=" in axis:
        return None

    known = shipped().get(f"studies/{axis.removesuffix('.yaml')}")
    if known and not Path(axis).is_file():
        return known

    return Path(axis) if axis.endswith(".yaml") else None


def _file(path: Path) -> list[tuple[str, ...]]:
    try:
        points = TypeAdapter(list[list[str]]).validate_python(document(path), strict=True)
    except ValidationError:
        points = []

    if not points or not all(point and all("=" in text for text in point) for point in points):
        raise ConfigError(
            f"--grid {path}: write a list of lists of overrides, e.g. - [optim.lr=0.2, "
            "method.tau=0.99]"
        )

    return [tuple(point) for point in points]


def _values(axis: str) -> list[tuple[str, ...]]:
    key, _, text = axis.partition("=")
    try:
        values, fault = parse(f"[{text}]"), ""
    except ConfigError as error:
        values, fault = [], f"; {error}"

    if not key or not values:
        raise ConfigError(
            f"--grid {brief(axis)}: write KEY=VALUE,VALUE, e.g. --grid optim.lr=0.2,0.3{fault}"
        )

    return [
        (f"{key}={json.dumps(v, default=str) if not isinstance(v, str) else v}",) for v in values
    ]


def _reached(run: Path) -> dict[str, Any]:
    """Scalars of the last recorded step."""
    steps = records.read(run).steps
    if not steps:
        return {}

    last = {"step": steps[-1].step, **steps[-1].scalars}
    names = {"step": "step", "train/loss": "loss", "speed/images_per_second": "images/s"}
    return {short: _short(last[name]) for name, short in names.items() if name in last}


def _evaluated(run: Path) -> list[Result]:
    """The newest result of each protocol, of the trained encoder."""
    from scaletrain.evals import results

    found = results.read(run / "evals")
    return list(
        {
            result.protocol: result
            for result in found
            if result.encoder == "trained" and not result.name
        }.values()
    )


def _figures(result: Result) -> list[tuple[str, Any]]:
    bounds = (
        (f"{name}{bound}", value)
        for name, interval in result.intervals.items()
        for bound, value in zip(BOUNDS, interval, strict=True)
    )
    return [*result.metrics.items(), *bounds, (f"{result.benchmark}_step", result.step)]


def _columns(found: Iterable[Result]) -> dict[tuple[str, str], str]:
    """The column of each metric and protocol: no column holds two protocols.

    The plain name of a metric is that of its only protocol with the whole training set; else the
    protocol's digest is added.
    """
    whole = {
        (name, result.protocol): result.data.labels is None
        for result in found
        for name, _ in _figures(result)
    }

    rivals = Counter(name for (name, _), full in whole.items() if full)
    return {(n, p): n if full and rivals[n] == 1 else f"{n} {p}" for (n, p), full in whole.items()}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
