"""Ranks and accuracies on cases counted by hand."""

from __future__ import annotations

import pytest
import torch

from scaletrain.evals.scores import accuracy, average_precision, ranks


def test_ranks_by_hand() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 5.0, 5.0], [0.0, 5.0, 5.0]])
    assert ranks(scores, torch.tensor([2, 0, 2, 0])).tolist() == [1, 0, 1, 2]


def test_a_tie_is_not_right() -> None:
    """Whatever the number of the true class: else a constant score would be right for the class of
    the lowest one.
    """
    scores = torch.ones(3, 3)
    assert ranks(scores, torch.arange(3)).tolist() == [2, 2, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_wrong(bad: float) -> None:
    scores = torch.tensor([[bad, 0.0, 1.0]])
    assert [int(ranks(scores, torch.tensor([label]))) for label in range(3)] == [3, 3, 3]


def test_accuracy_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1, 4, 4])
    rank = torch.tensor([0, 0, 4, 5, 0, 1])
    got = accuracy(rank, labels, 6)
    assert got["top1"] == pytest.approx(50.0)
    assert got["top5"] == pytest.approx(500 / 6)
    assert got["per_class"] == pytest.approx(
        100 * (2 / 3 + 0 + 1 / 2) / 3
    )  # classes 2, 3 and 5 do not occur


def test_average_precisions_by_hand() -> None:
    """Precisions 1, 1/2, 2/3, 3/5 at the places of the samples: the second one rises to 2/3."""
    scores = torch.tensor([5.0, 4, 3, 2, 1]).unsqueeze(1)
    labels = torch.tensor([1, 0, 1, 0, 1]).unsqueeze(1)
    got = average_precision(scores, labels)
    assert float(got["map"]) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # recalls 0 to 0.3, 0.4 to 0.6, 0.7 to 1
    assert float(got["map11"]) == pytest.approx((4 * 1 + 3 * 2 / 3 + 4 * 3 / 5) / 11)


def test_the_average_precision_is_that_of_vissl() -> None:
    """With ties, a sample that does not count, and a class without positives, in any order."""
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 4, generator=random).round(decimals=1)
    labels = torch.randint(-1, 2, (200, 4), generator=random).clamp(max=1)
    labels[:, 3] = labels[:, 3].clamp(max=0)
    expected = []
    for score, truth in zip(scores.T[:3], labels.T[:3], strict=True):
        steps = sorted(set(score[truth >= 0].tolist()), reverse=True)
        placed = [(score >= step) & (truth >= 0) for step in steps]
        right = [int(truth[at].sum()) for at in placed]
        precision = [r / int(at.sum()) for r, at in zip(right, placed, strict=True)]
        rises = zip([0, *right], right, strict=False)
        area = sum((b - a) * max(precision[n:]) for n, (a, b) in enumerate(rises))
        expected.append(area / right[-1])
    got = average_precision(scores, labels)
    assert float(got["map"]) == pytest.approx(sum(expected) / 3)
    order = torch.randperm(200, generator=random)
    again = average_precision(scores[order], labels[order])
    assert all(float(again[name]) == pytest.approx(float(value)) for name, value in got.items())


def test_counts_are_repeated_samples() -> None:
    random = torch.Generator().manual_seed(1)
    scores = torch.randn(30, 2, generator=random).round(decimals=1)
    labels = (torch.rand(30, 2, generator=random) < 0.4).long()
    drawn = torch.randint(30, (3, 30), generator=random)
    counts = torch.stack([row.bincount(minlength=30) for row in drawn])
    got = average_precision(scores, labels, counts)
    for n, row in enumerate(drawn):
        for name, value in average_precision(scores[row], labels[row]).items():
            assert float(got[name][n]) == pytest.approx(float(value))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_never_helps(bad: float) -> None:
    labels = torch.tensor([[1], [0], [1], [0]])
    for place in range(4):
        scores = torch.tensor([[4.0], [1.0], [3.0], [2.0]])
        scores[place] = bad
        assert float(average_precision(scores, labels)["map"]) < 1
