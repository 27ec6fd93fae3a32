"""Weighted k-nearest-neighbour vote on frozen features (Wu et al., 2018, section 3.4; DINO's
eval_knn.py).

Cosine similarity, each neighbour votes for its class with weight exp(similarity / T). Bank and
queries both go through the test transform.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from torch import Tensor

from scaletrain.config.schema import Frozen
from scaletrain.evals.context import EvalContext
from scaletrain.evals.features import some
from scaletrain.evals.scores import accuracy

# Similarities in memory at once: 128 MB of float32.
_ELEMENTS = 1 << 25


class Config(Frozen):
    ks: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], AfterValidator(some)] = (
        10,
        20,
        100,
        200,
    )
    temperature: Annotated[float, Field(ge=1e-6)] = 0.07
    """Lower ones would divide the rounding of the similarities by zero."""


def measure(config: Config, context: EvalContext) -> tuple[dict[str, float], dict[str, Any]]:
    """Run the benchmark: metrics in per cent, and the protocol for the result."""
    bank, queries = context.bank(), context.queries()
    metrics = knn(bank.x, bank.labels, queries.x, queries.labels, config.ks, config.temperature)
    return metrics, {
        **config.model_dump(mode="json"),
        "similarity": "cosine",
        "vote": "exp(similarity / temperature)",
    }


def knn(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Sequence[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
) -> dict[str, float]:
    """Accuracy in per cent of the vote of the k nearest of `features` [N, D], labelled [N], on
    `queries` [Q, D], labelled [Q].

    Returns knn_K, knn_K_per_class and, from five classes on, knn_K_top5 for every K of `ks`, all
    from one search. A K above N means N. Between neighbours of equal similarity the earlier in the
    bank is nearer; between classes of equal vote the one whose neighbour is nearest wins. A class
    without a vote is not predicted at any depth. Labels are any integers. Raises ValueError on a
    query label that the bank does not have.
    """
    bank = F.normalize(features.float(), dim=1)

    known, labels = labels.to(bank.device).unique(return_inverse=True)
    classes, query_labels = len(known), query_labels.to(bank.device)
    numbered = torch.searchsorted(known, query_labels).clamp(max=classes - 1)
    if len(strange := query_labels[known[numbered] != query_labels]):
        raise ValueError(
            f"a query has label {int(strange[0])}, which no sample of the bank has: not one data "
            "set"
        )

    found: dict[int, list[Tensor]] = {k: [] for k in sorted(set(ks))}
    rows = max(1, _ELEMENTS // len(bank))
    for part, truth in zip(torch.split(queries, rows), torch.split(numbered, rows), strict=True):
        near, where = nearest(
            F.normalize(part.to(bank.device).float(), dim=1), bank, min(max(ks), len(bank))
        )
        for k, rank in _ranks(near, labels[where], truth, tuple(found), temperature, classes):
            found[k].append(rank)

    return {
        f"knn_{k}" if name == "top1" else f"knn_{k}_{name}": value
        for k, parts in found.items()
        for name, value in accuracy(torch.cat(parts), numbered, classes).items()
    }


def _ranks(
    near: Tensor, voters: Tensor, truth: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> Iterator[tuple[int, Tensor]]:
    """How many classes the vote of the k nearest places before the true one, [q], for each k in
    ascending order.

    That is `classes` where the true class has no vote or a similarity is not finite.
    """
    # relative to the nearest neighbour: the same ranking at any temperature, without overflow
    weights = ((near - near[:, :1]) / temperature).exp()
    votes = near.new_zeros(len(near), classes)
    # where the nearest voter of a class stands; no two classes have it in common, so it settles
    # every tie of votes
    place = torch.arange(near.shape[1], dtype=torch.int32, device=near.device).expand_as(voters)
    first = torch.full(votes.shape, near.shape[1], dtype=torch.int32, device=near.device)

    first.scatter_reduce_(1, voters, place, "amin")
    own = truth.unsqueeze(1)
    own_first = first.gather(1, own)  # [q, 1]
    done = 0

    for k in ks:
        votes.scatter_add_(1, voters[:, done:k], weights[:, done:k])
        done = min(k, near.shape[1])
        own_votes = votes.gather(1, own)
        before = (votes > own_votes) | ((votes == own_votes) & (first < own_first))
        silent = (own_first >= done).squeeze(1) | ~votes.isfinite().all(1)
        yield k, (before & (first < done)).sum(1).masked_fill(silent, classes)


def nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar rows of `bank` [N, D] for `queries` [q, D]: (similarity, position), each
    [q, k], nearest first.

    Equal similarities come in bank order, which topk alone does not promise.
    """
    similarity = queries @ bank.T  # [q, N]
    near, where = similarity.topk(min(k + 1, len(bank)), dim=1)

    # topk may keep any of several equals at the edge: put the earliest there
    if k < len(bank):
        torn = (near[:, k - 1] == near[:, k]).nonzero().flatten()
        near, where = near[:, :k], where[:, :k].clone()
        for row in torn.tolist():
            sure = int((near[row] > near[row, -1]).sum())
            where[row, sure:] = (similarity[row] == near[row, -1]).nonzero().flatten()[: k - sure]

    where, order = where.sort(dim=1)
    near, order = near.gather(1, order).sort(dim=1, descending=True, stable=True)
    return near, where.gather(1, order)
