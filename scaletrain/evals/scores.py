"""Accuracies, in per cent, from the rank of the true class. Used by every classification benchmark."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many classes are placed before the true one: [Q, C] scores and [Q] labels -> [Q] int64, 0 being right.

    Classes of equal score are placed in the order of their index, so the lowest index wins a tie. A row with a score that is
    not finite has no ranking: it gets C, which is wrong at every depth.
    """
    own = scores.gather(1, labels.unsqueeze(1))  # [Q, 1]
    lower = torch.arange(scores.shape[1], device=scores.device) < labels.unsqueeze(1)  # [Q, C]
    before = ((scores > own) | ((scores == own) & lower)).sum(1)
    return before.masked_fill(~scores.isfinite().all(1), scores.shape[1])


def accuracy(rank: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """{"top1", "top5" from five classes on, "per_class"} in per cent.

    `per_class` is the mean over the classes that occur in `labels` of their recall; classes that are only predicted do not
    count, unlike in torchmetrics' macro average.
    """
    right = (rank == 0).double()
    counts = torch.bincount(labels, minlength=classes)
    recall = torch.bincount(labels, weights=right, minlength=classes)[counts > 0] / counts[counts > 0]
    result = {"top1": 100 * float(right.mean())}
    if classes >= 5:
        result["top5"] = 100 * float((rank < 5).double().mean())
    return {**result, "per_class": 100 * float(recall.mean())}
