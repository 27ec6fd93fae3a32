"""K-means over rows that are sharded over ranks, spherical or plain; the same result for any number
of ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist, rng

# rows per block: bounds the [rows, K] similarity matrix
_CHUNK = 16384


@torch.no_grad()
def spherical_kmeans(
    rows: Tensor, start: int, clusters: int, iterations: int, key: int
) -> tuple[Tensor, Tensor]:
    """rows [n, D], this rank's, L2-normalised; all-zero rows are absent samples. `start`: index of
    rows[0] in the whole.

    Returns centroids [K, D] (normalised, equal on every rank) and assignments [n] int64 (-1 for
    absent rows). The centroids start at K distinct rows chosen by a hash of (key, sample index); an
    empty cluster keeps its centroid (DeepCluster v2).
    """
    return _lloyd(rows, start, clusters, iterations, key, spherical=True)


@torch.no_grad()
def kmeans(
    rows: Tensor, start: int, clusters: int, iterations: int, key: int, *, split: bool = False
) -> tuple[Tensor, Tensor]:
    """As spherical_kmeans, but centroids are plain means and the nearest one is that of the
    smallest distance.

    split: an empty cluster takes half of a large one (DeepCluster, section 3; faiss).
    """
    return _lloyd(rows, start, clusters, iterations, key, spherical=False, split=split)


def _lloyd(
    rows: Tensor,
    start: int,
    clusters: int,
    iterations: int,
    key: int,
    *,
    spherical: bool,
    split: bool = False,
) -> tuple[Tensor, Tensor]:
    present = rows.abs().sum(1) > 0
    total = int(dist.sum_nograd(present.sum()))
    if total < clusters:
        raise ValueError(
            f"k-means into {clusters} clusters needs as many samples; only {total} have an "
            "embedding"
        )

    centroids = _seeds(rows, present, start, clusters, key)
    for _ in range(iterations):
        sums, count = group_sums(rows, _assign(rows, present, centroids), clusters)
        new = F.normalize(sums, dim=1) if spherical else sums / count[:, None].clamp_min(1)
        kept = sums.abs().sum(1, keepdim=True) > 0 if spherical else count[:, None] > 0
        centroids = torch.where(kept, new.to(rows.dtype), centroids)

        if split:
            _split(centroids, count)

    return centroids, _assign(rows, present, centroids)


def _split(centroids: Tensor, count: Tensor) -> None:
    """Put the n empty clusters next to the n largest, both moved by 1 / 1024 to either side, as
    faiss does.

    differs: faiss draws the cluster to split with a chance that grows with its size; the largest
    need no chance.
    """
    order = count.argsort(descending=True, stable=True)
    n = min(int((count == 0).sum()), int((count > 0).sum()))
    large, empty = order[:n], order[len(order) - n :]

    tilt = 2.0**-10 * (1 - 2 * (torch.arange(centroids.shape[1], device=count.device) % 2)).to(
        centroids
    )
    centroids[empty], centroids[large] = (
        centroids[large] * (1 + tilt),
        centroids[large] * (1 - tilt),
    )


def group_sums(rows: Tensor, assigned: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [K, D] and sizes [K], float64, of the clusters over all ranks; assigned [n] int64, -1
    for rows of none.
    """
    table = rows.new_zeros(clusters + 1, rows.shape[1] + 1, dtype=torch.float64)
    table.index_add_(
        0, assigned.where(assigned >= 0, clusters), F.pad(rows.double(), (0, 1), value=1.0)
    )

    table = dist.sum_nograd(table)[:clusters]
    return table[:, :-1], table[:, -1]


def concentration(rows: Tensor, centroids: Tensor, assigned: Tensor, smoothing: float) -> Tensor:
    """phi [K] of the clusters (PCL, Li et al., 2021, arXiv 2005.04966, eq. 12), with a mean of 1.

    rows [n, D] of this rank, centroids [K, D], assigned [n] int64, -1 for rows of no cluster;
    smoothing: alpha.
    """
    distance = (rows - centroids[assigned.clamp_min(0)]).norm(dim=1, keepdim=True)
    sums, count = group_sums(distance, assigned, len(centroids))
    phi = sums[:, 0] / count.clamp_min(1) / (count + smoothing).log()

    # one sample tells no spread
    phi = phi.where(count > 1, phi.where(count > 1, 0).max())
    low, high = phi.quantile(torch.tensor([0.1, 0.9], dtype=phi.dtype, device=phi.device))
    phi = phi.clamp(low, high)

    # Rows that are all alike have no spread; and a tenth of the clusters could be such.
    return (phi / phi.mean().clamp_min(1e-12)).clamp_min(1e-3)


def _seeds(rows: Tensor, present: Tensor, start: int, clusters: int, key: int) -> Tensor:
    """The rows with the smallest hashes, in the order of their hashes."""
    absent = torch.iinfo(torch.int64).max
    hashes = rng.hash64(key, "kmeans", start + torch.arange(len(rows), device=rows.device)).where(
        present, absent
    )
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

    # |x - c|^2 / 2 without |x|^2 / 2; on the sphere all c weigh the same
    half = centroids.square().sum(1) / 2
    nearest = torch.cat([(chunk @ centroids.T - half).argmax(1) for chunk in rows.split(_CHUNK)])
    return nearest.where(present, -1)
