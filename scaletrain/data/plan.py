"""The order of samples: a pure, lazy function of (seed, epoch, step), the same for every number of ranks and workers.

Epoch: permute all shards; lay their N samples on a line; cut the line in C equal lanes (a cut may fall inside a shard);
inside a lane, shuffle within blocks of about `window` shards by a keyed bijection that answers any position in O(1).
Global batch t takes the next B/C samples of each lane. Nothing of the size of N is ever made.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from scaletrain import dist
from scaletrain.data.errors import DataError

Ints = NDArray[np.int64]
ROUNDS = 8  # of the Feistel network, half of them on each coordinate


class Plan:
    """`counts` [S]: samples of each shard in canonical order; a sample's number is its place in that order."""

    def __init__(self, counts: Ints, *, seed: int, batch: int, lanes: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.size, self.lanes, self.window = seed, batch, lanes, window
        self.samples = int(self.counts.sum())
        self._starts = np.cumsum(self.counts) - self.counts
        if batch % lanes:
            raise DataError(
                f"data.lanes={lanes} does not divide batch={batch}; set data.lanes to a divisor such as {divisor(batch, lanes)}"
            )
        if self.samples < batch:
            raise DataError(f"the data set has {self.samples} samples, fewer than batch={batch}; lower batch")
        self.steps_per_epoch = (self.samples // lanes) // (batch // lanes)
        self._line: tuple[int, Ints, Ints] | None = None

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """This rank's positions [lo, hi) of every global batch."""
        if self.size % world:
            above, fewer = -(-self.size // world) * world, divisor(self.size, world)
            raise DataError(f"{world} processes do not divide batch={self.size}; set batch={above} or use {fewer} processes")
        rows = self.size // world
        return rank * rows, (rank + 1) * rows

    def batch(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Ints:
        """Sample numbers at positions [lo, hi) of the epoch's global batch number `step` -> [hi - lo] int64."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        rows = self.size // self.lanes
        position = np.arange(lo, self.size if hi is None else hi, dtype=np.int64)
        lane, at = position // rows, step * rows + position % rows
        return self._canonical(epoch, self._shuffled(epoch, lane, at))

    def mixing(self) -> str:
        """How well a batch mixes and what that costs, for the start of a run."""
        shards = np.searchsorted(self._starts, self.batch(0, 0), "right")
        distinct, total = len(np.unique(shards)), len(self.counts)
        held = min(self.lanes * min(self.window, total), total)
        return (
            f"{self.samples:,} samples in {total:,} shards; a batch of {self.size:,} mixes {distinct:,} shards "
            f"over {self.lanes} lanes and keeps about {held:,} shards in use"
        )

    def _shuffled(self, epoch: int, lane: Ints, at: Ints) -> Ints:
        """Position `at` of a lane before the shuffle -> position on the epoch's line after it."""
        begin = lane * self.samples // self.lanes
        length = (lane + 1) * self.samples // self.lanes - begin
        # equal blocks and not blocks of fixed length, whose remainder would be shuffled among few samples
        blocks = np.maximum(1, np.rint(length * len(self.counts) / (self.window * self.samples))).astype(np.int64)
        block = ((at + 1) * blocks - 1) // length
        first = block * length // blocks
        size = (block + 1) * length // blocks - first
        start: Ints = begin + first
        return start + bijection(at - first, size, _hash(self.seed, "lane", epoch, lane, block))

    def _canonical(self, epoch: int, position: Ints) -> Ints:
        if self._line is None or self._line[0] != epoch:
            order = dist.permutation(len(self.counts), self.seed, "shards", epoch).numpy()
            self._line = epoch, order, np.cumsum(self.counts[order])
        _, order, ends = self._line
        slot = np.searchsorted(ends, position, "right")
        shard = order[slot]
        return position + (self._starts[shard] + self.counts[shard] - ends[slot])


def bijection(x: Ints, n: Ints, key: Ints) -> Ints:
    """A keyed permutation of {0..n-1} at x, elementwise [K], in O(1).

    Generalised Feistel network on a grid of a x b >= n cells, a = ceil(sqrt(n)), with cycle walking (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, section 5): results beyond n are sent through again.
    """
    a = np.ceil(np.sqrt(n)).astype(np.int64)
    b = -(-n // a)
    out = np.array(x, np.int64)
    todo = np.arange(len(out))
    while len(todo):
        out[todo] = _feistel(out[todo], a[todo], b[todo], key[todo])
        todo = todo[out[todo] >= n[todo]]
    return out


def _feistel(x: Ints, a: Ints, b: Ints, key: Ints) -> Ints:
    left, right = x % a, x // a
    for turn in range(0, ROUNDS, 2):
        left = (left + (_hash(key, turn, right) & _POSITIVE)) % a
        right = (right + (_hash(key, turn + 1, left) & _POSITIVE)) % b
    return left + a * right


_POSITIVE = (1 << 62) - 1  # leaves room for the addition


def _hash(*parts: int | str | Ints) -> Ints:
    return dist.hash64(*(torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in parts)).numpy()


def divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)
