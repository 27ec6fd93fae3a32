"""Large views whose background is taken away (ReLICv2, Tomasev et al., 2022, arXiv 2201.05119,
appendix F).
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaletrain import rng
from scaletrain.core import Batch


def on_grey(batch: Batch, probability: float, minimum: float) -> tuple[Tensor, Tensor]:
    """batch.views[0] [L, B, 3, H, W], with the background replaced by one grey level where chance
    wants it; and where [L, B].

    Each view has a keyed draw and a grey level of its own. Views with a foreground below the share
    `minimum` stay as they are, and all do where the batch has no masks.
    """
    x = batch.views[0]

    if batch.masks is None or not probability:
        return x, x.new_zeros(x.shape[:2])

    draws = (
        rng.uniform(batch.keys, "saliency", 2 * len(x)).T.view(2, len(x), len(batch), 1, 1, 1).to(x)
    )
    # differs: in the paper the foreground must cover so much of the image.
    apply = (draws[0] < probability) & (batch.masks.mean((2, 3, 4), keepdim=True) >= minimum)
    black, white = batch.pixel_range.to(x).view(2, 3, 1, 1)
    grey = black + draws[1] * (white - black)  # [L, B, 3, 1, 1]

    return torch.where(apply & (batch.masks == 0), grey, x), apply.to(x)[:, :, 0, 0, 0]
