"""One linear support vector machine for each class against all others, with liblinear's objective
(Fan et al., 2008, L2-regularised squared hinge loss), as VISSL trains them on frozen features.

Minimised for each class is 1/2 |w|^2 + cost * sum over samples of importance * max(0, 1 - y f)^2,
where f = w . (x, 1): as in liblinear the bias is one more weight and penalised like them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import rng
from scaletrain.evals.heads.classifier import Linear
from scaletrain.evals.heads.minimize import minimize


@dataclass(frozen=True)
class Fit:
    """The classifiers of one cost."""

    head: Linear
    # the minimised function of each class
    value: Tensor  # [K] float64
    iterations: int
    converged: bool


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """[N] in 0 .. classes - 1 -> [N, classes] int8 as `fit` takes them."""
    return F.one_hot(labels, classes).to(torch.int8)


def path(
    x: Tensor,
    labels: Tensor,
    costs: Iterable[float | Tensor],
    positive_weight: float = 1.0,
    tolerance: float = 1e-6,
    limit: int = 1000,
) -> Iterator[Fit]:
    """The minimum for each cost in the given order, each begun at the one before it: from the
    smallest to the largest is fastest.

    x: features [N, D], on the device that computes. labels: [N, K]: 1 for a sample of the class, 0
    for others, -1 for one that does not count for this class. costs: numbers, or tensors [K] of one
    cost for each class. positive_weight: importance of samples of the class. tolerance: share of
    the minimum that a value may be above it, by estimate. limit: iterations of one cost.
    """
    problem = _SquaredHinge(x, labels.to(x.device), positive_weight)

    for cost in costs:
        problem.prepare(torch.as_tensor(cost, dtype=x.dtype, device=x.device))
        iterations, converged = minimize(problem, tolerance, limit)
        yield Fit(problem.head(), problem.value(), iterations, converged)


def folds(labels: Tensor, index: Tensor, count: int) -> Tensor:
    """Fold [N] of each sample, 0 .. count - 1, by its class [N] and sample number [N].

    The samples of each class are dealt out in a keyed order, so that every fold has the classes in
    equal shares, whatever their numbers. differs: scikit-learn, and with it VISSL, takes samples in
    the order of the file.
    """
    order = rng.hash64("svm folds", index).argsort(stable=True)
    place = order[labels[order].argsort(stable=True)]
    first = torch.zeros(int(labels.max()) + 2, dtype=torch.int64)
    first[1:] = torch.bincount(labels).cumsum(0)

    fold_of = torch.empty_like(labels)
    fold_of[place] = (torch.arange(len(labels)) - first[labels[place]]) % count
    return fold_of


class _SquaredHinge:
    """K problems of D + 1 parameters each; margins are kept as [K, N]."""

    def __init__(self, x: Tensor, labels: Tensor, positive_weight: float) -> None:
        self.x, self.samples = x, len(x)
        labels = labels.T
        self.sign = torch.where(labels > 0, 1, -1).to(x)  # [K, N]
        self.weight = torch.where(labels > 0, positive_weight, 1).to(x) * (labels >= 0)

        total = x.sum(0)
        moments = x.new_empty(x.shape[1] + 1, x.shape[1] + 1)
        moments[:-1, :-1], moments[:-1, -1], moments[-1, :-1] = x.T @ x, total, total
        moments[-1, -1] = self.samples
        scales, self.axes = torch.linalg.eigh(moments / self.samples)
        self.scales = scales.clamp(min=0)  # [D + 1]
        self.point = x.new_zeros(len(labels), x.shape[1] + 1)
        self.margin = x.new_zeros(len(labels), self.samples)

    def head(self) -> Linear:
        return Linear(self.point[:, :-1].clone(), self.point[:, -1].clone())

    def prepare(self, cost: Tensor) -> None:
        """Begin a minimisation with this cost, [] or [K], at the present point."""
        self.importance = self.weight * cost.expand(len(self.point)).unsqueeze(1)
        self.margin = self.sign * self._scores(self.point)
        active = self.importance * (self.margin < 1)
        # Mean second derivative of the loss by the score, over all samples.
        self.curvature = 2 * active.sum(1, keepdim=True)

    def value(self) -> Tensor:
        loss = (self.importance * (1 - self.margin).clamp(min=0).square()).sum(1).double()
        return loss + self.point.square().sum(1).double() / 2

    def gradient(self) -> Tensor:
        pull = -2 * self.importance * self.sign * (1 - self.margin).clamp(min=0)
        return self.point + torch.cat((pull @ self.x, pull.sum(1, keepdim=True)), 1)

    def precondition(self, gradient: Tensor) -> Tensor:
        """The second derivative is nearly that of samples of the mean importance."""
        scaled = (gradient @ self.axes) / (1 + self.curvature * self.scales)
        conditioned: Tensor = scaled @ self.axes.T
        return conditioned

    def aim(self, direction: Tensor) -> None:
        self.direction, self.change = direction, self.sign * self._scores(direction)
        self.linear = (self.point * direction).sum(1).double()
        self.square = direction.square().sum(1).double()

    def slopes(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        margin = torch.addcmul(self.margin, distance.to(self.x).unsqueeze(1), self.change)
        pull = self.importance * self.change
        first = (pull * (1 - margin).clamp(min=0)).sum(1).double()
        second = (pull * self.change * (margin < 1)).sum(1).double()

        slope = self.linear + distance * self.square - 2 * first
        return slope, self.square + 2 * second

    def move(self, distance: Tensor) -> None:
        moved = distance.to(self.x).unsqueeze(1)
        self.point = self.point + moved * self.direction
        self.margin = torch.addcmul(self.margin, moved, self.change)

    def _scores(self, point: Tensor) -> Tensor:
        return torch.addmm(point[:, -1:], point[:, :-1], self.x.T)
