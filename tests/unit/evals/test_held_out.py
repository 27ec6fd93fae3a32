"""Held-out images where a dataset says how many."""

from __future__ import annotations

import pytest
import torch

from scaletrain.evals.errors import EvalError
from scaletrain.evals.held_out import held_out


def test_a_number_of_images() -> None:
    out = held_out(60, count=20)
    assert len(out) == 20
    assert set(held_out(60).tolist()) < set(out.tolist())  # the same order, and six of it
    with pytest.raises(EvalError, match=r"60 training image\(s\) cannot be split .* part of 60"):
        held_out(60, count=60)


def test_a_number_that_the_classes_do_not_have_is_refused() -> None:
    """Of 12 images in 6 classes one of each stays in the training."""
    labels = torch.arange(12) % 6
    assert len(held_out(12, labels, count=6)) == 6
    with pytest.raises(EvalError, match=r"7 of 12 training images of 6 classes"):
        held_out(12, labels, count=7)


def test_a_number_of_each_class() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0, 1] * 3 + [3] * 2)
    out = held_out(len(labels), labels, per_class=2)
    assert labels[out].bincount().tolist() == [2, 2, 2, 1]  # and one of the last for the training
    assert out.equal(out.unique())
    more = held_out(len(labels), labels, per_class=3)
    assert set(out.tolist()) < set(more.tolist())
    assert len(more) == 10


def test_the_usual_list_is_stable_and_small() -> None:
    out = held_out(5000)
    assert len(out) == 500
    assert out.unique().equal(out)
    assert out.equal(held_out(5000))
    assert out[:5].tolist() == [5, 9, 10, 13, 16]  # changing these changes every published figure
    assert len(held_out(1_281_167)) == 10_009
    assert len(held_out(3)) == 1
    with pytest.raises(EvalError, match="1 training image"):
        held_out(1)
