"""Means over draws of training images: in a file, with an interval, and compared in pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from scaletrain.evals.errors import EvalError
from scaletrain.evals.intervals import interval, over_draws
from scaletrain.evals.paired import paired
from scaletrain.evals.predictions import Drawn, Ranked, pack, unpack

CLASSES = 10


def drawn(right: Tensor) -> Drawn:
    """Predictions that are right where `right` [R, Q] says so."""
    samples = right.shape[1]
    labels = torch.arange(samples) % CLASSES
    predicted = torch.where(right, labels, (labels + 1) % CLASSES)
    return Drawn(torch.arange(samples), labels, (~right).long(), predicted, CLASSES)


def simulated(draws: int, samples: int, random: torch.Generator, mean: float = 0.6) -> Tensor:
    """Outcomes with an effect of the draw and one of the sample."""
    effects = 0.05 * torch.randn(draws, 1, generator=random)
    easy = 0.3 * torch.rand(1, samples, generator=random) - 0.15
    return torch.rand(draws, samples, generator=random) < mean + effects + easy


def test_all_comes_back(tmp_path: Path) -> None:
    one = drawn(simulated(3, 50, torch.Generator().manual_seed(0)))
    np.savez_compressed(tmp_path / "p.npz", **pack({"a": one}))
    actual = unpack(tmp_path / "p.npz")["a"]
    assert isinstance(actual, Drawn)
    assert actual.rank.equal(one.rank)
    assert actual.predicted.equal(one.predicted)
    assert actual.metrics() == one.metrics()

    fewer = replace(one, predicted=one.predicted[:2])
    with pytest.raises(EvalError, match=r"predicted are \[2, 50\], not \[3, 50\]"):
        pack({"a": fewer})
    with pytest.raises(EvalError, match="no draws"):
        pack({"a": replace(one, rank=one.rank[:0], predicted=one.predicted[:0])})


@pytest.mark.parametrize("metric", ["top1", "per_class"])
def test_the_error_by_hand(metric: str) -> None:
    right = simulated(4, 60, torch.Generator().manual_seed(0))
    labels = drawn(right).labels
    mean, error, _ = over_draws(right, labels, metric)
    by_draw, by_sample = right.double().mean(1), right.double().mean(0)
    of_draws = by_draw.var() / 4
    # classes have one size, so that all weights are equal
    of_samples = (
        by_sample.var() / 60
        if metric == "top1"
        else sum(by_sample[labels == c].var() / 6 for c in range(CLASSES)) / CLASSES**2
    )
    assert mean == pytest.approx(float(right.double().mean()))
    assert error == pytest.approx(float(of_draws + of_samples) ** 0.5)


def test_the_interval_covers_the_mean_over_all_draws_and_samples() -> None:
    random, inside = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        low, high = interval(drawn(simulated(5, 300, random)), "top1")
        inside += low <= 60 <= high

    # 95 % and three standard deviations around it, or a little more: both errors are added
    assert 180 <= inside <= 199


def test_one_draw_has_the_interval_of_its_samples() -> None:
    right = simulated(1, 400, torch.Generator().manual_seed(0))
    one = drawn(right)
    plain = Ranked(one.index, one.labels, one.rank[0], one.predicted[0], CLASSES)
    assert one.metrics() == plain.metrics()
    assert interval(one, "top1") == pytest.approx(interval(plain, "top1"), abs=0.1)
    assert interval(drawn(torch.ones(3, 50, dtype=torch.bool)), "top1")[0] < 95


def test_pairs_share_draws_and_samples() -> None:
    """The difference is far smaller than what varies between draws, and is found."""
    random = torch.Generator().manual_seed(0)
    right = simulated(5, 2000, random)
    better = right | (torch.rand(right.shape, generator=random) < 0.05)
    actual = paired(drawn(better), drawn(right), "top1")
    assert actual.p < 1e-3
    assert actual.low < actual.difference < actual.high
    assert actual.low > 0
    assert interval(drawn(right), "top1")[1] > actual.a  # unlike from the interval of one

    same = paired(drawn(right), drawn(right), "top1")
    assert (same.p, same.difference) == (1.0, 0.0)
    with pytest.raises(EvalError, match="one has 5 draws of training images and the other 4"):
        paired(drawn(right), drawn(right[:4]), "top1")
