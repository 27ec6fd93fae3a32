"""Images turned by quarter turns."""

from __future__ import annotations

import torch
from torch import Tensor


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Each image of x [..., 3, H, W] turned anticlockwise by its number of quarter turns [...], 0
    to 3.
    """
    odd, half = ((turns & bit).bool()[..., None, None, None] for bit in (1, 2))
    x = torch.where(half, x.flip(-2, -1), x)

    return torch.where(odd, x.transpose(-2, -1).flip(-2), x)
