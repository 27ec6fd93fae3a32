"""Paired tests against scipy, by hand, and on encoders that are known to be alike or not."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from scaletrain.evals import paired as pairs
from scaletrain.evals.errors import EvalError
from scaletrain.evals.paired import mcnemar, paired, permutation
from scaletrain.evals.predictions import Ranked, Scored


def ranked(right: Tensor, labels: Tensor, classes: int) -> Ranked:
    rank = 1 - right.long()
    predicted = torch.where(right, labels, (labels + 1) % classes)
    return Ranked(torch.arange(len(labels)), labels, rank, predicted, classes)


def two(samples: int = 2000, better: float = 0.0, seed: int = 0) -> tuple[Ranked, Ranked]:
    """Predictions of 10 classes that are right for the same 60 % and differ in the others."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 10
    same = torch.rand(samples, generator=random) < 0.6
    parts = [same | (torch.rand(samples, generator=random) < p) for p in (0.3 + better, 0.3)]
    first, second = (ranked(part, labels, 10) for part in parts)
    return first, second


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (1, 0), (3, 3), (5, 12), (0, 6), (300, 360), (9000, 9500)]
)
def test_mcnemar_is_the_exact_binomial_test(a: int, b: int) -> None:
    expected = stats.binomtest(a, a + b).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(b, a) == mcnemar(a, b)


def test_a_permutation_counts_all_swaps() -> None:
    """Seven samples in classes of two sizes, against the 128 swaps one by one."""
    gain = torch.tensor([1, 1, -1, 1, 0, 1, 1])
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    weight = torch.tensor([1 / 4] * 4 + [1 / 3] * 3)
    observed = float((gain * weight).sum().abs())
    sums = [abs(float((gain * weight * torch.tensor(s)).sum())) for s in product((-1, 1), repeat=7)]
    exact = np.mean([total >= observed - 1e-6 for total in sums])
    assert permutation(gain, labels) == pytest.approx(exact, abs=0.006)


def test_with_classes_of_one_size_the_permutation_is_mcnemars_test() -> None:
    a, b = two(better=0.05)
    actual = paired(a, b, "per_class"), paired(a, b, "top1")
    assert actual[0].p == actual[1].p
    assert actual[0].difference == pytest.approx(actual[1].difference)
    assert actual[0].error == pytest.approx(actual[1].error)
    assert (actual[0].low, actual[0].high) == pytest.approx(
        (actual[1].low, actual[1].high), abs=0.2
    )


def test_what_is_alike_is_not_told_apart_and_what_differs_is() -> None:
    """Among 200 pairs that are alike, about 5 % differ at the 5 % level; their scores are not
    independent, so the test resolves less than two intervals do.
    """
    alike = [paired(*two(seed=seed), "top1") for seed in range(200)]
    assert 2 <= sum(one.p < 0.05 for one in alike) <= 20
    assert 180 <= sum(one.low <= 0 <= one.high for one in alike) <= 198
    better = paired(*two(better=0.2), "top1")
    assert better.p < 1e-4
    assert better.low > 0
    assert better.test == "McNemar, exact"
    assert (better.a - better.b, better.samples) == (better.difference, 2000)
    other_way = paired(*reversed(two(better=0.2)), "top1")
    assert (other_way.p, other_way.difference) == (better.p, -better.difference)
    assert (other_way.low, other_way.high) == pytest.approx((-better.high, -better.low))


def test_the_difference_that_can_be_resolved_is_found_in_four_of_five() -> None:
    """Pairs that truly differ by it, of 500 samples."""
    resolvable = paired(*two(500), "top1").resolvable
    # 40 % of the samples may differ
    actual = [paired(*two(500, resolvable / 40, seed), "top1").p < 0.05 for seed in range(300)]
    assert 0.7 <= np.mean(actual) <= 0.9


def test_few_samples_resolve_nothing_smaller_than_six_of_them() -> None:
    a, _ = two(100)
    same = paired(a, a, "top1")
    assert (same.difference, same.p, same.resolvable) == (0.0, 1.0, 6.0)
    assert same.low < 0 < same.high


def scored(seed: int, quality: float, samples: int = 300) -> Scored:
    random = torch.Generator().manual_seed(7)
    labels = (torch.rand(samples, 4, generator=random) < 0.3).to(torch.int8)
    noise = torch.randn(samples, 4, generator=random.manual_seed(seed))
    return Scored(torch.arange(samples), labels, noise + quality * labels)


def test_average_precisions_are_compared_by_a_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs.intervals, "DRAWS", 500)
    for metric in ("map", "map11"):
        alike, better = (paired(scored(1, q), scored(2, 1.0), metric) for q in (1.0, 2.0))
        assert alike.low < 0 < alike.high
        assert alike.p > 0.05
        assert better.low > 0
        assert better.p < 1e-3
        assert better.test == "bootstrap of half the samples, 250 times"
    same = paired(scored(1, 1.0), scored(1, 1.0), "map")
    assert (same.difference, same.p, same.resolvable) == (0.0, 1.0, 0.0)


def test_other_samples_are_refused() -> None:
    a, b = two(20)
    for other, reason in (
        (replace(b, index=b.index + 1), "20 and 20, with 19 in common"),
        (replace(b, labels=b.labels.flip(0)), "other labels"),
        (scored(0, 1.0, 20), "scores of all classes"),
    ):
        with pytest.raises(EvalError, match=reason):
            paired(a, other, "top1")
