"""L-BFGS for convex losses of linear models: P independent problems at once, preconditioned, with a
line search that costs no pass over the features.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Pairs of steps and gradient changes that are remembered.
_MEMORY = 10
# A step is accepted where the slope is this share of the slope at its start.
_FLAT = 0.1


class Problem(Protocol):
    """P convex functions of [n] parameters each, at the point where they stand."""

    def value(self) -> Tensor:
        """[P] float64."""

    def gradient(self) -> Tensor:
        """[P, n]."""

    def precondition(self, gradient: Tensor) -> Tensor:
        """[P, n] of an estimate of the inverse second derivative, times the gradient."""

    def aim(self, direction: Tensor) -> None:
        """Prepare `slopes` and `move` along a direction [P, n]."""

    def slopes(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """First and second derivative [P] float64 after a distance [P] along the direction."""

    def move(self, distance: Tensor) -> None:
        """Go a distance [P] along the direction."""


class Outcome(NamedTuple):
    """How a minimisation ended."""

    iterations: int
    converged: bool


def minimize(problem: Problem, tolerance: float, limit: int) -> Outcome:
    """Move to the minimum, up to a share `tolerance` of each function's value by the estimate of
    the quasi-Newton step; at most `limit` iterations.

    L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) whose initial matrix is the
    preconditioner. For a linear model the values of the model are linear in the distance, so that
    a step needs two products with the features, however often the line search looks.
    """
    gradient = problem.gradient()
    history: list[tuple[Tensor, Tensor, Tensor]] = []

    for iteration in range(limit):
        direction = -_quasi_newton(problem, gradient, history)
        slope = _dot(gradient, direction)
        due = -slope / 2 > tolerance * problem.value()
        if not due.any():
            return Outcome(iteration, True)

        problem.aim(direction)
        distance = torch.where(due, _search(problem, slope), 0)
        problem.move(distance)

        step = distance.to(direction).unsqueeze(1) * direction
        before, gradient = gradient, problem.gradient()
        change = gradient - before
        history = [*history[1 - _MEMORY :], (step, change, _dot(step, change))]

    return Outcome(limit, False)


def _quasi_newton(
    problem: Problem, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """[P, n]: the two-loop recursion; pairs without positive curvature are passed over."""
    descent, shares = gradient.clone(), []
    for step, change, curvature in reversed(history):
        share = torch.where(curvature > 0, _dot(step, descent) / curvature, 0).to(descent)
        descent -= share.unsqueeze(1) * change
        shares.append(share)

    descent = problem.precondition(descent)
    for (step, change, curvature), share in zip(history, reversed(shares), strict=True):
        back = torch.where(curvature > 0, _dot(change, descent) / curvature, 0).to(descent)
        descent += (share - back).unsqueeze(1) * step

    return descent


def _search(problem: Problem, start: Tensor) -> Tensor:
    """Distances [P] at which the slope is nearly zero, by Newton steps within a bracket.

    start: the slopes at distance zero, which are negative for what is not at its minimum.
    """
    distance = torch.ones_like(start)
    low, high = torch.zeros_like(start), torch.full_like(start, torch.inf)

    for _ in range(30):
        slope, curvature = problem.slopes(distance)
        due = slope.abs() > _FLAT * start.abs()
        if not due.any():
            break

        low = torch.where(slope < 0, distance, low)
        high = torch.where(slope < 0, high, distance)
        newton = distance - slope / curvature
        middle = torch.where(high.isinf(), 2 * distance, (low + high) / 2)
        usable = (newton > low) & (newton < high)
        distance = torch.where(due, torch.where(usable, newton, middle), distance)

    return distance


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[P, n], [P, n] -> [P] float64."""
    return (a * b).sum(1).double()
