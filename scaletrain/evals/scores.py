"""Accuracies in per cent from the rank of the true class, for all classification benchmarks.

No metric depends on how the classes are numbered.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Samples that are scored at once.
_ROWS = 4096


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score at least as high as the true one: [Q, C] scores and [Q] labels
    -> [Q] int64, 0 being right.

    A tie counts against the true class: a classifier that cannot tell two classes apart has not
    recognised either, and one that gives all classes the same score is right nowhere. A row with a
    score that is not finite has no ranking: it gets C, which is wrong at every depth.
    """
    own = scores.gather(1, labels.unsqueeze(1))  # [Q, 1]
    before = (scores >= own).sum(1) - 1

    return before.masked_fill(~scores.isfinite().all(1), scores.shape[1])


def place(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rank of the true class and predicted class of each sample, [Q] int64 on the CPU, from scores
    [Q, C] and labels [Q]; computed in parts that fit in memory.
    """
    parts = [
        (ranks(some, truth.to(some.device)).cpu(), some.argmax(1).cpu())
        for some, truth in zip(scores.split(_ROWS), labels.split(_ROWS), strict=True)
    ]

    return torch.cat([rank for rank, _ in parts]), torch.cat([best for _, best in parts])


def accuracy(rank: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """{"top1", "top5" from five classes on, "per_class"} in per cent.

    `per_class` is the mean over the classes that occur in `labels` of their recall; classes that
    are only predicted do not count, unlike in torchmetrics' macro average.
    """
    right = (rank == 0).double()
    counts = torch.bincount(labels, minlength=classes)
    recall = (
        torch.bincount(labels, weights=right, minlength=classes)[counts > 0] / counts[counts > 0]
    )

    result = {"top1": 100 * float(right.mean())}
    if classes >= 5:
        result["top5"] = 100 * float((rank < 5).double().mean())

    # rounded once, so that the order of the classes cannot show in the last digit
    return {**result, "per_class": 100 * math.fsum(recall.tolist()) / len(recall)}
