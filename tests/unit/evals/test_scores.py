"""Ranks and accuracies on cases counted by hand."""

from __future__ import annotations

import pytest
import torch

from scaletrain.evals.scores import accuracy, ranks


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
