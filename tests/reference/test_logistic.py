"""The path of strengths against scikit-learn's LogisticRegression, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from scaletrain.evals.benchmarks.logistic import Config
from scaletrain.evals.heads.classifier import Linear
from scaletrain.evals.heads.lbfgs import path


def problem(samples: int, width: int, classes: int) -> tuple[Tensor, Tensor]:
    """Features far from zero and of very different variance, as a network has them."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (samples,), generator=random)
    centres = torch.randn(classes, width, generator=random, dtype=torch.float64)
    noise = torch.randn(samples, width, generator=random, dtype=torch.float64)
    x = (centres[labels] + 2 * noise) * torch.logspace(1, -1, width) + 3
    return x, labels


def value(x: Tensor, labels: Tensor, head: Linear, strength: float) -> float:
    loss = F.cross_entropy(x @ head.weight.T + head.bias, labels)
    return float(loss + strength / 2 * head.weight.square().sum())


@pytest.mark.parametrize("classes", [2, 5])
def test_same_optimum_as_scikit_learn(classes: int) -> None:
    x, labels = problem(150, 6, classes)
    # with two classes scikit-learn has one vector, the difference of ours
    halves = 2 if classes == 2 else 1
    for fit in path(x, labels, classes, Config(strengths=6, weakest=1e-3).path, tolerance=1e-13):
        assert fit.converged
        assert fit.value == pytest.approx(value(x, labels, fit.head, fit.strength), rel=1e-9)

        cost = halves / (fit.strength * len(x))
        theirs = LogisticRegression(C=cost, tol=1e-10, max_iter=100_000)
        theirs.fit(x.numpy(), labels.numpy())
        weight, bias = torch.from_numpy(theirs.coef_), torch.from_numpy(theirs.intercept_)
        if classes == 2:
            weight, bias = torch.cat((-weight, weight)) / 2, torch.cat((-bias, bias)) / 2

        assert fit.value <= value(x, labels, Linear(weight, bias), fit.strength) + 1e-10
        chance = torch.from_numpy(theirs.predict_proba(x.numpy()))
        torch.testing.assert_close(fit.head.scores(x).softmax(1), chance, rtol=0, atol=1e-4)
        atol = 1e-4 * float(weight.abs().max())
        torch.testing.assert_close(fit.head.weight, weight, rtol=0, atol=atol)


def test_the_whole_range_of_strengths_down_to_separated_classes() -> None:
    """The gradient of the function as the papers write it, by automatic differentiation, vanishes
    in float64; in float32 the value is the same to 1e-4.
    """
    x, labels = problem(80, 40, 4)
    strengths = Config().path[::4]
    exact = path(x, labels, 4, strengths, tolerance=1e-14)
    used = list(path(x.float(), labels, 4, strengths))

    for fit, rounded in zip(exact, used, strict=True):
        weight, bias = (part.requires_grad_() for part in (fit.head.weight, fit.head.bias))
        loss = F.cross_entropy(x @ weight.T + bias, labels)
        loss = loss + fit.strength / 2 * weight.square().sum()
        loss.backward()
        assert weight.grad is not None
        assert float(weight.grad.abs().max()) < 1e-5

        head = Linear(rounded.head.weight.double(), rounded.head.bias.double())
        assert value(x, labels, head, fit.strength) == pytest.approx(loss.item(), rel=1e-4)
        assert fit.converged
        assert rounded.converged

    accuracy = (used[-1].head.scores(x).argmax(1) == labels).double().mean()
    assert accuracy == 1


def test_a_start_near_the_minimum_is_used() -> None:
    x, labels = problem(300, 12, 5)
    (cold,) = path(x, labels, 5, [1e-3], tolerance=1e-12)
    (warm,) = path(x, labels, 5, [1e-3], start=cold.head)
    assert (warm.iterations, cold.iterations > 2) == (0, True)
    torch.testing.assert_close(warm.head.scores(x), cold.head.scores(x))


def test_too_few_iterations_are_said() -> None:
    x, labels = problem(300, 12, 5)
    (fit,) = path(x, labels, 5, [1e-6], limit=2)
    assert not fit.converged


def test_a_class_without_training_samples_and_a_constant_feature() -> None:
    """Both make the second derivative singular."""
    x, labels = problem(200, 6, 3)
    x[:, 2] = 7.0
    fits = list(path(x, labels, 4, [1.0, 1e-3]))
    assert all(fit.converged and fit.head.weight.isfinite().all() for fit in fits)
    assert (fits[-1].head.scores(x).softmax(1)[:, 3] < 1e-3).all()


def test_the_strengths_are_those_of_the_papers() -> None:
    strengths = Config().path
    assert (len(strengths), strengths[0], strengths[-1]) == (45, 1e5, 1e-6)
    ratios = {round(a / b, 4) for a, b in pairwise(strengths)}
    assert ratios == {round(10 ** (11 / 44), 4)}
