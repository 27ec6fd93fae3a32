"""Crops that hold foreground, for a study of false positives (Addepalli et al., 2022, arXiv
2210.09866).

differs: the sources at hand do not say what the authors' good crops are; here the sample's mask
decides.
"""

from __future__ import annotations

from torch import Tensor

from scaletrain import rng
from scaletrain.config.schema import View
from scaletrain.data.transforms.image import Pixels
from scaletrain.data.transforms.params import TRIES, Box, random_box

# crops to try in place of one that holds too little
CANDIDATES = 10
# of one box
NUMBERS = 2 * TRIES + 2
CandidateDraws = list[list[list[float]]]  # [views, CANDIDATES, NUMBERS]


def draws(keys: Tensor, views: int, share: float) -> list[CandidateDraws]:
    """[B], numbers for the samples whose crops are to be good, nothing for the others; a function
    of core.Batch's keys.
    """
    if not share:
        return [[]] * len(keys)

    chosen = (rng.uniform(keys, "good", 1)[:, 0] < share).tolist()
    numbers = rng.uniform(keys, "good crops", views * CANDIDATES * NUMBERS).view(
        len(keys), views, CANDIDATES, NUMBERS
    )
    return [rows.tolist() if good else [] for rows, good in zip(numbers, chosen, strict=True)]


def box(spec: View, first: Box, numbers: list[list[float]], mask: Pixels, cover: float) -> Box:
    """`first` or the first of the candidates that holds the share `cover` of the foreground; else
    the one that holds most.

    mask [H, W] in {0, 1}; without foreground it is `first`.
    """
    height, width = mask.shape
    wanted, best, most = cover * int(mask.sum()), first, -1

    for u in [None, *numbers]:
        found = (
            first if u is None else random_box(spec, u[: 2 * TRIES], u[-2], u[-1], height, width)
        )
        top, left, h, w = found
        held = int(mask[top : top + h, left : left + w].sum())

        if held > most:
            best, most = found, held

        if most >= wanted:
            break

    return best
