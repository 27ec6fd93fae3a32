"""Logistic regression on frozen features with the transfer protocol of SimCLR (appendix B.8) and
BYOL (appendix D.1): L-BFGS, an L2 penalty whose strength is chosen on validation images, and a
refit on training and validation images.

No augmentation. Their transform is `features.resize=simclr-transfer`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Self

from pydantic import Field, model_validator

from scaletrain.config.schema import Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.features import Features, watch
from scaletrain.evals.heads import lbfgs
from scaletrain.evals.heads.classifier import Linear, finite, resident
from scaletrain.evals.predictions import Score, metric_name
from scaletrain.evals.scores import accuracy, chosen_by, ranks


class Config(Frozen):
    strengths: Annotated[int, Field(ge=1, le=1000)] = 45
    """Number of penalties, at equal distances of their logarithms."""

    weakest: Annotated[float, Field(ge=1e-12, le=1e12)] = 1e-6
    strongest: Annotated[float, Field(ge=1e-12, le=1e12)] = 1e5
    """Of the penalty strength / 2 * |weights|^2, which is added to the mean cross-entropy."""

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
        high, low = math.log10(self.strongest), math.log10(self.weakest)
        steps = max(1, self.strengths - 1)
        exponents = [high + (low - high) * step / steps for step in range(self.strengths)]
        # rounded so that they are the same on every machine
        return [float(f"{10**exponent:.6e}") for exponent in exponents]


def needs(config: Config, encoder: Encoder) -> Needs:
    """Training images with and without the validation images, these, and the test images."""
    return Needs(("train", "val", "trainval", "test"))


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    metric = chosen_by(context.dataset.metric)
    # All before its parts, so that the validation images are not encoded twice.
    every, validation = context.features("trainval"), context.features("val")
    best, by_strength, unfinished = None, {}, []

    fits = _fits(config, context, context.features("train"), config.path)
    for fit in watch(fits, "logistic", config.strengths):
        rank = ranks(fit.head.scores(validation.x), validation.labels)
        value = accuracy(rank, validation.labels, context.classes)[metric]
        # of equals the strongest
        if best is None or value > max(by_strength.values()):
            best = fit

        by_strength[fit.strength] = value
        unfinished += [] if fit.converged else [fit.strength]

    assert best is not None, "there is a strength or more"
    (final,) = _fits(config, context, every, [best.strength], best.head)
    if unfinished or not final.converged:
        print(
            f"warning: logistic: the minimum was not reached in {config.iterations} iterations at "
            f"strengths {unfinished or [best.strength]}; allow more with --set "
            "logistic.iterations=N",
            file=sys.stderr,
        )

    queries = context.features("test")
    return Score(
        metric_name("logistic", metric),
        {"logistic": context.ranked(queries, final.head.scores(queries.x))},
        {
            **config.model_dump(mode="json"),
            "minimized": "mean cross-entropy + strength / 2 * |weights|^2, biases not penalised",
            "optimizer": "L-BFGS from the largest strength to the smallest",
            "standardised": False,
            "train_transform": context.transform,
            "chosen_on": "validation images",
            "refit": "training and validation images",
        },
        {
            "chosen_strength": best.strength,
            # then a wider range may do better
            "chosen_at_edge": best.strength in (config.path[0], config.path[-1]),
            f"held_out_{metric}": {str(key): value for key, value in by_strength.items()},
            "held_out": by_strength[best.strength],
            "held_out_images": len(validation.labels),
            "not_converged": unfinished,
            "refit_converged": final.converged,
        },
    )


def _fits(
    config: Config,
    context: EvalContext,
    features: Features,
    strengths: Iterable[float],
    start: Linear | None = None,
) -> Iterator[lbfgs.Fit]:
    return lbfgs.path(
        resident(finite(features.x), context.device),
        features.labels,
        context.classes,
        strengths,
        start,
        config.tolerance,
        config.iterations,
    )
