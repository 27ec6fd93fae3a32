"""Intervals against scipy, by hand, and by how often they contain the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.intervals import coverage
from scaletrain.evals import intervals
from scaletrain.evals.predictions import Ranked, Scored


def ranked(right: list[int], labels: list[int], classes: int = 2) -> Ranked:
    truth, rank = torch.tensor(labels), 1 - torch.tensor(right)
    predicted = torch.where(rank == 0, truth, (truth + 1) % classes)
    return Ranked(torch.arange(len(labels)), truth, rank, predicted, classes)


@pytest.mark.parametrize("right", [0, 1, 5, 19, 20])
def test_wilson_is_scipys(right: int) -> None:
    expected = stats.binomtest(right, 20).proportion_ci(method="wilson")
    assert intervals.wilson(right / 20, 20) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 200])
def test_student_is_scipys(freedom: int) -> None:
    for t in (0.0, 0.3, 2.0, 40.0):
        expected = stats.t.cdf(t, freedom)
        assert intervals.student_probability(t, freedom) == pytest.approx(expected, abs=1e-12)
    for p in (0.5, 0.9, 0.975, 0.9995):
        assert intervals.student(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), abs=1e-9)


def test_over_runs_is_scipys() -> None:
    values = [71.2, 70.4, 71.9]
    expected = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert intervals.over_runs(values) == pytest.approx(expected)
    assert intervals.over_runs([71.2]) == (-math.inf, math.inf)


def test_an_interval_contains_its_score_and_is_the_same_each_time() -> None:
    labels = [i % 7 for i in range(90)]
    prediction = ranked([int(i % 3 > 0) for i in range(90)], labels, 7)
    for metric, value in prediction.metrics().items():
        low, high = intervals.interval(prediction, metric)
        assert 0 <= low < value <= high <= 100
        assert intervals.interval(prediction, metric) == (low, high)
        wide = intervals.interval(prediction, metric, level=0.99)
        assert wide[0] < low
        assert high <= wide[1]


def test_a_perfect_score_does_not_look_certain() -> None:
    """A bootstrap repeats it, and a mean over small classes is known less well."""
    all_right = ranked([1] * 60, [i // 30 for i in range(60)])
    assert intervals.interval(all_right, "per_class") == intervals.interval(all_right, "top1")
    uneven = ranked([1] * 60, [int(i < 3) for i in range(60)])
    assert (
        intervals.interval(uneven, "per_class")[0] < 80 < 93 < intervals.interval(uneven, "top1")[0]
    )
    labels = torch.eye(10, dtype=torch.int8)
    scores = Scored(torch.arange(10), labels, labels.float())
    assert intervals.interval(scores, "map") == pytest.approx(
        (100 * 10 / (10 + 1.96**2), 100), abs=0.01
    )


def test_draws_without_a_class_are_left_out() -> None:
    labels = torch.zeros(8, 1, dtype=torch.int8)
    labels[2] = 1
    scores = Scored(torch.arange(8), labels, torch.arange(8.0).unsqueeze(1))
    draws = intervals.bootstrap_precisions(scores, seed=0)["map"]
    assert 0.4 < np.isnan(draws).mean() < 0.6
    low, high = intervals.interval(scores, "map")
    assert 0 <= low < scores.metrics()["map"] < high <= 100


def test_a_collapsed_encoder_does_not_look_certain() -> None:
    """It predicts one of three classes for all: a bootstrap of the classes never differs."""
    labels = [n % 3 for n in range(30)]
    low, high = intervals.interval(ranked([int(n == 0) for n in labels], labels, 3), "per_class")
    assert low < 100 / 3 - 5
    assert high > 100 / 3 + 5


@pytest.mark.parametrize("samples", [7, 40])
def test_the_error_of_an_average_precision_is_that_of_a_share(samples: int) -> None:
    """With constant scores it is the share of positive samples, also of an odd number of them."""
    labels = (torch.arange(samples) % 3 == 0).to(torch.int8).unsqueeze(1)
    constant = Scored(torch.arange(samples), labels, torch.zeros(samples, 1))
    share = float(labels.double().mean())
    assert constant.metrics()["map"] == pytest.approx(100 * share)
    expected = math.sqrt(share * (1 - share) / (samples - 1))
    draws = intervals.bootstrap_precisions(constant, seed=0)["map"]
    assert draws.std(ddof=1) == pytest.approx(expected, rel=0.1)


def test_small_classes_do_not_shorten_the_interval() -> None:
    """The variance of many classes of two samples each, and of classes of a single one."""
    random = np.random.default_rng(0)
    for size in (1, 2):
        labels = np.repeat(np.arange(300), size)
        right = torch.from_numpy(random.random(len(labels)) < 0.7).long()
        draws = intervals.bootstrap_class_mean(right, torch.from_numpy(labels), seed=0)
        assert draws.mean() == pytest.approx(float(right.double().mean()), abs=0.003)
        assert draws.std() == pytest.approx(math.sqrt(0.21 / len(labels)), rel=0.1)


@pytest.mark.parametrize(
    "setting", ["top1", "per_class", "difference of top1", "mean of five runs"]
)
def test_coverage(setting: str) -> None:
    """A slice of benchmarks/intervals.py; three standard errors around 95 %."""
    assert abs(coverage(setting, 0.6, 200) - 0.95) < 3 * math.sqrt(0.05 * 0.95 / 200)
