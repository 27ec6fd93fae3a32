"""Linear support vector machines on frozen features, one for each class, with the protocol of
VISSL's VOC2007 benchmark (PIRL; Misra & van der Maaten, 2020): features of length one, squared
hinge loss, images of the class weigh twice, the cost chosen by 3-fold cross-validation.

differs: on data sets that are not scored by average precision, one cost is chosen for all classes
by accuracy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from scaletrain.config.schema import Frozen
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError
from scaletrain.evals.features import some, watch
from scaletrain.evals.heads.classifier import finite, normalized, resident
from scaletrain.evals.heads.svm import Fit, folds, one_hot, path
from scaletrain.evals.predictions import Prediction, Score, Scored, metric_name
from scaletrain.evals.scores import accuracy, average_precision, chosen_by, ranks


class Config(Frozen):
    costs: Annotated[tuple[Annotated[float, Field(ge=1e-9, le=1e9)], ...], AfterValidator(some)] = (
        0.01,
        0.1,
        1.0,
        2.0,
        5.0,
        10.0,
        15.0,
        20.0,
        50.0,
        100.0,
        1000.0,
    )
    """Weights of the loss, which is added to 1/2 |weights|^2."""

    positive_weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 2.0
    """Importance of an image of the class; others have 1."""

    least_length: Annotated[float, Field(ge=1e-30, le=1e30)] = 1e-5
    """Features are divided by their length, or by this where they are shorter."""

    folds: Annotated[int, Field(ge=2, le=100)] = 3
    choose_by: Literal["auto", "accuracy", "average_precision"] = "auto"
    """One cost for all classes by accuracy, or one for each by average precision; auto: as the data
    set is scored."""

    average_precision: bool = True
    """Also the mean average precision, whose scores take 4 bytes for each test image and class."""

    tolerance: Annotated[float, Field(ge=1e-12, le=0.1)] = 1e-6
    """Share of the minimum that the minimised function may be above it, by estimate."""

    iterations: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """At most, for each cost."""


def needs(config: Config, encoder: Encoder) -> Needs:
    """All training images and the test images."""
    return Needs(("trainval", "test"))


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    scored_by = context.dataset.metric
    by_precision = config.choose_by == "average_precision" or (
        config.choose_by == "auto" and scored_by in ("map", "map11")
    )
    metric, costs = chosen_by(scored_by), sorted(set(config.costs))
    train = context.features("trainval")
    x = resident(normalized(finite(train.x), config.least_length), context.device)
    labels = one_hot(train.labels, context.classes)

    fold = folds(train.labels, train.index, config.folds)
    if int(fold.max()) + 1 < config.folds:
        raise EvalError(
            f"svm: no class has {config.folds} training images for {config.folds}-fold "
            "cross-validation; give fewer with --set svm.folds=N"
        )

    quality, unfinished = [], 0
    for number in watch(range(config.folds), "svm", config.folds):
        rows, out = (fold != number).nonzero().flatten(), (fold == number).nonzero().flatten()
        held_out, truth = x[out.to(x.device)], train.labels[out]
        for fit in _fits(config, x[rows.to(x.device)], labels[rows], costs):
            scores = fit.head.scores(held_out)
            quality.append(
                _precisions(scores, truth) if by_precision else _right(scores, truth, metric)
            )
            unfinished += not fit.converged

    # [costs] or [costs, K]; a class that a fold does not have has no precision there
    by_cost = torch.stack(quality).unflatten(0, (config.folds, -1)).nanmean(0).nan_to_num()
    # of equals the smallest
    chosen = torch.tensor(costs)[by_cost.argmax(0)]
    (final,) = _fits(config, x, labels, [chosen])
    unfinished += not final.converged
    if unfinished:
        print(
            f"warning: svm: {unfinished} minimisations did not end in {config.iterations} "
            "iterations; allow more with --set svm.iterations=N",
            file=sys.stderr,
        )

    queries = context.features("test")
    scores = final.head.scores(normalized(queries.x, config.least_length))
    ranked = context.ranked(queries, scores)
    predictions: dict[str, Prediction] = {"svm": ranked}
    main = metric_name("svm", metric)
    if config.average_precision:
        shown = one_hot(ranked.labels, ranked.classes)
        predictions["svm_classes"] = Scored(queries.index, shown, context.dataset.best(scores))
        if scored_by in ("map", "map11"):
            main = metric_name("svm_classes", scored_by)

    return Score(
        main,
        predictions,
        {
            **config.model_dump(mode="json"),
            "minimized": "1/2 |w|^2 + cost * sum of importance * max(0, 1 - y w.(x, 1))^2",
            "normalized": "features to length 1",
            "train_transform": context.transform,
            "chosen_on": f"{config.folds}-fold cross-validation of all training images",
            "chosen_by": "average precision of each class" if by_precision else metric,
        },
        {
            "chosen_cost": chosen.tolist(),
            # then a wider range may do better
            "chosen_at_edge": bool(((chosen == costs[0]) | (chosen == costs[-1])).any()),
            "cross_validated": dict(
                zip(map(str, costs), by_cost.view(len(costs), -1).mean(1).tolist(), strict=True)
            ),
            "not_converged": unfinished,
        },
    )


def _fits(
    config: Config, x: Tensor, labels: Tensor, costs: Iterable[float | Tensor]
) -> Iterator[Fit]:
    return path(x, labels, costs, config.positive_weight, config.tolerance, config.iterations)


def _right(scores: Tensor, labels: Tensor, metric: str) -> Tensor:
    """Accuracy [] in per cent."""
    return torch.tensor(accuracy(ranks(scores, labels), labels, scores.shape[1])[metric])


def _precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision [K] of each class, in per cent; not a number for one without samples."""
    shown = one_hot(labels, scores.shape[1])
    averages = torch.full((scores.shape[1],), torch.nan, dtype=torch.float64)
    for number in shown.any(0).nonzero().flatten().tolist():
        column = slice(number, number + 1)
        averages[number] = 100 * average_precision(scores[:, column], shown[:, column])["map"]

    return averages
