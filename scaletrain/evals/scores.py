"""Accuracies in per cent from the rank of the true class, and average precisions from scores, for
all classification benchmarks.

No metric depends on how the classes are numbered or how the samples are ordered.
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


def average_precision(
    scores: Tensor, labels: Tensor, counts: Tensor | None = None
) -> dict[str, Tensor]:
    """{"map", "map11"}: mean over classes of the average precision, in 0 .. 1, each [].

    scores: [Q, C]. labels: [Q, C]: 1, 0, or -1 for a sample that does not count for a class.
    counts: [B, Q] how often each sample occurs; results are then [B]. `map` is the area under
    precision, made monotone, over recall (PASCAL VOC from 2010 on; VISSL), `map11` the mean of the
    highest precisions at recalls from 0, 0.1, .. to 1 on (PASCAL VOC 2007). Samples with one score
    are placed together, so that no order of equals matters. A score that is not finite places a
    sample where it is worst. A class without a positive sample does not count; one class has to
    have one.
    """
    weights = counts if counts is not None else torch.ones(1, len(scores), dtype=torch.int64)
    means = [
        _curve_means(score, truth, weights)
        for score, truth in zip(scores.T, labels.T, strict=True)
        if (truth == 1).any()
    ]
    area, eleven = (torch.stack(part).nanmean(0) for part in zip(*means, strict=True))
    return {
        name: value if counts is not None else value[0]
        for name, value in (("map", area), ("map11", eleven))
    }


def _curve_means(scores: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Both average precisions of one class: [Q], [Q], [B, Q] -> [B], [B]."""
    rows = (labels >= 0).nonzero().flatten()
    worst = torch.where(labels == 1, -torch.inf, torch.inf)
    finite = torch.where(scores.isfinite(), scores, worst)
    scores, order = finite[rows].sort(descending=True)
    rows = rows[order]
    positive, counts = labels[rows] == 1, counts.index_select(1, rows)

    # only where a score is one of a positive sample can precision have a peak
    _, block, sizes = scores.unique_consecutive(return_inverse=True, return_counts=True)
    own, block = block[positive].unique_consecutive(return_inverse=True)
    places = counts.cumsum(1)[:, sizes.cumsum(0)[own] - 1]  # [B, P]
    right = torch.zeros_like(places).index_add_(1, block, counts[:, positive]).cumsum(1)
    total = right[:, -1:]
    # the highest precision at this recall or a higher one
    highest = (right.double() / places.clamp(min=1)).flip(1).cummax(1).values.flip(1)

    steps = right.diff(dim=1, prepend=torch.zeros_like(total))
    area = (steps * highest).sum(1) / total[:, 0]
    # in whole numbers: 0.1 * 3 is no multiple of 0.1
    at = torch.searchsorted(10 * right, total * torch.arange(11))
    eleven = highest.gather(1, at).mean(1)
    return area, eleven.masked_fill(total[:, 0] == 0, torch.nan)


def chosen_by(metric: str) -> str:
    """The accuracy by which classifiers are chosen, and which tables show first, on a data set with
    this main metric: "per_class" or "top1".
    """
    return "per_class" if metric == "per_class" else "top1"
