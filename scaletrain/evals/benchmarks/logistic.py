"""Logistic regression on frozen features with the transfer protocol of SimCLR (appendix B.8) and
BYOL (appendix D.1): L-BFGS, an L2 penalty whose strength is chosen on validation images, and a
refit on training and validation images.

No augmentation. Their transform is `features.resize=simclr-transfer`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator

from scaletrain.config.schema import Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.features import watch
from scaletrain.evals.heads import lbfgs
from scaletrain.evals.heads.classifier import finite, resident
from scaletrain.evals.predictions import Score, metric_name
from scaletrain.evals.scores import accuracy, chosen_by, ranks


class Config(Frozen):
    strengths: Annotated[int, Field(ge=1, le=1000)] = 45
    """Number of penalties, at equal distances of their logarithms."""

    weakest: Annotated[float, Field(ge=1e-12, le=1e12)] = 1e-6
    strongest: Annotated[float, Field(ge=1e-12, le=1e12)] = 1e5
    """Of the penalty strength / 2 * |weights|^2 beside the mean cross-entropy."""

    tolerance: Annotated[float, Field(ge=1e-12, le=0.1)] = 1e-6
    """Share of the minimum that the minimised function may be above it, by estimate."""

    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """At most, for each strength."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.weakest > self.strongest:
            raise ValueError("weakest is above strongest")
        return self

    @property
    def path(self) -> list[float]:
        """The strengths, the largest first."""
        low, high = (torch.tensor(x, dtype=torch.float64).log10().item() for x in self.bounds)
        # rounded so that they are the same on every machine
        return [
            float(f"{10**exponent:.6e}")
            for exponent in torch.linspace(high, low, self.strengths, dtype=torch.float64).tolist()
        ]

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest strength."""
        return self.weakest, self.strongest


def needs(config: Config, encoder: Encoder) -> Needs:
    """Training images with and without the validation images, these, and the test images."""
    return Needs(("train", "val", "trainval", "test"))


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    metric, classes = chosen_by(context.dataset.metric), context.classes
    train, validation = context.features("train"), context.features("val")
    unfinished = []

    def path(split: str, strengths: Iterable[float], start: lbfgs.Fit | None) -> Iterable[lbfgs.Fit]:
        ...
