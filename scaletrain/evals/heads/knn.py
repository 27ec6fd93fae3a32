"""Exact k-nearest-neighbour vote on frozen features (Wu et al., 2018, section 3.4; DINO's
eval_knn.py).

Cosine similarity; each neighbour votes for its class with weight exp(similarity / T).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities in memory at once: 128 MB of float32.
_ELEMENTS = 1 << 25
# Rows of the bank on the device at once, so that a bank of any size fits: 0.5 GB at width 2,048.
_BANK_ROWS = 1 << 16


def votes(near: Tensor, voters: Tensor, k: int, temperature: float, classes: int) -> Tensor:
    """Class scores [Q, C] float64 on the CPU by the vote of the k nearest.

    near: similarities [Q, K], nearest first. voters: classes [Q, K] in 0 .. classes - 1. A k above
    K means K. Of classes with equal votes the one whose neighbour is nearest has the higher score,
    so that no two with a vote have the same one. A class without a vote has score 0, all others
    more. The scores of a query whose similarities are not finite are not finite.
    """
    rows = max(1, _ELEMENTS // (4 * classes))
    pairs = zip(near[:, :k].split(rows), voters[:, :k].split(rows), strict=True)
    return torch.cat([_votes(*pair, temperature, classes).cpu() for pair in pairs])


def _votes(near: Tensor, voters: Tensor, temperature: float, classes: int) -> Tensor:
    # relative to the nearest neighbour: the same ranking at any temperature, without overflow
    weights = ((near - near[:, :1]) / temperature).exp()
    # Summed in float64 and rounded, so that the order of summation, which a GPU does not fix, and
    # the numbers of the classes do not show.
    sums = weights.new_zeros(len(near), classes, dtype=torch.float64)
    votes = sums.scatter_add_(1, voters, weights.double()).gather(1, voters).float().double()

    # In float64 there is room for the place of the nearest voter too, which no two classes have in
    # common: places change a vote by less than neighbours in float32 differ, and a vote that was
    # rounded to zero stays above none.
    place = torch.arange(near.shape[1], dtype=torch.float64, device=near.device)
    scores = (votes + 2.0**-200) * (1 - place * 2.0**-46)
    return torch.zeros_like(sums).scatter_reduce_(1, voters, scores, "amax")


def search(
    queries: Tensor, bank: Tensor, k: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of `bank` [N, D] of the highest cosine similarity to `queries` [Q, D]:
    (similarity, position), each [Q, min(k, N)], nearest first; equal similarities in bank order.

    device: computes; by default that of the bank, which is moved there in parts.
    """
    device, k = device or bank.device, min(k, len(bank))
    queries = F.normalize(queries.to(device).float(), dim=1)
    rows = max(1, _ELEMENTS // min(len(bank), _BANK_ROWS))
    found: list[tuple[Tensor, Tensor]] = []

    for begin in range(0, len(bank), _BANK_ROWS):
        part = F.normalize(bank[begin : begin + _BANK_ROWS].to(device).float(), dim=1)
        for number, some in enumerate(queries.split(rows)):
            near, where = nearest(some, part, min(k, len(part)))
            if not begin:
                found.append((near, where))
            else:
                found[number] = _merge(found[number], (near, where + begin), k)

    return torch.cat([near for near, _ in found]), torch.cat([where for _, where in found])


def _merge(
    one: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest of two lists, of which one has the smaller positions."""
    near, order = torch.cat((one[0], later[0]), 1).sort(dim=1, descending=True, stable=True)
    return near[:, :k], torch.cat((one[1], later[1]), 1).gather(1, order[:, :k])


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
