"""The samples that replace those that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from scaletrain import rng

# if half of all samples were bad, one in 10**19 would find no substitute
TRIES = 64


class Replaced(NamedTuple):
    """A draw of the plan that was replaced by another sample."""

    planned: int
    used: int
    # why, with shard and byte offset
    fault: str


def substitutes(
    seed: int, epoch: int, sample: int, repeat: int, span: tuple[int, int]
) -> Iterator[int]:
    """The samples in `span` [lo, hi) to try in place of one, in order: a function of the arguments,
    so the same on any rank and worker.
    """
    lo, hi = span
    bits = rng.hash64(seed, "substitute", epoch, sample, repeat, torch.arange(TRIES)) & (
        (1 << 62) - 1
    )

    yield from (lo + bits % (hi - lo)).tolist()
