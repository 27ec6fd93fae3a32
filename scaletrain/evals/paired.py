"""Comparison of two encoders on the same test samples.

The samples that both get right or both get wrong say nothing about which is better. A test that
leaves them out resolves far smaller differences than the intervals of two scores show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from scaletrain.evals import intervals
from scaletrain.evals.errors import EvalError
from scaletrain.evals.predictions import Drawn, Prediction, Ranked, Scored

# Of the permutation test, as in Kornblith et al. (2019) and BYOL.
RESAMPLES = 100_000
# Quantiles of the normal distribution: for 95 % intervals and the 5 % level, and for differences
# that are found with a probability of 80 %.
_NORMAL, _POWER = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
# So many samples, all in favour of one encoder, are significant: 2 * 0.5 ** 6 < 5 %.
_FEWEST = 6


@dataclass(frozen=True)
class Paired:
    """The difference of a metric between two encoders, in per cent."""

    metric: str
    samples: int
    a: float
    b: float
    # a - b, with its 95 % interval
    difference: float
    low: float
    high: float
    # probability of a difference as large or larger between encoders that are equally good
    p: float
    test: str
    # standard error of the difference if there is none
    error: float
    # the smallest difference that this test set can resolve: encoders that disagree as often as
    # these and differ by so much are told apart in 80 % of test sets, at the 5 % level
    resolvable: float


def paired(a: Prediction, b: Prediction, metric: str, seed: int = 0) -> Paired:
    """Compare a metric of two predictions for the same samples: accuracies by McNemar's exact test,
    the mean over classes by a permutation test, average precisions by a bootstrap, and means over
    draws of training images by a t test.

    Raises EvalError where they are not of the same samples with the same labels, or not of as many
    draws.
    """
    _check(a, b)
    scores = a.metrics()[metric], b.metrics()[metric]

    depth = 5 if metric == "top5" else 1
    if isinstance(a, Drawn) and isinstance(b, Drawn):
        gain = (a.rank < depth).long() - (b.rank < depth).long()  # [R, Q]: -1, 0, 1
        estimate, fewest = _draws(gain, a.labels, metric), 0.0
    elif isinstance(a, Ranked) and isinstance(b, Ranked):
        gain = (a.rank < depth).long() - (b.rank < depth).long()  # [Q]: -1, 0, 1
        compared = _class_means if metric == "per_class" else _accuracies
        estimate = compared(gain, a.labels, seed)
        fewest = 100 * _FEWEST / len(gain)
    else:
        assert isinstance(a, Scored), "checked above"
        assert isinstance(b, Scored), "checked above"
        estimate, fewest = _precisions(a, b, metric, seed), 0.0

    low, high, p, test, error = estimate
    return Paired(
        metric=metric,
        samples=len(a.index),
        a=scores[0],
        b=scores[1],
        difference=scores[0] - scores[1],
        low=100 * low,
        high=100 * high,
        p=p,
        test=test,
        error=100 * error,
        resolvable=max(fewest, 100 * (_NORMAL + _POWER) * error),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """p of McNemar's exact two-sided test, from the numbers of samples that only one of two gets
    right: a binomial test with probability one half.
    """
    samples = only_a + only_b
    places = torch.arange(min(only_a, only_b) + 1, dtype=torch.float64)
    whole = torch.tensor(float(samples), dtype=torch.float64)
    ways = (whole + 1).lgamma() - (places + 1).lgamma() - (whole - places + 1).lgamma()
    return min(1.0, 2 * float((ways - samples * math.log(2)).exp().sum()))


def permutation(gain: Tensor, labels: Tensor, seed: int = 0, resamples: int = RESAMPLES) -> float:
    """p of the two-sided permutation test that swaps the two predictions for each sample at random,
    for the difference of the means over classes of `gain` [Q], which is -1, 0 or 1.

    Samples of classes of one size weigh alike, and so are drawn together: one binomial number.
    """
    sizes = torch.bincount(labels)[labels]
    classes = [
        (int(size), int(part.sum()), int(part.abs().sum()))
        for size in sizes.unique()
        for part in [gain[sizes == size]]
    ]
    if len(classes) == 1:
        ((_, surplus, changed),) = classes
        return mcnemar((changed + surplus) // 2, (changed - surplus) // 2)

    random, total = np.random.default_rng(seed), np.zeros(resamples)
    for size, _, changed in classes:
        total += (2 * random.binomial(changed, 0.5, resamples) - changed) / size

    observed = abs(sum(surplus / size for size, surplus, _ in classes))
    # rounding must not make an equal sum a smaller one
    as_large = int((np.abs(total) >= observed - 1e-9).sum())
    return (1 + as_large) / (1 + resamples)


def holm(ps: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests are significant if an error in any of them is to have a probability of
    at most `level` (Holm, 1979).
    """
    order = sorted(range(len(ps)), key=lambda n: ps[n])
    significant = [False] * len(ps)
    for place, number in enumerate(order):
        if ps[number] > level / (len(ps) - place):
            break
        significant[number] = True

    return significant


# Bounds of the difference, p, name of the test and standard error; shares, not per cent.
_Found = tuple[float, float, float, str, float]


def _accuracies(gain: Tensor, labels: Tensor, seed: int) -> _Found:
    """The interval is Bonett and Price's (2012), which is right for few differing samples too."""
    samples, only_a, only_b = len(gain), int((gain > 0).sum()), int((gain < 0).sum())
    p = mcnemar(only_a, only_b)

    plus, minus = ((count + 1) / (samples + 2) for count in (only_a, only_b))
    deviation = math.sqrt((plus + minus - (plus - minus) ** 2) / (samples + 2))
    half = _NORMAL * deviation
    low, high = max(-1.0, plus - minus - half), min(1.0, plus - minus + half)
    return low, high, p, "McNemar, exact", math.sqrt(only_a + only_b) / samples


def _class_means(gain: Tensor, labels: Tensor, seed: int) -> _Found:
    """The interval is normal, with the bootstrap's standard error."""
    sizes = torch.bincount(labels).double()
    classes = int((sizes > 0).sum())
    difference = float((gain / sizes[labels]).sum()) / classes
    half = _NORMAL * float(intervals.bootstrap_class_mean(gain, labels, seed).std(ddof=1))

    error = float((gain.abs() / sizes[labels] ** 2).sum().sqrt()) / classes
    p = permutation(gain, labels, seed)
    return difference - half, difference + half, p, f"permutation, {RESAMPLES:,} times", error


def _draws(gain: Tensor, labels: Tensor, metric: str) -> _Found:
    """Draws are paired too: both encoders had the same training images."""
    difference, error, freedom = intervals.over_draws(gain, labels, metric)
    half = intervals.student(0.975, freedom) * error
    p = float(difference == 0)
    if error:
        p = 2 * (1 - intervals.student_probability(abs(difference) / error, freedom))

    return difference - half, difference + half, p, f"t test, {len(gain):,} draws", error


def _precisions(a: Scored, b: Scored, metric: str, seed: int) -> _Found:
    """Normal around the difference, with the bootstrap's standard error."""
    first, second = (intervals.bootstrap_precisions(one, seed)[metric] for one in (a, b))
    error = float(np.nanstd(first - second, ddof=1))
    difference = (a.metrics()[metric] - b.metrics()[metric]) / 100
    p = 2 * NormalDist().cdf(-abs(difference) / error) if error else float(difference == 0)

    half = _NORMAL * error
    return (
        difference - half,
        difference + half,
        p,
        f"bootstrap of half the samples, {len(first):,} times",
        error,
    )


def _check(a: Prediction, b: Prediction) -> None:
    if type(a) is not type(b):
        raise EvalError("one has predictions of a class and the other scores of all classes")
    if not torch.equal(a.index, b.index):
        common = int(torch.isin(a.index, b.index).sum())
        raise EvalError(
            f"they are not of the same test samples: {len(a.index):,} and {len(b.index):,}, with "
            f"{common:,} in common"
        )
    if isinstance(a, Drawn) and isinstance(b, Drawn) and len(a.rank) != len(b.rank):
        raise EvalError(
            f"one has {len(a.rank)} draws of training images and the other {len(b.rank)}"
        )
    if not torch.equal(a.labels, b.labels):
        raise EvalError("the test samples have other labels in one than in the other")
