"""Euclidean distances between the embeddings of the global batch, on the unit sphere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain import dist
from scaletrain.ops.precision import full_precision


@full_precision
def pair_distances(z: Tensor, *, squared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z [2, b, D], both views of this rank's samples -> positive [2, b], others [2, b, 2B], which
    of those count [b, 2B].

    `positive` is the distance to the own sample's other view, `others` that to every view of the
    global batch; those of the own sample do not count. Gradients flow to both ends, whoever owns
    them.
    """
    z = F.normalize(z, dim=-1)
    every = dist.gather(z.transpose(0, 1)).flatten(
        0, 1
    )  # [2B, D], the views of a sample next to each other

    sample = torch.arange(len(every), device=z.device) // 2
    own = dist.rank() * z.shape[1] + torch.arange(z.shape[1], device=z.device)
    positive = (z[0] - z[1]).square().sum(-1).expand(2, -1)
    others = (2 - 2 * z @ every.T).clamp_min(0)

    if not squared:
        positive, others = _root(positive), _root(others)

    return positive, others, own[:, None] != sample


def _root(x: Tensor) -> Tensor:
    """Equal embeddings stay where they are: the root has no gradient at zero."""
    return x.clamp_min(1e-12).sqrt()
