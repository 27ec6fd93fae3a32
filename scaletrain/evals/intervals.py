"""Confidence intervals of scores, computed from the predictions of each test sample.

All are Wilson's intervals. Those of other metrics than accuracies take the number of samples with
which an accuracy of this height would have the standard error that a bootstrap over test samples
finds (the effective sample size of Korn & Graubard, 1998). They say how much a score would differ
on another test set of this size, drawn alike, with the same encoder. How much it differs between
trainings is another question: over_runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, stdev

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scaletrain.evals.predictions import Drawn, Prediction, Scored
from scaletrain.evals.scores import average_precision

# Bootstrap samples of class means; half as many of average precisions, which take longer.
DRAWS = 1000
# Scores in all of these, from which on fewer are drawn: about a minute.
_WORK = 1 << 31
# Counts of test samples at once: 2 MB, which stay in the cache of a core.
_ELEMENTS = 1 << 18

# A standard error below this is none.
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]


def interval(
    prediction: Prediction, metric: str, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds in per cent of a metric of a prediction: top1, top5, per_class, map or map11."""
    share = prediction.metrics()[metric] / 100
    error = 0.0

    if isinstance(prediction, Drawn):
        samples = float(len(prediction.labels))
        right = (prediction.rank < (5 if metric == "top5" else 1)).long()
        _, error, freedom = over_draws(right, prediction.labels, metric)
        # Wilson's interval has the normal distribution's quantile
        half = (1 + level) / 2
        error *= student(half, freedom) / NormalDist().inv_cdf(half)
    elif isinstance(prediction, Scored):
        samples = float((prediction.labels == 1).sum())
        error = float(np.nanstd(bootstrap_precisions(prediction, seed)[metric], ddof=1))
    elif metric == "per_class":
        sizes = torch.bincount(prediction.labels).double()
        # those of which all classes together would have the variance of these
        samples = float((sizes > 0).sum() ** 2 / (1 / sizes[sizes > 0]).sum())
        right = (prediction.rank == 0).long()
        error = float(bootstrap_class_mean(right, prediction.labels, seed).std(ddof=1))
    else:
        samples = len(prediction.rank)

    # A bootstrap only repeats a score whose classes are all right or all wrong, and tells nothing
    # of how certain it is. What is left of the error then is rounding.
    if error > _ROUNDING:
        samples = share * (1 - share) / error**2

    low, high = wilson(share, samples, level)
    return 100 * low, 100 * high


def wilson(share: float, samples: float, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share of independent samples (Wilson, 1927): near its nominal coverage from few
    samples on, and never empty or outside 0 .. 1.
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    weight = samples + z**2
    middle = (samples * share + z**2 / 2) / weight
    half = z / weight * math.sqrt(samples * share * (1 - share) + z**2 / 4)
    # rounding must not exclude the share itself
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def over_runs(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over trainings that differ by their seed (Student's t), in the unit of
    the values. Unbounded for a single one.
    """
    if len(values) < 2:
        return -math.inf, math.inf

    mean, freedom = fmean(values), len(values) - 1
    half = student((1 + level) / 2, freedom) * stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def over_draws(values: Tensor, labels: Tensor, metric: str) -> tuple[float, float, int]:
    """Mean over R draws and Q samples of `values` [R, Q], or over classes of their means where the
    metric is per_class; its standard error; and the degrees of freedom of that.

    The error is that of other draws and of other test samples: both variances are added, with
    Welch's degrees of freedom. That of a single draw knows the test samples only.
    """
    group = labels if metric == "per_class" else torch.zeros_like(labels)
    sizes = torch.bincount(group).double()
    weight = 1 / (int((sizes > 0).sum()) * sizes[group])  # [Q]

    draws, samples = values.shape
    by_draw, by_sample = values.double() @ weight, values.double().mean(0)
    means = torch.zeros_like(sizes).index_add(0, group, by_sample) / sizes.clamp(min=1)
    correction = sizes / (sizes - 1).clamp(min=1)
    spread = correction[group] * (by_sample - means[group]).square()

    of_samples = float((weight.square() * spread).sum())
    of_draws = float(by_draw.var()) / draws if draws > 1 else 0.0
    total = of_samples + of_draws
    parts = of_samples**2 / max(1, samples - 1) + of_draws**2 / max(1, draws - 1)
    # more make no difference
    freedom = max(1, min(1000, int(total**2 / parts))) if parts else 1000

    return float(by_draw.mean()), math.sqrt(total), freedom


def student(probability: float, freedom: int) -> float:
    """The quantile, for a probability of one half or more, of Student's t with whole degrees of
    freedom.
    """
    low, high = 0.0, 1.0
    while student_probability(high, freedom) < probability:
        high *= 2

    for _ in range(100):
        middle = (low + high) / 2
        if student_probability(middle, freedom) < probability:
            low = middle
        else:
            high = middle

    return (low + high) / 2


def student_probability(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0 and whole degrees of freedom (Abramowitz & Stegun, 26.7.3 and
    26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    square = math.cos(angle) ** 2
    odd = freedom % 2
    # powers of the cosine up to freedom - 2, each with the product of its odd over even factors
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= square * (power + 1) / (power + 2)

    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + within) / 2


def bootstrap_class_mean(values: Tensor, labels: Tensor, seed: int) -> Floats:
    """Bootstrap results [B] of the mean over classes of the mean of `values` [Q], each -1, 0 or 1.

    Classes are drawn one by one, n - 1 of the n samples of each, which gives the variance that n
    samples have (Rao & Wu, 1988): n would make intervals of many small classes, as in Birdsnap, too
    short. Classes of a single sample, which has no variance, are drawn from all of these.
    """
    sizes = torch.bincount(labels)
    # how often each class has each value
    table = torch.bincount(3 * labels + values + 1, minlength=3 * len(sizes)).view(-1, 3)
    several, single = (table[part].numpy() for part in (sizes > 1, sizes == 1))
    random, total = np.random.default_rng(seed), np.zeros(DRAWS)

    for counts in several:
        drawn = counts.sum() - 1
        draws_of_class = random.multinomial(drawn, counts / counts.sum(), DRAWS)  # [B, 3]
        total += (draws_of_class[:, 2] - draws_of_class[:, 0]) / drawn

    if len(single):
        draws_of_class = random.multinomial(len(single), single.mean(0), DRAWS)
        total += draws_of_class[:, 2] - draws_of_class[:, 0]

    return total / (len(several) + len(single))


@lru_cache(8)
def bootstrap_precisions(prediction: Scored, seed: int) -> dict[str, Floats]:
    """Bootstrap results of `map` and `map11`, each [B], whose standard deviation is the standard
    error; not a number where the drawn samples show no class.

    Half of the samples are drawn, without replacement, which gives the variance of all of them
    (Shao & Wu, 1989) also for what is no smooth function of the samples: a sample that is drawn
    twice would raise the peaks of precision. Predictions for the same samples have the same draws,
    so that their results can be subtracted.
    """
    samples, classes = prediction.scores.shape
    drawn = (samples + 1) // 2
    # of an odd number, a little more than half
    scale = math.sqrt(drawn / max(1, samples - drawn))
    draws = max(100, min(DRAWS // 2, _WORK // (samples * classes)))
    random = np.random.default_rng(seed)
    rows = max(1, _ELEMENTS // samples)
    parts = []

    for start in range(0, draws, rows):
        ordered = np.tile(np.arange(samples) < drawn, (min(rows, draws - start), 1))
        counts = torch.from_numpy(random.permuted(ordered, axis=1).astype(np.int64))
        parts.append(average_precision(prediction.scores, prediction.labels, counts))

    return {name: scale * torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
