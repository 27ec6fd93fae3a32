"""Scores of results with their intervals, and differences between results."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from scaletrain.evals import paired as tests
from scaletrain.evals.errors import EvalError
from scaletrain.evals.paired import Paired
from scaletrain.evals.predictions import Prediction, metric_name, unpack
from scaletrain.evals.results import Result

INTERVAL = "95 % interval"


def between(low: float | None, high: float | None) -> str:
    """An interval in a table; "-" where there is none."""
    return "-" if low is None or high is None else f"{low:.2f}-{high:.2f}"


def text(score: float, low: float | None, high: float | None) -> str:
    """A score in running text, with its interval where it has one."""
    return f"{score:.2f}" if low is None or high is None else f"{score:.2f} [{low:.2f}, {high:.2f}]"


def written(result: Result, metric: str) -> str:
    """A metric in per cent, with its interval where it has one."""
    return text(result.metrics[metric], *result.intervals.get(metric, (None, None)))


def paired(a: Result, b: Result, metric: str) -> Paired:
    """Compare a metric of two results sample by sample. Raises EvalError, naming the results, where
    that is not possible.
    """
    try:
        first, bare = _predictions(a, metric)
        second, _ = _predictions(b, metric)
        return replace(tests.paired(first, second, bare), metric=metric)
    except EvalError as error:
        raise EvalError(f"no paired test of {a.file} and {b.file}: {error}") from None


def _predictions(result: Result, metric: str) -> tuple[Prediction, str]:
    """The predictions that a metric is of, and its name without theirs."""
    if result.predictions is None:
        raise EvalError(
            f"{result.file} is of an earlier version, without predictions; evaluate again"
        )

    kept = _read(result.file.with_name(result.predictions.file), result.predictions.sha256)
    for name, prediction in kept.items():
        for bare in prediction.metrics():
            if metric_name(name, bare) == metric:
                return prediction, bare

    raise EvalError(f"{result.predictions.file} has no predictions of '{metric}'")


@lru_cache(64)
def _read(path: Path, sha256: str) -> dict[str, Prediction]:
    return unpack(path, sha256)
