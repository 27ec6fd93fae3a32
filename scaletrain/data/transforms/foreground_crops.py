"""Crops that contain foreground, for a study of false positives (Addepalli et al., 2022, arXiv
2210.09866).

differs: the available sources do not define the authors' good crops; here the sample's mask
decides.
"""

from __future__ import annotations

from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import View
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import TRIES, Box, random_box

# crops to try in place of one that contains too little foreground
CANDIDATES = 10
# random numbers of one box
NUMBERS = 2 * TRIES + 2
# [views, CANDIDATES, NUMBERS]
CandidateDraws = list[list[list[float]]]


def draws(keys: Tensor, views: int, share: float) -> list[CandidateDraws]:
    """The random numbers of each sample [B], a function of the keys [B] of core.Batch: those of its
    candidates for a `share` of the samples, empty for the others.
    """
    if not share:
        return [[]] * len(keys)

    chosen = (rng.uniform(keys, "good", 1)[:, 0] < share).tolist()
    numbers = rng.uniform(keys, "good crops", views * CANDIDATES * NUMBERS).view(
        len(keys), views, CANDIDATES, NUMBERS
    )
    return [rows.tolist() if good else [] for rows, good in zip(numbers, chosen, strict=True)]


def box(spec: View, first: Box, numbers: list[list[float]], mask: Pixels, cover: float) -> Box:
    """`first`, or the first candidate that contains the share `cover` of the foreground; if there
    is none, the one that contains most.

    mask [H, W] in {0, 1}; without any foreground the result is `first`.
    """
    height, width = mask.shape
    wanted, best, most = cover * int(mask.sum()), first, -1

    for u in [None, *numbers]:
        candidate = (
            first if u is None else random_box(spec, u[: 2 * TRIES], u[-2], u[-1], height, width)
        )
        top, left, h, w = candidate
        inside = int(mask[max(top, 0) : top + h, max(left, 0) : left + w].sum())

        if inside > most:
            best, most = candidate, inside

        if most >= wanted:
            break

    return best
