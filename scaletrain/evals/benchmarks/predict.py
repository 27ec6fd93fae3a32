"""Accuracy of a run's own classifier on the labelled test set: nothing is fitted.

It scores `Method.predict` of the whole network, for methods that were trained with labels such as
supervised training and fine-tuning.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from scaletrain.config.schema import Frozen
from scaletrain.core import Method
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.context import EvalContext
from scaletrain.evals.encoders.targets import Encoder
from scaletrain.evals.errors import EvalError
from scaletrain.evals.predictions import Ranked, Score
from scaletrain.evals.scores import place


class Config(Frozen):
    """The benchmark has no settings; `features.*` sets the transform."""


class Classifier(nn.Module):
    """The prediction of a method as a module: images [N, 3, H, W] -> class scores [N, C]."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        scores = self.method.predict(x)
        if scores.dim() != 2:
            raise EvalError(
                f"predict of method {_name(self.method)} gives {list(scores.shape)}, and this "
                "benchmark needs one class for each image"
            )

        return scores


def identity(context: EvalContext) -> dict[str, Any]:
    """The identity of the network in results: its classifier is no part of the encoder. Raises
    EvalError where the run has no classifier for the training set's classes.
    """
    network = context.network
    if type(network.method).predict is Method.predict:
        raise EvalError(
            f"{context.encoder.source}: method {_name(network.method)} has no classifier of its "
            "own (no predict); evaluate its encoder, e.g. with knn or linear"
        )

    known = network.trained_on
    if known and context.identity["train"] not in known:
        raise EvalError(
            f"{_train(context)} is not what {context.encoder.source} was trained on, so it is "
            "unknown which class its classifier means by which number; give its own training set "
            "with --train"
        )

    return network.identity


def needs(config: Config, encoder: Encoder) -> Needs:
    """The images go through the whole network, whose outputs are not stored."""
    return Needs(splits=(), network=True)


def measure(config: Config, context: EvalContext) -> Score:
    """Run the benchmark."""
    outputs = context.outputs(Classifier(context.network.method).eval(), "test")
    numbers, width = context.dataset.matched.numbers, outputs.x.shape[1]
    if width <= (largest := int(numbers.max())):
        raise EvalError(
            f"{context.encoder.source}: its classifier tells {width} classes apart, and "
            f"{_train(context)} has labels up to {largest}; evaluate with the data of its training"
        )

    if context.dataset.groups is None:
        labels = numbers[outputs.labels]
        rank, predicted = place(outputs.x, labels)
        prediction = Ranked(outputs.index, labels, rank, predicted, width)
    else:
        prediction = context.ranked(outputs, outputs.x[:, numbers])

    network, test = context.network, context.identity["test"]
    seen = test in network.trained_on | network.pretrained_on
    if seen:
        print(
            f"warning: {context.encoder.source} or what it started from was trained on the test "
            f"images of {context.dataset.name}: this is no score of unseen images",
            file=sys.stderr,
        )

    return Score(
        "predict",
        {"predict": prediction},
        {
            "fitted": "nothing: the classifier of the run itself",
            "outputs": width,
            "test_seen_in_training": seen,
        },
    )


def _train(context: EvalContext) -> str:
    return context.dataset.part("trainval").path


def _name(method: Method) -> str:
    return type(method).__module__.rpartition(".")[2]
