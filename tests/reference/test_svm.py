"""The support vector machines against liblinear, through scikit-learn's LinearSVC."""

from __future__ import annotations

import torch
from sklearn.svm import LinearSVC
from torch import Tensor

from scaletrain.evals.heads.svm import folds, one_hot, path

CLASSES = 3


def problem(samples: int, width: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    centres = torch.randn(CLASSES, width, generator=random, dtype=torch.float64)
    noise = torch.randn(samples, width, generator=random, dtype=torch.float64)
    return centres[labels] + 1.5 * noise + 0.5, labels


def liblinear(x: Tensor, shown: Tensor, cost: float, weight: float) -> Tensor:
    """Weights and bias [D + 1] of one class; liblinear's dual solver, which VISSL uses, ends
    less exactly at the same minimum.
    """
    counts = shown >= 0
    machine = LinearSVC(C=cost, class_weight={1: weight, 0: 1.0}, dual=False, tol=1e-10)
    machine.fit(x[counts].numpy(), shown[counts].numpy())
    return torch.cat((torch.from_numpy(machine.coef_[0]), torch.from_numpy(machine.intercept_)))


def test_same_weights_as_liblinear_for_every_cost() -> None:
    x, labels = problem(120, 8)
    shown = one_hot(labels, CLASSES)
    shown[::7, 1] = -1  # samples that do not count for one class
    costs = (0.01, 1.0, 5.0, 100.0)

    for cost, fit in zip(costs, path(x, shown, costs, 2.0, tolerance=1e-13), strict=True):
        assert fit.converged
        for number in range(CLASSES):
            theirs = liblinear(x, shown[:, number], cost, 2.0)
            ours = torch.cat((fit.head.weight[number], fit.head.bias[number : number + 1]))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_every_class_has_its_own_cost() -> None:
    x, labels = problem(120, 8)
    costs = torch.tensor([0.01, 5.0, 1.0], dtype=torch.float64)
    (together,) = path(x, one_hot(labels, CLASSES), [costs], 2.0, tolerance=1e-13)

    for number, cost in enumerate(costs.tolist()):
        (alone,) = path(x, one_hot(labels, CLASSES), [cost], 2.0, tolerance=1e-13)
        torch.testing.assert_close(together.head.weight[number], alone.head.weight[number])


def test_in_float32_the_minimum_is_the_same() -> None:
    x, labels = problem(120, 8)
    shown, costs = one_hot(labels, CLASSES), (0.01, 1.0, 1000.0)
    exact = path(x, shown, costs, 2.0, tolerance=1e-13)

    for one, other in zip(path(x.float(), shown, costs, 2.0), exact, strict=True):
        assert one.converged
        torch.testing.assert_close(one.value, other.value, rtol=1e-5, atol=0)


def test_folds_have_every_class_in_equal_shares_whatever_its_number() -> None:
    random = torch.Generator().manual_seed(1)
    labels, index = torch.randint(5, (100,), generator=random), torch.arange(50, 150)
    fold = folds(labels, index, 3)
    for number in range(5):
        counts = torch.bincount(fold[labels == number], minlength=3)
        assert counts.max() - counts.min() <= 1

    assert folds((labels + 2) % 5, index, 3).equal(fold)
    order = torch.randperm(100, generator=random)
    assert folds(labels[order], index[order], 3).equal(fold[order])
