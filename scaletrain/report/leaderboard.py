"""A leaderboard of encoders: for each benchmark and dataset their last scores, and the places that
the test set can tell apart.

An encoder's places are an interval: from one more than the encoders that are better beyond chance
to the number that are not worse beyond chance. Encoders whose places overlap are tied. All pairs
are tested sample by sample and corrected together (Holm), so that all these intervals are right
with a probability of 95 % (Mogstad et al., Inference for Ranks, 2024).

Runs of one recipe that differ by their seed alone are one entry with their mean. Then a test counts
both the variance between trainings and that between test samples.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, cycle, islice
from pathlib import Path
from statistics import fmean, median, variance

from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.evals import results
from scaletrain.evals.errors import EvalError
from scaletrain.evals.intervals import over_runs, student_probability
from scaletrain.evals.paired import holm
from scaletrain.evals.results import Result
from scaletrain.report import scores
from scaletrain.runtime import durable, tables
from scaletrain.runtime.tables import plural


@dataclass(frozen=True)
class Entry:
    """An encoder, or the runs of one recipe, with its places on a board."""

    encoder: str
    # runs that differ by their seed
    runs: int
    step: int
    # per cent, with its 95 % interval: of the test samples, or of several runs; None: not known
    score: float
    low: float | None
    high: float | None
    best_place: int
    worst_place: int

    @property
    def place(self) -> str:
        best, worst = self.best_place, self.worst_place
        return str(best) if best == worst else f"{best}-{worst}"


@dataclass(frozen=True)
class Board:
    """The entries with results of one protocol, the best first."""

    benchmark: str
    dataset: str
    metric: str
    protocol: str
    entries: tuple[Entry, ...]
    # the difference in per cent that the test set resolves: the median over pairs; None: no test
    resolvable: float | None
    # why some pairs have no test
    missing: tuple[str, ...]


# What results are of: the folder that was given, and which of its encoders if it is no run.
Source = tuple[Path, str]


def boards(folders: Sequence[Path], metric: str | None = None) -> list[Board]:
    """The boards of the newest results of run folders, without those of baselines, and of folders
    of results of other encoders. metric: in place of the main one of each benchmark.

    Raises ConfigError for a folder without results, or where no result has the metric.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a run is named twice")

    kept: dict[tuple[str, str, str], dict[Source, Result]] = {}
    for folder in folders:
        # ascending by step: the newest stays
        for result in _results(folder):
            if metric is None or metric in result.metrics:
                board = kept.setdefault((result.benchmark, result.dataset, result.protocol), {})
                baseline = "" if result.encoder == "trained" else f", {result.encoder}"
                board[folder, f"{result.name}{baseline}"] = result

    if not kept:
        raise ConfigError(f"no result has a metric '{metric}'")

    recipes = {folder: _recipe(folder) for folder in folders}
    return [_board(*key, kept[key], metric, recipes) for key in sorted(kept)]


def _results(folder: Path) -> list[Result]:
    if not folder.is_dir():
        raise ConfigError(f"no run folder {folder}: there is no such folder")

    place = folder / "evals" if (folder / "config.yaml").is_file() else folder
    chosen = [one for one in results.read(place) if one.name or one.encoder == "trained"]
    if not chosen:
        raise ConfigError(f"{place} has no results of an encoder; `scaletrain eval` makes them")

    return chosen


def _recipe(folder: Path) -> tuple[str, int]:
    """Recipe of a run without its seed, and its seed; "" and 0 where there is no run."""
    path = folder / "config.yaml"
    if not path.is_file():
        return "", 0

    config = load.load(path)
    return config.model_dump_json(exclude={"seed"}), config.seed


def _board(
    benchmark: str,
    dataset: str,
    protocol: str,
    chosen: dict[Source, Result],
    wanted: str | None,
    recipes: Mapping[Path, tuple[str, int]],
) -> Board:
    metric = wanted or next(iter(chosen.values())).main
    groups: dict[tuple[object, ...], dict[Source, Result]] = {}
    for source, result in chosen.items():
        recipe, seed = recipes[source[0]]
        seeds = sum(recipes[folder] == (recipe, seed) for folder, _ in chosen)
        # a copy is no further training, and a run of another step is not yet comparable
        alike = (recipe, result.step) if recipe and seeds == 1 else source
        groups.setdefault(alike, {})[source] = result

    # the better ones first
    order = sorted(groups.values(), key=lambda group: -_mean(group.values(), metric))
    pairs: dict[tuple[int, int], tuple[float, float]] = {}
    missing = []
    for a, b in combinations(range(len(order)), 2):
        try:
            pairs[a, b] = _test(list(order[a].values()), list(order[b].values()), metric)
        except EvalError as error:
            missing.append(str(error))

    differ = dict(zip(pairs, holm([p for p, _ in pairs.values()]), strict=True))
    entries = []
    for number, group in enumerate(order):
        better = sum(differ.get((other, number), False) for other in range(number))
        worse = sum(differ.get((number, other), False) for other in range(number, len(order)))
        entries.append(_entry(group, metric, 1 + better, len(order) - worse))

    resolvable = median(r for _, r in pairs.values()) if pairs else None
    return Board(benchmark, dataset, metric, protocol, tuple(entries), resolvable, tuple(missing))


def _entry(group: dict[Source, Result], metric: str, best: int, worst: int) -> Entry:
    (folder, name), first = next(iter(group.items()))
    bounds: tuple[float | None, float | None]
    label = str(folder / name if name else folder)
    if len(group) > 1:
        label += f" and {plural(len(group) - 1, 'other seed')}"
        bounds = over_runs([result.metrics[metric] for result in group.values()])
    else:
        bounds = first.intervals.get(metric, (None, None))

    score = _mean(group.values(), metric)
    return Entry(label, len(group), first.step, score, *bounds, best, worst)


def _mean(group: Iterable[Result], metric: str) -> float:
    return fmean(result.metrics[metric] for result in group)


def _test(a: Sequence[Result], b: Sequence[Result], metric: str) -> tuple[float, float]:
    """p of a difference between two entries, and the difference that can be resolved.

    Of single runs, the paired test. Else Student's test of the means, whose variance is that
    between trainings, alike in both, plus that of the paired difference of two trainings; degrees
    of freedom after Satterthwaite (1946).
    """
    # each run of either at least once
    several = islice(zip(cycle(a), cycle(b), strict=False), max(len(a), len(b)))
    tests = [scores.paired(one, other, metric) for one, other in several]
    if len(tests) == 1:
        return tests[0].p, tests[0].resolvable

    freedom = len(a) + len(b) - 2
    squares = sum(
        (len(group) - 1) * variance(result.metrics[metric] for result in group)
        for group in (a, b)
        if len(group) > 1
    )
    trainings = squares / freedom * (1 / len(a) + 1 / len(b))
    samples = fmean(test.error**2 for test in tests)

    total = trainings + samples
    difference = abs(_mean(a, metric) - _mean(b, metric))
    if not total:
        return float(difference == 0), 0.0

    whole = total**2 / (trainings**2 / freedom + samples**2 / max(1, tests[0].samples - 1))
    t = difference / math.sqrt(total)
    p = 2 * (1 - student_probability(t, max(1, math.floor(whole))))
    scale = math.sqrt(total / samples) if samples else 1.0
    return p, scale * fmean(test.resolvable for test in tests)


def show(chosen: Sequence[Board], width: int | None = None) -> list[str]:
    """Boards as text for a terminal."""
    text: list[str] = []
    for board in chosen:
        title = f"{board.benchmark}@{board.dataset}" if board.dataset else board.benchmark
        columns = ("place", "encoder", "step", board.metric, scores.INTERVAL)
        rows = [
            (e.place, e.encoder, str(e.step), f"{e.score:.2f}", scores.between(e.low, e.high))
            for e in board.entries
        ]
        title += f", protocol {board.protocol}, per cent"
        text += [*tables.render(columns, rows, title=title, width=width).splitlines()]

        if board.resolvable is not None:
            note = f"its test samples resolve differences from about {board.resolvable:.2f} on"
            text += tables.wrap(note, width).splitlines()

        text += [line for note in board.missing for line in tables.wrap(note, width).splitlines()]
        text.append("")

    note = (
        "Places that overlap are ties: no difference beyond chance at the 5 % level in paired "
        "tests of all pairs."
    )
    several = (
        "Of several seeds the score is the mean, with Student's interval over these trainings."
    )
    if any(entry.runs > 1 for board in chosen for entry in board.entries):
        note += f" {several}"

    return [*text, *tables.wrap(note, width).splitlines()]


def save(chosen: Sequence[Board], path: Path) -> None:
    """Write a row for each entry of each board. Raises ConfigError if that is not possible."""
    rows = list(_rows(chosen))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    try:
        durable.write(path, text.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _rows(chosen: Sequence[Board]) -> Iterator[dict[str, object]]:
    for board in chosen:
        shared = {
            key: getattr(board, key) for key in ("benchmark", "dataset", "metric", "protocol")
        }
        for entry in board.entries:
            yield shared | asdict(entry)
