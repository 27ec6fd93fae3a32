"""How often the intervals of results contain the true value, in simulated test sets.

    python -m benchmarks.intervals [SETTING...]

2,000 test samples of 10 classes that are not equally hard, accuracies from 0.3 to 0.9, 1,000 draws
of a test set for each, or 10,000 where one takes less than a millisecond. Target: 93 to 97 %. The
true value of an accuracy is its probability, that of a mean average precision its mean over many
test sets of this size, on which it depends. Its bootstraps have 100 samples here in place of 500,
which makes the standard error less sure and so the coverage lower, if anything.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from unittest import mock

import numpy as np
import torch

from scaletrain.evals import intervals
from scaletrain.evals.paired import paired
from scaletrain.evals.predictions import Ranked, Scored

SAMPLES, CLASSES, DRAWS, LOW, HIGH = 2000, 10, 1000, 0.93, 0.97
ACCURACIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# How much easier than the average the easiest class is.
SPREAD = 0.08
# Of the second encoder of a pair: a fifth of its predictions are its own, and these are better.
OWN, BETTER = 0.2, 0.05
# Test sets that give the true mean of an average precision.
MANY = 1000
RUNS = 5


def coverage(setting: str, accuracy: float, draws: int = DRAWS) -> float:
    """The share of 95 % intervals that contain the true value, in `draws` test sets."""
    return float(
        np.mean([low <= true <= high for low, true, high in SETTINGS[setting](accuracy, draws)])
    )


Found = Iterator[tuple[float, float, float]]


def _ranked(metric: str, accuracy: float, draws: int) -> Found:
    hard = accuracy + SPREAD * np.linspace(-1, 1, CLASSES)
    # a wrong one is at any of the other places
    true = accuracy if metric != "top5" else accuracy + (1 - accuracy) * 4 / (CLASSES - 1)
    for seed in range(draws):
        random = np.random.default_rng((int(1000 * accuracy), seed))
        labels = random.integers(CLASSES, size=SAMPLES)
        right = random.random(SAMPLES) < hard[labels]
        rank = np.where(right, 0, random.integers(1, CLASSES, SAMPLES))
        low, high = intervals.interval(_predictions(labels, rank), metric)
        yield low, 100 * true, high


def _pair(metric: str, accuracy: float, draws: int) -> Found:
    hard = accuracy + SPREAD * np.linspace(-1, 1, CLASSES)
    for seed in range(draws):
        random = np.random.default_rng((int(1000 * accuracy), seed))
        labels = random.integers(CLASSES, size=SAMPLES)
        first = random.random(SAMPLES) < hard[labels]
        own = random.random(SAMPLES) < OWN
        second = np.where(own, random.random(SAMPLES) < hard[labels] + BETTER, first)
        a, b = (_predictions(labels, 1 - right) for right in (second, first))
        estimate = paired(a, b, metric)
        yield estimate.low, 100 * OWN * BETTER, estimate.high


def _runs(accuracy: float, draws: int) -> Found:
    """Trainings whose accuracies differ by half a point."""
    for seed in range(draws):
        values = 100 * accuracy + 0.5 * np.random.default_rng(
            (int(1000 * accuracy), seed)
        ).standard_normal(RUNS)
        low, high = intervals.over_runs(values.tolist())
        yield low, 100 * accuracy, high


def _scored(metric: str, accuracy: float, draws: int) -> Found:
    sets = (_scores(accuracy, draws + number) for number in range(MANY))
    true = float(np.mean([one.metrics()[metric] for one in sets]))
    with mock.patch.object(intervals, "DRAWS", 200):
        for seed in range(draws):
            low, high = intervals.interval(_scores(accuracy, seed), metric)
            yield low, true, high


def _scores(accuracy: float, seed: int) -> Scored:
    return _noisy(_distance(accuracy), seed, SAMPLES)


@cache
def _distance(accuracy: float) -> float:
    """How far the score of the true class stands out, for an accuracy of the highest score."""
    low, high = 0.0, 8.0
    for _ in range(20):
        middle = (low + high) / 2
        estimate = _noisy(middle, 0, 20_000)
        right = estimate.scores.argmax(1) == estimate.labels.argmax(1)
        low, high = (middle, high) if float(right.double().mean()) < accuracy else (low, middle)

    return low


def _noisy(distance: float, seed: int, samples: int) -> Scored:
    random = torch.Generator().manual_seed(seed)
    labels = torch.eye(CLASSES, dtype=torch.int8)[
        torch.randint(CLASSES, (samples,), generator=random)
    ]
    signal = distance * torch.linspace(0.8, 1.2, CLASSES)
    scores = torch.randn(samples, CLASSES, generator=random) + signal * labels
    return Scored(torch.arange(samples), labels, scores)


def _predictions(labels: np.ndarray, rank: np.ndarray) -> Ranked:
    truth, places = torch.from_numpy(labels), torch.from_numpy(rank.astype(np.int64))
    predicted = torch.where(places == 0, truth, (truth + 1) % CLASSES)
    return Ranked(torch.arange(len(truth)), truth, places, predicted, CLASSES)


SETTINGS: dict[str, Callable[[float, int], Found]] = {
    "top1": partial(_ranked, "top1"),
    "top5": partial(_ranked, "top5"),
    "per_class": partial(_ranked, "per_class"),
    "difference of top1": partial(_pair, "top1"),
    "difference of per_class": partial(_pair, "per_class"),
    "mean of five runs": _runs,
    "map": partial(_scored, "map"),
    "map11": partial(_scored, "map11"),
}
QUICK = ("top1", "top5", "difference of top1", "mean of five runs")
# These take a minute each.
SLOW = ("difference of per_class", "map", "map11")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING")

    print(f"| accuracy | draws | {' | '.join(f'{a:g}' for a in ACCURACIES)} | 93 to 97 % |")
    print(f"|---|---|{'---|' * len(ACCURACIES)}---|")
    for setting in parser.parse_args().settings:
        draws = 10 * DRAWS if setting in QUICK else DRAWS
        chosen = ACCURACIES[::3] if setting in SLOW else ACCURACIES
        shares = {a: coverage(setting, a, draws) for a in chosen}
        cells = [f"{100 * shares[a]:.1f}" if a in shares else "" for a in ACCURACIES]
        met = "yes" if all(LOW <= share <= HIGH for share in shares.values()) else "MISSED"
        print(f"| {setting} | {draws:,} | {' | '.join(cells)} | {met} |", flush=True)


if __name__ == "__main__":
    main()
