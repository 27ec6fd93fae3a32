"""The cluster of each sample of the data set, and the statistics of a clustering to be logged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.nn.bank import Bank


class Assignments(Bank):
    """One column per clustering: the sample's cluster, -1 for none. [samples, len(clusters)] int64,
    sharded as a Bank is.
    """

    nmi: Tensor
    largest: Tensor
    empty: Tensor

    def __init__(self, samples: int, clusters: Sequence[int]) -> None:
        """clusters: how many each clustering has."""
        super().__init__(samples, len(clusters), fill=-1, dtype=torch.int64)
        self.clusters = tuple(clusters)
        # of this and the last epoch's clusters (DeepCluster, 4.1)
        self.register_buffer("nmi", torch.zeros(len(clusters)))
        # share of the samples in the largest cluster
        self.register_buffer("largest", torch.zeros(len(clusters)))
        # share of the clusters without a sample
        self.register_buffer("empty", torch.zeros(len(clusters)))

    @torch.no_grad()
    def renew(self, head: int, labels: Tensor) -> Tensor:
        """Set one clustering to this rank's `labels` [n], at each epoch. All ranks call it
        together; returns its sizes [K].
        """
        old, clusters = self.rows[:, head], self.clusters[head]
        self.nmi[head] = nmi(old, labels, -(-self.samples // dist.world()), clusters)
        old.copy_(labels)

        sizes = dist.sum_nograd(torch.bincount(labels[labels >= 0], minlength=clusters))
        self.largest[head] = sizes.max() / sizes.sum().clamp_min(1)
        self.empty[head] = (sizes == 0).float().mean()
        return sizes

    def scalars(self) -> dict[str, Tensor]:
        """Statistics to log, means over the clusterings."""
        return {
            "nmi": self.nmi.mean(),
            "largest_cluster": self.largest.mean(),
            "empty_clusters": self.empty.mean(),
        }


def nmi(a: Tensor, b: Tensor, rows: int, classes: int) -> Tensor:
    """Mutual information over sqrt(H(a) H(b)) of two labellings, -1 for none; [n] each, n <= `rows`
    on every rank. 0-d.
    """
    pair = torch.where((a >= 0) & (b >= 0), a * classes + b, -1)
    pair, count = dist.gather_nograd(F.pad(pair, (0, rows - len(pair)), value=-1)).unique(
        return_counts=True
    )
    p = count.double() * (pair >= 0)
    p = p / p.sum().clamp_min(1)

    a, b = pair.clamp_min(0) // classes, pair.clamp_min(0) % classes
    joint = torch.special.entr(p).sum()
    h1, h2 = (
        torch.special.entr(p.new_zeros(classes).index_add(0, label, p)).sum() for label in (a, b)
    )
    result: Tensor = (h1 + h2 - joint) / (h1 * h2).sqrt().clamp_min(torch.finfo(p.dtype).tiny)

    return result
