"""Spherical k-means over rows that are sharded over ranks; the same result for any number of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist

_CHUNK = 16384  # rows per block: bounds the [rows, K] similarity matrix


@torch.no_grad()
def spherical_kmeans(rows: Tensor, start: int, clusters: int, iterations: int, key: int) -> tuple[Tensor, Tensor]:
    """rows [n, D], this rank's, L2-normalised; all-zero rows are absent samples. `start`: index of rows[0] in the whole.

    Returns centroids [K, D] (normalised, equal on every rank) and assignments [n] int64 (-1 for absent rows). The centroids
    start at K distinct rows chosen by a hash of (key, sample index); an empty cluster keeps its centroid (DeepCluster v2).
    """
    present = rows.abs().sum(1) > 0
    total = int(dist.sum_nograd(present.sum()))
    if total < clusters:
        raise ValueError(f"k-means into {clusters} clusters needs as many samples; only {total} have an embedding")
    centroids = _seeds(rows, present, start, clusters, key)
    for _ in range(iterations):
        assigned = _assign(rows, present, centroids)
        sums = rows.new_zeros(clusters + 1, rows.shape[1]).double()
        sums.index_add_(0, assigned.where(present, clusters), rows.double())
        sums = dist.sum_nograd(sums)[:clusters]
        centroids = torch.where(sums.abs().sum(1, keepdim=True) > 0, F.normalize(sums, dim=1).to(rows.dtype), centroids)
    return centroids, _assign(rows, present, centroids)


def _seeds(rows: Tensor, present: Tensor, start: int, clusters: int, key: int) -> Tensor:
    """The rows with the smallest hashes, in the order of their hashes."""
    absent = torch.iinfo(torch.int64).max
    hashes = dist.hash64(key, "kmeans", start + torch.arange(len(rows), device=rows.device)).where(present, absent)
    local = hashes.sort().values[:clusters]
    local = F.pad(local, (0, clusters - len(local)), value=absent)
    chosen = dist.gather_nograd(local).sort().values[:clusters]
    place = torch.searchsorted(chosen, hashes).clamp_max(clusters - 1)
    own = (chosen[place] == hashes) & present
    seeds = rows.new_zeros(clusters, rows.shape[1])
    seeds[place[own]] = rows[own]
    return dist.sum_nograd(seeds)


def _assign(rows: Tensor, present: Tensor, centroids: Tensor) -> Tensor:
    if not len(rows):
        return present.long()
    nearest = torch.cat([(chunk @ centroids.T).argmax(1) for chunk in rows.split(_CHUNK)])
    return nearest.where(present, -1)
