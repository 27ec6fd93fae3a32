"""Accuracy from a few training images per class: nearest class mean and ridge regression on frozen
features, for several draws of the images.

The ridge classifier and its strength are big_vision's few-shot evaluator. Nothing is chosen, so no
further images are needed. The draws are the same for every encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from scaletrain.config.schema import Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.features import some, watch
from scaletrain.evals.heads.classifier import finite, normalized
from scaletrain.evals.heads.fewshot import draw, nearest_mean, ridge
from scaletrain.evals.predictions import Drawn, Ranked, Score, metric_name
from scaletrain.evals.scores import chosen_by


class Config(Frozen):
    shots: Annotated[
        tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], AfterValidator(some)
    ] = (1, 5, 10)
    """Training images of each class."""

    draws: Annotated[int, Field(ge=1, le=1000)] = 5
    """Of the training images."""

    strength: Annotated[float, Field(ge=1e-12, le=1e12)] = 1024.0
    """Of the penalty strength * |weights|^2 of the ridge regression, for standardised features."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Of the draws."""


def needs(config: Config, encoder: Encoder) -> Needs:
    """All training images and the test images."""
    return Needs(("trainval", "test"))


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    train, test = context.features("trainval"), context.features("test")
    classes, metric = context.classes, chosen_by(context.dataset.metric)
    directions = normalized(test.x)
    found: dict[str, list[Ranked]] = {}

    for number in watch(range(config.draws), "few shots", config.draws):
        for shots in sorted(set(config.shots)):
            rows = draw(train.labels, train.index, classes, shots, config.seed, number)
            x, labels = finite(train.x[rows].to(context.device)), train.labels[rows]
            heads = {
                "mean": nearest_mean(normalized(x), labels, classes).scores(directions),
                "ridge": ridge(x, labels, classes, config.strength).scores(test.x),
            }
            for head, scores in heads.items():
                ranked = context.ranked(test, scores)
                found.setdefault(f"fewshot_{head}_{shots}", []).append(ranked)

    return Score(
        metric_name(f"fewshot_ridge_{max(config.shots)}", metric),
        {name: _drawn(draws) for name, draws in found.items()},
        {
            **config.model_dump(mode="json"),
            "mean": "nearest class mean of features of length 1",
            "ridge": "targets 1 and -1, features standardised, bias not penalised",
            "train_transform": context.transform,
        },
        {
            # of the metric that tables show first
            f"{name}_by_draw": [one.metrics()[metric] for one in draws]
            for name, draws in found.items()
        },
    )


def _drawn(draws: Sequence[Ranked]) -> Drawn:
    first = draws[0]
    rank, predicted = (
        torch.stack([getattr(one, name) for one in draws]) for name in ("rank", "predicted")
    )
    return Drawn(first.index, first.labels, rank, predicted, first.classes)
