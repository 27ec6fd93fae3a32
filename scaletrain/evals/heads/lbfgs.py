"""Multinomial logistic regression with an L2 penalty over many strengths (SimCLR, appendix B.8;
BYOL, appendix D.1).

Minimised is the mean cross-entropy plus strength / 2 times the squared weights; biases are not
penalised. In scikit-learn's terms C = 1 / (strength * N).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scaletrain.evals.heads.classifier import Linear
from scaletrain.evals.heads.minimize import minimize


@dataclass(frozen=True)
class Fit:
    """A classifier of one strength."""

    strength: float
    head: Linear
    # the minimised function
    value: float
    iterations: int
    converged: bool


def path(
    x: Tensor,
    labels: Tensor,
    classes: int,
    strengths: Iterable[float],
    start: Linear | None = None,
    tolerance: float = 1e-6,
    limit: int = 1000,
) -> Iterator[Fit]:
    """The minimum for each strength in the given order, each begun at the one before it: from the
    largest to the smallest is fastest.

    x: features [N, D], on the device that computes. labels: [N] in 0 .. classes - 1. start: where
    the first begins, by default at zero. tolerance: share of the minimum that the value may be
    above it, by estimate. limit: iterations of one strength. Several times more memory than N *
    classes numbers is needed.
    """
    problem = _Softmax(x, labels.to(x.device), classes)
    if start is not None:
        problem.put(start)

    for strength in strengths:
        problem.prepare(strength)
        iterations, converged = minimize(problem, tolerance, limit)
        yield Fit(strength, problem.head(), float(problem.value()), iterations, converged)


class _Softmax:
    """One problem of classes * (D + 1) parameters: the weights of features that are centred at
    their mean, then the biases; centring changes the parameters and not the minimum.

    Class scores are kept as [C, N]: with samples innermost a softmax over few classes is several
    times faster on a CPU.
    """

    def __init__(self, x: Tensor, labels: Tensor, classes: int) -> None:
        self.x, self.labels, self.classes = x, labels, classes
        self.samples, self.width = x.shape
        self.columns = torch.arange(self.samples, device=x.device)
        self.mean = x.mean(0)
        covariance = (x.T @ x) / self.samples - torch.outer(self.mean, self.mean)
        variances, self.axes = torch.linalg.eigh(covariance)
        self.variances = variances.clamp(min=0)  # [D]
        self.point = x.new_zeros(1, classes * (self.width + 1))

    def put(self, head: Linear) -> None:
        weight = _apart(head.weight.to(self.x))
        bias = _apart(head.bias.to(self.x)) + weight @ self.mean
        self.point = torch.cat((weight.flatten(), bias)).unsqueeze(0)

    def head(self) -> Linear:
        weight, bias = self._split(self.point)
        return Linear(weight.clone(), bias - weight @ self.mean)

    def prepare(self, strength: float) -> None:
        """Begin a minimisation with this strength at the present point."""
        self.strength = strength
        self.scores = self._scores(self.point)
        self.probability = self.scores.softmax(0)
        # Mean second derivative of the loss by each class score.
        spread = (self.probability * (1 - self.probability)).mean(1)
        self.curvature = spread.clamp(min=1e-12)  # [C]

    def value(self) -> Tensor:
        weight, _ = self._split(self.point)
        own = self.probability[self.labels, self.columns].clamp(min=1e-38)
        loss = -own.log().double().mean() + self.strength / 2 * weight.square().sum().double()
        return loss.unsqueeze(0)

    def gradient(self) -> Tensor:
        weight, _ = self._split(self.point)
        error = self.probability.clone()
        error[self.labels, self.columns] -= 1
        error /= self.samples

        bias = error.sum(1)
        inner = torch.addmm(self.strength * weight, error, self.x)
        return torch.cat(((inner - torch.outer(bias, self.mean)).flatten(), bias)).unsqueeze(0)

    def precondition(self, gradient: Tensor) -> Tensor:
        """The second derivative is nearly block-diagonal: for each class its mean curvature times
        the covariance of the features, plus the strength.

        Parameters that all classes have in common change no probability, where only the penalty is
        curved. Gradients have no such part, and it is taken from the result.
        """
        weight, bias = self._split(gradient)
        scale = torch.outer(self.curvature, self.variances) + self.strength
        weight = _apart(((weight @ self.axes) / scale) @ self.axes.T)
        return torch.cat((weight.flatten(), _apart(bias / self.curvature))).unsqueeze(0)

    def aim(self, direction: Tensor) -> None:
        self.direction, self.change = direction, self._scores(direction)  # [C, N]
        (weight, _), (step, _) = self._split(self.point), self._split(direction)
        self.own_change = self.change[self.labels, self.columns].double().mean()
        self.growth = (weight * step).sum().double(), step.square().sum().double()

    def slopes(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        self.probability = torch.add(self.scores, distance.to(self.x) * self.change).softmax(0)
        weighted = self.probability * self.change
        mean = weighted.sum(0)
        variance = (weighted * self.change).sum(0) - mean.square()

        first = mean.double().mean() - self.own_change
        linear, square = self.growth
        slope = first + self.strength * (linear + distance * square)
        return slope, variance.double().mean() + self.strength * square.unsqueeze(0)

    def move(self, distance: Tensor) -> None:
        moved = distance.to(self.x)
        self.point = self.point + moved * self.direction
        self.scores.add_(moved * self.change)
        self.probability = self.scores.softmax(0)

    def _split(self, point: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = point[0].split([self.classes * self.width, self.classes])
        return weight.view(self.classes, self.width), bias

    def _scores(self, point: Tensor) -> Tensor:
        weight, bias = self._split(point)
        return torch.addmm((bias - weight @ self.mean).unsqueeze(1), weight, self.x.T)


def _apart(values: Tensor) -> Tensor:
    """[C, ...] without what all classes have in common."""
    return values - values.mean(0)
