"""Similarities and contrastive losses over the global batch. Inputs are this rank's rows; normalisation happens here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.ops.precision import full_precision


@full_precision
def cosine_distance(p: Tensor, z: Tensor) -> Tensor:
    """Mean over rows of |p/|p| - z/|z||^2 = 2 - 2 cos (BYOL, eq. 2). [b, D] x [b, D] -> 0-d."""
    return (2 - 2 * F.cosine_similarity(p, z, dim=-1, eps=1e-12)).mean()


@full_precision
def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """SimCLR's loss (Chen et al., 2020, eq. 1) over the global batch: the *sum* of both directions' means, as in its code.

    a, b [b, D]: two views of this rank's samples. Every row has one positive and 2B - 2 negatives.
    """
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    every_a, every_b = dist.gather(a), dist.gather(b)
    label = dist.rank() * len(a) + torch.arange(len(a), device=a.device)
    itself = F.one_hot(label, len(every_a)).bool()

    def direction(x: Tensor, other: Tensor, same: Tensor) -> Tensor:
        logits = torch.cat([x @ other.T, (x @ same.T).masked_fill(itself, float("-inf"))], 1) / temperature
        return F.cross_entropy(logits, label)

    return direction(a, every_b, every_a) + direction(b, every_a, every_b)
