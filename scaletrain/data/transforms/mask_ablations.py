"""Ablations of the masks as in ReLICv2 (Tomasev et al., 2022, arXiv 2201.05119, tables 19
and 20).
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from scaletrain import rng
from scaletrain.data.transforms.image import Pixels


def draws(keys: Tensor, kind: str) -> list[list[float]]:
    """Two random numbers for each key [B] of core.Batch; none without an ablation."""
    if not kind:
        return [[]] * len(keys)
    return rng.uniform(keys, "altered mask", 2).tolist()


def alter(mask: Pixels, kind: str, share: float, u: list[float]) -> Pixels:
    """Replace or change a mask [H, W] in {0, 1}.

    points, rectangle, centred: random points, or a rectangle at a random position or in the centre,
    that cover `share` of the image. add, remove: add or remove a rectangle in the centre whose area
    is `share` of the mask's. box: the mask's bounding box.
    """
    height, width = mask.shape

    if kind == "points":
        return (np.random.default_rng(int(u[0] * 2**24)).random(mask.shape) < share).astype(
            np.uint8
        )

    if kind == "box":
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        out = np.zeros_like(mask)
        if len(rows):
            out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
        return out

    area = share * (mask.mean() if kind in ("add", "remove") else 1.0)
    h, w = (round(side * math.sqrt(area)) for side in mask.shape)
    down, right = u if kind == "rectangle" else (0.5, 0.5)
    top, left = round(down * (height - h)), round(right * (width - w))
    out = np.copy(mask) if kind in ("add", "remove") else np.zeros_like(mask)
    out[top : top + h, left : left + w] = 0 if kind == "remove" else 1

    return out
