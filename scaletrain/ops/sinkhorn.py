"""Balanced soft assignment by the Sinkhorn-Knopp algorithm over the global batch (SwAV, section 3.1, eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.ops.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """scores [n, K] of this rank's rows (equal n on every rank) -> assignments [n, K]; each row sums to 1.

    Rows are samples; over all ranks every prototype receives the same mass. Dividing by the global maximum first changes
    nothing in exact arithmetic and keeps exp() finite.
    """
    rows, prototypes = scores.shape[0] * dist.world(), scores.shape[1]
    q = torch.exp((scores - dist.max_nograd(scores.max())) / epsilon)
    q /= dist.sum_nograd(q.sum())
    for _ in range(iterations):
        q /= dist.sum_nograd(q.sum(0)) * prototypes
        q /= q.sum(1, keepdim=True) * rows
    return q * rows
