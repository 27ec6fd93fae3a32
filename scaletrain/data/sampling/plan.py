"""The order of samples: a pure function of (seed, epoch, step), the same for every number of ranks
and workers.

An epoch permutes all shards, concatenates their N samples, divides the sequence into C equal parts,
the shuffle lanes (a boundary may fall inside a shard), and shuffles each lane within blocks of
about `window` shards, the shuffle window, by a keyed bijection that maps any position in O(1).
Global batch t takes the next B/C samples of each lane. No array of size N is ever allocated.

More lanes mix more shards in each batch; a larger window shuffles over more shards. Both keep more
shards in use at once. (MosaicML's streaming calls them canonical nodes and block size.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scaletrain import rng
from scaletrain.data.errors import DataError
from scaletrain.runtime.tables import plural

Ints = NDArray[np.int64]
# rounds of the Feistel network, half of them on each coordinate
ROUNDS = 8


class Draws(NamedTuple):
    """The samples in some rows of a batch. (epoch, sample, repeat) occurs once in a run; all
    randomness of a draw is derived from it.
    """

    samples: Ints  # [K] numbers in the data set
    repeats: Ints  # [K] passes through the sample's source that began after the epoch did


class Batches(ABC):
    """The order of global batches of `size` draws, numbered by epoch and step."""

    # whether an epoch draws every sample once, except for a remainder smaller than a batch
    whole: bool
    # samples of all sources
    samples: int
    steps_per_epoch: int

    def __init__(self, *, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    @abstractmethod
    def draws(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Draws:
        """Positions [lo, hi) of the epoch's global batch number `step`. Raises IndexError for a
        step outside the epoch.
        """

    def every(self) -> EverySample:
        """An order of all samples of all sources, without a remainder."""
        raise NotImplementedError(f"{type(self).__name__} has no order of all samples")

    @abstractmethod
    def in_use(self) -> tuple[int, int]:
        """Distinct shards of the first batch, and shards that all nodes together read from within
        the first windows.
        """

    @abstractmethod
    def _about(self) -> str:
        """What the batches are drawn from, in words."""

    def batch(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Ints:
        """The sample numbers of `draws`."""
        return self.draws(epoch, step, lo, hi).samples

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """This rank's positions [lo, hi) of every global batch."""
        if self.size % world:
            above, fewer = -(-self.size // world) * world, divisor(self.size, world)
            fitting = plural(fewer, "process")
            raise DataError(
                f"{world} processes do not divide batch={self.size}; set batch={above} or use "
                f"{fitting}"
            )

        rows = self.size // world
        return rank * rows, (rank + 1) * rows

    def mixing(self, shard_bytes: float = 0.0) -> str:
        """How well a batch mixes and the cache that this needs, in words. `shard_bytes`: mean size
        of a shard.
        """
        distinct, in_use = self.in_use()
        cache = f", {in_use * shard_bytes / 1e9:,.3g} GB over all nodes" if shard_bytes else ""

        return (
            f"{self._about()}; a batch of {self.size:,} mixes {plural(distinct, 'shard')} and "
            f"keeps {in_use:,} in use{cache}"
        )

    def _inside(self, step: int) -> None:
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")


class Order:
    """The order of one data set's samples in each pass through it. `counts` [S]: samples of each
    shard in canonical order.
    """

    def __init__(self, counts: Ints, *, seed: int, lanes: int, window: int) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.seed, self.lanes, self.window = seed, lanes, window
        self.samples = int(self.counts.sum())
        self._starts = np.cumsum(self.counts) - self.counts
        self._epoch_shards: tuple[int, Ints, Ints] | None = None

    def at(self, epoch: int, lane: Ints, at: Ints) -> Ints:
        """Numbers of the samples at positions `at` of lanes `lane`, [K] each -> [K]."""
        start, size, key = self._blocks(epoch, lane, at)
        return self._canonical(
            epoch, start + bijection(lane * self.samples // self.lanes + at - start, size, key)
        )

    def turn(self, place: Ints) -> tuple[Ints, Ints]:
        """Lane and position in it of each `place` [K] in 0 .. samples - 1, where the lanes take
        turns until all are used up.
        """
        rounds, rest = divmod(self.samples, self.lanes)
        lane, at = place % self.lanes, place // self.lanes

        # the lengths of lanes differ by at most one: the j-th turn of the last round is that of the
        # j-th of the longer lanes
        return np.where(at == rounds, -(-(lane + 1) * self.lanes // max(rest, 1)) - 1, lane), at

    def shards(self, samples: Ints) -> Ints:
        """Numbers of the shards that contain the samples."""
        return np.searchsorted(self._starts, samples, "right") - 1

    def in_use(self, epoch: int) -> int:
        """Number of shards from which the first blocks of all lanes read."""
        lane = np.arange(min(self.lanes, self.samples))
        lane = lane[(lane + 1) * self.samples // self.lanes > lane * self.samples // self.lanes]
        start, size, _ = self._blocks(epoch, lane, np.zeros_like(lane))
        _, ends = self._shards_of(epoch)
        first, last = (
            np.searchsorted(ends, start, "right"),
            np.searchsorted(ends, start + size - 1, "right"),
        )

        covered = np.zeros(len(ends) + 1, np.int64)
        np.add.at(covered, first, 1)
        np.add.at(covered, last + 1, -1)
        return int(np.count_nonzero((np.cumsum(covered)[:-1] > 0) & (np.diff(ends, prepend=0) > 0)))

    def _blocks(self, epoch: int, lane: Ints, at: Ints) -> tuple[Ints, Ints, Ints]:
        """The block around each position: its start in the epoch's sequence, its length,
        its key.
        """
        begin = lane * self.samples // self.lanes
        length = (lane + 1) * self.samples // self.lanes - begin
        # equal blocks: with blocks of a fixed length the remainder would be shuffled among few
        # samples
        blocks = np.maximum(
            1, np.rint(length * len(self.counts) / (self.window * self.samples))
        ).astype(np.int64)
        block = ((at + 1) * blocks - 1) // length
        first = block * length // blocks
        size = (block + 1) * length // blocks - first

        return begin + first, size, keyed(self.seed, "lane", epoch, lane, block)

    def _canonical(self, epoch: int, position: Ints) -> Ints:
        order, ends = self._shards_of(epoch)
        slot = np.searchsorted(ends, position, "right")
        shard = order[slot]
        return position + (self._starts[shard] + self.counts[shard] - ends[slot])

    def _shards_of(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's order of shards, and where each ends in the sequence of samples; the result
        for the last epoch is cached.
        """
        if self._epoch_shards is None or self._epoch_shards[0] != epoch:
            order = rng.permutation(len(self.counts), self.seed, "shards", epoch).numpy()
            self._epoch_shards = epoch, order, np.cumsum(self.counts[order])

        return self._epoch_shards[1:]


class Plan(Batches):
    """Epochs of one whole data set; a sample's number is its position in the canonical order of
    the shards.
    """

    whole = True

    def __init__(self, counts: Ints, *, seed: int, batch: int, lanes: int, window: int) -> None:
        super().__init__(seed=seed, size=batch)
        self.order = Order(counts, seed=seed, lanes=lanes, window=window)
        self.samples = self.order.samples
        if batch % lanes:
            raise DataError(
                f"data.lanes={lanes} does not divide batch={batch}; set data.lanes to a divisor "
                f"such as {divisor(batch, lanes)}"
            )
        if self.samples < batch:
            raise DataError(
                f"the data set has {plural(self.samples, 'sample')}, fewer than batch={batch}; "
                "lower batch"
            )

        self.steps_per_epoch = (self.samples // lanes) // (batch // lanes)

    def draws(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Draws:
        self._inside(step)
        rows = self.size // self.order.lanes
        position = np.arange(lo, self.size if hi is None else hi, dtype=np.int64)
        lane, at = position // rows, step * rows + position % rows
        return Draws(self.order.at(epoch, lane, at), np.zeros_like(position))

    def every(self) -> EverySample:
        return EverySample(self.order, self.size)

    def in_use(self) -> tuple[int, int]:
        return len(np.unique(self.order.shards(self.batch(0, 0)))), self.order.in_use(0)

    def _about(self) -> str:
        where = f"{plural(len(self.order.counts), 'shard')} over {plural(self.order.lanes, 'lane')}"
        return f"{plural(self.samples, 'sample')} in {where}"


class EverySample(Batches):
    """Every sample of an order once in each epoch; the last batch is filled up with the epoch's
    first samples.
    """

    whole = True

    def __init__(self, order: Order, batch: int) -> None:
        super().__init__(seed=order.seed, size=batch)
        self.order, self.samples = order, order.samples
        self.steps_per_epoch = -(-self.samples // batch)

    def draws(self, epoch: int, step: int, lo: int = 0, hi: int | None = None) -> Draws:
        self._inside(step)
        position = np.arange(lo, self.size if hi is None else hi, dtype=np.int64)
        place = (step * self.size + position) % self.samples
        return Draws(self.order.at(epoch, *self.order.turn(place)), np.zeros_like(position))

    def filling(self, step: int, lo: int, hi: int) -> int:
        """How many of the last rows of positions [lo, hi) fill the batch up."""
        return hi - min(max(self.samples - step * self.size, lo), hi)

    def every(self) -> EverySample:
        return self

    def in_use(self) -> tuple[int, int]:
        return len(np.unique(self.order.shards(self.batch(0, 0)))), self.order.in_use(0)

    def _about(self) -> str:
        return f"every one of {plural(self.samples, 'sample')}"


def bijection(x: Ints, n: Ints, key: Ints) -> Ints:
    """A keyed permutation of {0..n-1} at x, elementwise [K], in O(1).

    Generalised Feistel network on a grid of a x b >= n cells, a = ceil(sqrt(n)), with cycle walking
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, section 5): results
    outside of 0 .. n - 1 are mapped again.
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
        left = (left + (keyed(key, turn, right) & _POSITIVE)) % a
        right = (right + (keyed(key, turn + 1, left) & _POSITIVE)) % b
    return left + a * right


# leaves headroom for the addition
_POSITIVE = (1 << 62) - 1


def keyed(*parts: int | str | Ints) -> Ints:
    """rng.hash64 for numpy arrays."""
    return rng.hash64(
        *(torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in parts)
    ).numpy()


def divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return next(d for d in range(min(at_most, number), 0, -1) if number % d == 0)
