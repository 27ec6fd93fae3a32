"""Few-shot heads against scikit-learn, and the draws of their images."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from scaletrain.evals.errors import EvalError
from scaletrain.evals.heads.fewshot import draw, nearest_mean, ridge

CLASSES = 4


def problem(samples: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(samples) % CLASSES
    centres = torch.randn(CLASSES, width, generator=random)
    return centres[labels] + 2 * torch.randn(samples, width, generator=random) + 5, labels


def test_nearest_mean_is_scikit_learns_nearest_centroid() -> None:
    x, labels = problem(200, 6)
    theirs = NearestCentroid().fit(x[:100].numpy(), labels[:100].numpy()).predict(x[100:].numpy())
    ours = nearest_mean(x[:100], labels[:100], CLASSES).scores(x[100:]).argmax(1)
    assert ours.tolist() == theirs.tolist()
    assert (ours == labels[100:]).double().mean() < 1  # else any classifier would do


@pytest.mark.parametrize("width", [6, 60])  # fewer and more features than the 40 samples
@pytest.mark.parametrize("strength", [0.1, 1024.0])
def test_ridge_is_scikit_learns(width: int, strength: float) -> None:
    x, labels = problem(40, width)
    z = (x.double() - x.double().mean(0)) / (x.double().std(0, correction=0) + 1e-5)
    targets = 2 * torch.nn.functional.one_hot(labels, CLASSES).double() - 1
    theirs = Ridge(alpha=strength, solver="svd").fit(z.numpy(), targets.numpy())
    ours = ridge(x, labels, CLASSES, strength).scores(x)
    torch.testing.assert_close(
        ours.double(), torch.from_numpy(theirs.predict(z.numpy())), rtol=0, atol=1e-4
    )


def test_draws_have_every_class_and_do_not_depend_on_order_or_numbers() -> None:
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % CLASSES
    index = torch.arange(100, 160)
    rows = draw(labels, index, CLASSES, 3, seed=0, number=0)
    assert labels[rows].bincount().tolist() == [3] * CLASSES
    assert rows.diff().min() > 0

    fewer = draw(labels, index, CLASSES, 2, seed=0, number=0)
    assert set(fewer.tolist()) < set(rows.tolist())
    others = [draw(labels, index, CLASSES, 3, seed, n) for seed, n in ((0, 1), (1, 0))]
    assert not any(other.equal(rows) for other in others)

    assert draw((labels + 1) % CLASSES, index, CLASSES, 3, 0, 0).equal(rows)
    order = torch.randperm(60, generator=random)
    shuffled = draw(labels[order], index[order], CLASSES, 3, 0, 0)
    assert index[order][shuffled].sort().values.equal(index[rows])


def test_too_few_images_of_a_class_are_refused() -> None:
    with pytest.raises(EvalError, match=r"class 2 has 1 training images, fewer than 2 shots"):
        draw(torch.tensor([0, 0, 1, 1, 2]), torch.arange(5), 3, 2, seed=0, number=0)
