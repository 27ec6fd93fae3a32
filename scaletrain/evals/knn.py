"""Weighted k-nearest-neighbour vote on frozen features (Wu et al., 2018, section 3.4; DINO's eval_knn.py).

Cosine similarity, each neighbour votes for its class with weight exp(similarity / T). Bank and queries both go through the
test transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain.config import Count, Frozen, Positive
from scaletrain.evals.features import Scene
from scaletrain.evals.scores import accuracy, ranks

_ELEMENTS = 1 << 25  # similarities held at once: 128 MB of float32


class Config(Frozen):
    ks: tuple[Count, ...] = (10, 20, 100, 200)
    temperature: Positive = 0.07


def measure(config: Config, scene: Scene) -> tuple[dict[str, float], dict[str, Any]]:
    """The benchmark: metrics in per cent, and what belongs on the protocol card."""
    bank, queries = scene.bank(), scene.queries()
    metrics = knn(bank.x, bank.labels, queries.x, queries.labels, config.ks, config.temperature)
    return metrics, {**config.model_dump(mode="json"), "similarity": "cosine", "vote": "exp(similarity / temperature)"}


def knn(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Accuracy in per cent of the vote of the k nearest of `features` [N, D], labelled [N], on `queries` [Q, D], labelled [Q].

    Returns knn_K, knn_K_per_class and, from five classes on, knn_K_top5 for every K of `ks`, all from one search. A K above N
    means N. Between neighbours of equal similarity the earlier in the bank is nearer; between classes of equal vote the lower
    index wins. Raises ValueError on a query label that the bank cannot know.
    """
    classes = int(labels.max()) + 1
    if int(query_labels.max()) >= classes:
        raise ValueError(f"a query has label {int(query_labels.max())}, the bank ends at {classes - 1}: not one data set")
    bank = F.normalize(features.float(), dim=1)
    labels, query_labels = labels.to(bank.device), query_labels.to(bank.device)
    found: dict[int, list[Tensor]] = {k: [] for k in sorted(set(ks))}
    rows = max(1, _ELEMENTS // len(bank))
    for part, truth in zip(torch.split(queries, rows), torch.split(query_labels, rows), strict=True):
        near, where = nearest(F.normalize(part.to(bank.device).float(), dim=1), bank, min(max(ks), len(bank)))
        for k, votes in _votes(near, labels[where], tuple(found), temperature, classes):
            found[k].append(ranks(votes, truth))
    return {
        f"knn_{k}" if name == "top1" else f"knn_{k}_{name}": value
        for k, parts in found.items()
        for name, value in accuracy(torch.cat(parts), query_labels, classes).items()
    }


def _votes(near: Tensor, voters: Tensor, ks: Sequence[int], temperature: float, classes: int) -> Iterator[tuple[int, Tensor]]:
    """Votes [q, C] after the k nearest, for each k in ascending order. The tensor is reused: read it before the next."""
    # relative to the nearest neighbour: the same ranking at any temperature, without overflow
    weights = ((near - near[:, :1]) / temperature).exp()
    votes = near.new_zeros(len(near), classes)
    done = 0
    for k in ks:
        votes.scatter_add_(1, voters[:, done:k], weights[:, done:k])
        done = min(k, near.shape[1])
        yield k, votes


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` [N, D] for `queries` [q, D]: (similarity, position), each [q, k], nearest first.

    Equal similarities come in bank order, which topk alone does not promise.
    """
    similarity = queries @ bank.T  # [q, N]
    near, where = similarity.topk(min(k + 1, len(bank)), dim=1)
    if k < len(bank):  # topk may keep any of several equals at the edge: put the earliest there
        torn = (near[:, k - 1] == near[:, k]).nonzero().flatten()
        near, where = near[:, :k], where[:, :k].clone()
        for row in torn.tolist():
            sure = int((near[row] > near[row, -1]).sum())
            where[row, sure:] = (similarity[row] == near[row, -1]).nonzero().flatten()[: k - sure]
    where, order = where.sort(dim=1)
    near, order = near.gather(1, order).sort(dim=1, descending=True, stable=True)
    return near, where.gather(1, order)
