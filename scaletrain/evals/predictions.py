"""What a benchmark predicts for every test sample: metrics, intervals and paired tests are all
computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from scaletrain.evals.scores import accuracy


@dataclass(frozen=True)
class Ranked:
    """Predictions of one class for each of Q samples."""

    # numbers of the samples in the shards of the test split, ascending
    index: Tensor  # [Q] int64
    labels: Tensor  # [Q] int64, in 0 .. classes - 1
    # how many classes the classifier places before the true one, as in scores.ranks; 0 is right
    rank: Tensor  # [Q] int64
    # the class placed first
    predicted: Tensor  # [Q] int64
    classes: int

    def metrics(self) -> dict[str, float]:
        """In per cent: top1, top5 from five classes on, per_class."""
        return accuracy(self.rank, self.labels, self.classes)


@dataclass(frozen=True)
class Score:
    """What a benchmark measured.

    predictions: by name, e.g. knn_20; a result has the metrics `knn_20` (the top-1), `knn_20_top5`
    and so on, each with an interval. main: the name of the metric that tables show first.
    protocol: how it was measured, alike for every encoder. found: what it came upon, such as a
    chosen learning rate.
    """

    main: str
    predictions: Mapping[str, Ranked]
    protocol: Mapping[str, Any]
    found: Mapping[str, Any] = field(default_factory=dict)
