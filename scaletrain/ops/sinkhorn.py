"""Balanced soft assignment by the Sinkhorn-Knopp algorithm over the global batch (SwAV, section
3.1, eq. 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaletrain import dist
from scaletrain.ops.precision import full_precision


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float, iterations: int = 3) -> Tensor:
    """scores [n, K] of this rank's rows (equal n on every rank) -> assignments [n, K]; each row
    sums to 1.

    Rows are samples; over all ranks every prototype receives the same mass. Logarithms stay finite
    whatever the scores: the authors' exp(scores / epsilon) can overflow, and with the maximum taken
    off it can leave rows or prototypes of zeros.
    """
    log_q = scores / epsilon

    for _ in range(iterations):
        log_q = log_q - _log_mass(log_q)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)

    return log_q.exp()


def _log_mass(log_q: Tensor) -> Tensor:
    """[n, K] -> [K]: logarithm of each prototype's sum over the rows of all ranks."""
    top = dist.max_nograd(log_q.max(0).values)
    return top + dist.sum_nograd((log_q - top).exp().sum(0)).log()
