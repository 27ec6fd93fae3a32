"""Classifiers of a few training images per class, in closed form: nearest class mean (Snell et al.,
2017, on frozen features) and ridge regression (big_vision's few-shot evaluator).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import rng
from scaletrain.evals.errors import EvalError
from scaletrain.evals.heads.classifier import Linear


def draw(labels: Tensor, index: Tensor, classes: int, shots: int, seed: int, number: int) -> Tensor:
    """Rows [classes * shots], ascending, of `shots` samples of each class.

    labels: [N] in 0 .. classes - 1. index: sample numbers [N], which alone decide: the draws of
    more shots contain those of fewer, whatever the order and the numbers of the classes. number: of
    the draw. Raises EvalError where a class has too few samples.
    """
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) < shots:
        raise EvalError(
            f"class {int(counts.argmin())} has {int(counts.min())} training images, fewer than "
            f"{shots} shots; give smaller numbers with --set fewshot.shots=[...]"
        )

    order = rng.hash64("few shots", seed, number, index).argsort(stable=True)
    by_class = order[labels[order].argsort(stable=True)]
    first = (counts.cumsum(0) - counts).unsqueeze(1)
    return by_class[(first + torch.arange(shots)).flatten()].sort().values


def nearest_mean(x: Tensor, labels: Tensor, classes: int) -> Linear:
    """The class whose mean is nearest by Euclidean distance, from features [N, D] of every
    class.
    """
    own = F.one_hot(labels.to(x.device), classes).to(x)  # [N, C]
    means = (own.T @ x) / own.sum(0).unsqueeze(1)
    # -|x - mean|^2 without |x|^2, which is the same for all classes
    return Linear(2 * means, -means.square().sum(1))


def ridge(x: Tensor, labels: Tensor, classes: int, strength: float) -> Linear:
    """Least squares on targets 1 for the class and -1 for others, plus strength * |weights|^2, for
    standardised features; the bias is not penalised.

    x: features [N, D]. Features are standardised with the mean and deviation of x, and the returned
    classifier takes them as they are.
    """
    samples, width = x.shape
    x, targets = x.double(), 2 * F.one_hot(labels.to(x.device), classes).double() - 1
    mean, deviation = x.mean(0), x.std(0, correction=0) + 1e-5
    z, level = (x - mean) / deviation, targets.mean(0)

    # the smaller of both systems of equations has the same solution
    if samples < width:
        system = z @ z.T
        solved = z.T @ _solve(system, strength, targets - level)
    else:
        solved = _solve(z.T @ z, strength, z.T @ (targets - level))

    weight = (solved / deviation.unsqueeze(1)).T
    return Linear(weight.float(), (level - weight @ mean).float())


def _solve(system: Tensor, strength: float, right: Tensor) -> Tensor:
    """x of (system + strength * identity) x = right."""
    regular = system + strength * torch.eye(len(system), dtype=system.dtype, device=system.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(regular))
