"""Features in memory in place of images, for the tests of benchmarks and their heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scaletrain.evals import benchmark
from scaletrain.evals.features import Features
from scaletrain.evals.held_out import held_out
from scaletrain.evals.predictions import Ranked, Score, named_metrics
from scaletrain.evals.scores import place

CLASSES, WIDTH = 4, 6


def blobs(samples: int, noise: float, seed: int) -> Features:
    """Four classes around four corners of a cube."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=random)
    centres = torch.eye(CLASSES, WIDTH) * 3
    x = centres[labels] + noise * torch.randn(samples, WIDTH, generator=random)
    return Features(x, labels, torch.arange(samples))


def skewed(samples: int, seed: int) -> Features:
    """Two dimensions of loud noise, which only a long enough training learns to ignore."""
    plain = blobs(samples, 1.0, seed)
    loud = torch.tensor([1.0] * CLASSES + [15.0] * (WIDTH - CLASSES))
    return Features(plain.x * loud, plain.labels, plain.index)


def rows(features: Features, chosen: Tensor) -> Features:
    return Features(features.x[chosen], features.labels[chosen], features.index[chosen])


class Context:
    """As much of an EvalContext as heads use, with features in memory; it notes what was asked
    for.
    """

    device = torch.device("cpu")
    transform: dict[str, Any] = {"resize": "none"}  # noqa: RUF012
    augmentation: dict[str, Any] = {"name": "crops"}  # noqa: RUF012

    def __init__(
        self, train: Features, test: Features, classes: int = CLASSES, metric: str = "top1"
    ) -> None:
        val = torch.zeros(len(train.labels), dtype=torch.bool)
        val[held_out(len(train.labels))] = True
        self.splits = {"train": rows(train, ~val), "val": rows(train, val)}
        self.splits |= {"trainval": train, "test": test}
        self.classes, self.asked = classes, list[str]()
        self.dataset = SimpleNamespace(metric=metric, scored=classes, best=lambda scores: scores)

    def samples(self, split: str) -> int:
        return len(self.splits[split].labels)

    def features(self, split: str) -> Features:
        self.asked.append(split)
        return self.splits[split]

    def views(self, split: str, seed: int) -> Any:
        self.asked.append(f"views of {split}")
        while True:
            yield self.splits[split].x, self.splits[split].labels

    def ranked(self, features: Features, scores: Tensor) -> Ranked:
        rank, predicted = place(self.dataset.best(scores), features.labels)
        return Ranked(features.index, features.labels, rank, predicted, self.dataset.scored)


def measured(name: str, context: Context, **settings: Any) -> tuple[dict[str, float], Score]:
    """The metrics of a benchmark by name, and all else that it found."""
    module = benchmark.load(name)
    score = module.measure(module.Config(**settings), context)
    metrics = {key: value for key, _, _, value in named_metrics(score.predictions)}

    assert score.main in metrics
    return metrics, score


def knn(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    truth: Tensor,
    ks: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """The metrics of the benchmark `knn` for labels 0, 1, .. of which the bank has the largest."""
    train = Features(bank, labels, torch.arange(len(bank)))
    test = Features(queries, truth, torch.arange(len(queries)))
    context = Context(train, test, int(labels.max()) + 1)
    return measured("knn", context, ks=ks, temperature=temperature)[0]
