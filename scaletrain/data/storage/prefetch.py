"""Reads the shards of a remote data set through the node's cache, and prefetches them.

The order of samples is a pure function, so every loader process knows which shards its rank reads
next. Each process has one thread that walks through the coming steps and fetches their shards as
far as the cache has room; a shard that another process is fetching is left to that process. The
thread starts with the first read and thus after the fork that makes a loader process.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Thread, current_thread
from time import monotonic
from typing import Any, Protocol

import numpy as np

from scaletrain import dist
from scaletrain.config import schema
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import index, offsets
from scaletrain.data.format.manifest import MOST_BYTES, OLD_NAME, ShardManifest, parse, version_in
from scaletrain.data.format.selection import ShardSelection
from scaletrain.data.sampling.plan import Batches, Ints
from scaletrain.data.storage import remote
from scaletrain.data.storage.cache import Fill, NodeCache

# most steps to look ahead; after so many, all shards of a small data set are known
HORIZON = 1000
# seconds between two updates of the last use of prefetched shards
REFRESH = 5.0
# most offset tables in memory
TABLES = 256
# share of the cache that prefetching may fill
SHARE = 0.9


class AccessOrder(Protocol):
    """The samples that a rank reads in each step. Used by one thread, on a copy of its own."""

    def samples(self, step: int) -> Ints:
        """The samples of a step. Raises IndexError after the last step."""
        ...


@dataclass
class EpochOrder:
    """Positions [lo, hi) of the plan's batches, epoch after epoch."""

    plan: Batches
    lo: int
    hi: int

    def samples(self, step: int) -> Ints:
        return self.plan.batch(*divmod(step, self.plan.steps_per_epoch), self.lo, self.hi)


class RangeOrder:
    """The samples of the ranges [lo, hi), which ascend; a step is named by the number of its one
    sample, and steps between the ranges have none.
    """

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._starts, self._stops = np.array(ranges, np.int64).reshape(-1, 2).T

    def samples(self, step: int) -> Ints:
        after = int(self._stops.searchsorted(step, "right"))
        if after == len(self._stops):
            raise IndexError
        return np.array([step] if self._starts[after] <= step else [], np.int64)


@dataclass
class FolderOrder:
    """The samples [lo, hi) of another order, numbered from 0: those of one folder of several."""

    order: AccessOrder
    lo: int
    hi: int

    def samples(self, step: int) -> Ints:
        samples = self.order.samples(step)
        return samples[(samples >= self.lo) & (samples < self.hi)] - self.lo


@dataclass
class MatchedOrder:
    """The samples of another data set that match those of an order: `rows` [N], -1 where none
    does.
    """

    order: AccessOrder
    rows: Ints

    def __deepcopy__(self, memo: dict[int, Any]) -> MatchedOrder:
        # the rows are as many as the samples, and never change
        return MatchedOrder(copy.deepcopy(self.order, memo), self.rows)

    def samples(self, step: int) -> Ints:
        samples: Ints = self.rows[self.order.samples(step)]
        return samples[samples >= 0]


def manifest(place: ShardSelection) -> ShardManifest:
    """The shards of a remote folder, which must have been indexed before. Raises DataError."""
    url, origin = place.folder, remote.origin(place.folder)
    fix = (
        f"is {url} a folder of shards with its index? Make the index with scaletrain shards index "
        "before "
        "you upload it"
    )

    try:
        data = remote.read(origin, index.MANIFEST, MOST_BYTES)
    except remote.LostError as error:
        with suppress(remote.RemoteError):
            if version_in(remote.read(origin, OLD_NAME, MOST_BYTES)):
                fix = (
                    f"its {OLD_NAME} is the index of an older version: run scaletrain shards index "
                    "on "
                    "the folder, and upload it again"
                )

        raise remote.RemoteError(f"{error}; {fix}") from None
    except remote.RemoteError as error:
        raise remote.RemoteError(f"{error}; {fix}") from None

    shards = parse(io.BytesIO(data), f"{url}/{index.MANIFEST}", fix)
    return shards.only(place.chosen(shards.names)) if place.patterns else shards


class CachedShards:
    """The shards of `place`, an address or a local folder, read through the node's cache. Safe to
    fork and to pickle.
    """

    def __init__(self, place: str, options: schema.CacheConfig, shards: ShardManifest) -> None:
        self.origin, self.options, self.shards = remote.origin(place), options, shards
        self._starts = np.cumsum(shards.samples) - shards.samples
        self._mine: tuple[int, NodeCache] | None = None
        self._rows: OrderedDict[int, offsets.OffsetRows] = OrderedDict()
        self._ahead: tuple[int, Prefetcher] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mine": None, "_rows": OrderedDict(), "_ahead": None}

    @property
    def cache(self) -> NodeCache:
        if self._mine is None or self._mine[0] != os.getpid():
            self._mine = os.getpid(), NodeCache(self.options.path, self.options.bytes)
        return self._mine[1]

    def url(self, number: int) -> str:
        return f"{self.origin.url}/{self._name(number)}"

    def open(self, number: int) -> int:
        """A file descriptor of the whole shard, which stays in the cache until the descriptor is
        closed. Raises DataError.
        """
        return self.cache.open(*self.shard(number))

    def rows(self, number: int) -> offsets.OffsetRows:
        """The offset table of a shard. Raises DataError."""
        if number not in self._rows:
            if len(self._rows) >= TABLES:
                self._rows.popitem(last=False)
            self._rows[number] = self._loaded(number)

        self._rows.move_to_end(number)
        return self._rows[number]

    def _loaded(self, number: int) -> offsets.OffsetRows:
        expected = int(self.shards.samples[number]), int(self.shards.bytes[number])
        if isinstance(self.origin, remote.LocalOrigin):
            return offsets.load(index.table_path(Path(self.url(number))), *expected)

        key, size, fill = self._table(number)
        file = self.cache.open(key, size, fill)
        try:
            return offsets.load(self.cache.folder / key, *expected)
        except ShardError as error:
            # so that the next start fetches it again
            (self.cache.folder / key).unlink(missing_ok=True)
            raise ShardError(
                f"{self.url(number)}{offsets.SUFFIX}", error.offset, error.text
            ) from None
        finally:
            os.close(file)

    def numbers(self, samples: Ints) -> list[int]:
        """The numbers of the shards that contain the samples."""
        numbers: list[int] = np.unique(np.searchsorted(self._starts, samples, "right") - 1).tolist()
        return numbers

    def fits(self, shards: int) -> None:
        """Raise DataError unless the cache has room for `shards` shards, as many as this node uses
        at once, and its disk for the cache.
        """
        total = int(self.shards.bytes.sum())
        wanted = min(int(self.shards.bytes.mean() * shards), total)
        if wanted > self.options.bytes:
            raise DataError(
                f"this node keeps about {shards:,} shards in use, {wanted:,} bytes, and "
                f"data.cache.bytes is {self.options.bytes:,}: raise it (twice that allows "
                "prefetching), or lower data.window or data.lanes"
            )

        self.cache.check(min(total, 2 * wanted))

    def expect(self, step: int, order: AccessOrder) -> None:
        """Prefetch from this step on."""
        if self._ahead is None or self._ahead[0] != os.getpid():
            self._ahead = os.getpid(), Prefetcher(self, copy.deepcopy(order), step)
            self._ahead[1].start()
        self._ahead[1].at(step)

    def close(self) -> None:
        """Stop prefetching."""
        if self._ahead is not None and self._ahead[0] == os.getpid():
            self._ahead[1].stop()
        self._ahead = None

    def budget(self) -> int:
        """Bytes that one rank of this node may prefetch."""
        return int(SHARE * self.options.bytes / dist.local_world())

    def fetch(self, number: int) -> None:
        """Fetch a shard and its offset table into the cache, unless another process does."""
        if not isinstance(self.origin, remote.LocalOrigin):
            self.cache.ensure(*self._table(number))
        self.cache.ensure(*self.shard(number))

    def shard(self, number: int) -> tuple[str, int, Fill]:
        """The key of a shard in the cache, its bytes, and the function that writes it."""
        size = int(self.shards.bytes[number])
        return self._file(self._name(number), number, size, os.fsdecode(self.shards.sha256[number]))

    def _table(self, number: int) -> tuple[str, int, Fill]:
        size = offsets.HEAD.itemsize + int(self.shards.samples[number]) * offsets.ROW.itemsize
        return self._file(f"{self._name(number)}{offsets.SUFFIX}", number, size, None)

    def _file(self, name: str, number: int, size: int, sha256: str | None) -> tuple[str, int, Fill]:
        text = f"{self.origin.url}/{name}\n{size}\n{os.fsdecode(self.shards.sha256[number])}"
        fill = partial(_fill, self.origin, name, size, sha256)
        return hashlib.sha256(text.encode()).hexdigest(), size, fill

    def _name(self, number: int) -> str:
        return os.fsdecode(self.shards.names[number])


class Prefetcher(Thread):
    """The thread that fetches the shards of the coming steps into the cache."""

    def __init__(self, cached: CachedShards, order: AccessOrder, step: int) -> None:
        super().__init__(name="scaletrain-read-ahead", daemon=True)
        self.cached, self.order, self.now = cached, order, step
        self._moved = Condition()
        # shard -> the last step known to read it
        self._wanted: dict[int, int] = {}
        self._refreshed = monotonic()
        self._stopped = False

        # a thread inside of torch's C++ code when Python exits would abort the process
        atexit.register(self.stop)

    def at(self, step: int) -> None:
        """Say that the process now reads this step."""
        with self._moved:
            self.now = step
            self._moved.notify()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        with self._moved:
            self._stopped = True
            self._moved.notify()

        # garbage collection may call this in the thread itself
        if current_thread() is not self:
            # a thread that waits for the network ends with the process
            self.join(1.0)

    def run(self) -> None:
        for step, shard in self._coming():
            while not self._stopped and shard not in self._wanted and not self._room(step, shard):
                self._pause()

            if step < self.now:
                # too late
                continue

            if shard not in self._wanted and not self._stopped:
                # a failure is reported when the shard is read, which tries again
                with suppress(DataError, OSError):
                    self.cached.fetch(shard)

            self._wanted[shard] = step

    def _coming(self) -> Iterator[tuple[int, int]]:
        """(step, shard) of the coming steps, at most HORIZON ahead of the reading."""
        step = self.now
        while not self._stopped:
            if step > self.now + HORIZON:
                self._pause()
                continue

            step = max(step, self.now)
            try:
                samples = self.order.samples(step)
            except IndexError:
                return

            for shard in self.cached.numbers(samples):
                yield step, shard

            step += 1

    def _room(self, step: int, shard: int) -> bool:
        """Whether a shard of `step` may be fetched now."""
        self._forget()
        sizes = self.cached.shards.bytes
        fetched = int(sizes[list(self._wanted)].sum())
        return step <= self.now or fetched + int(sizes[shard]) <= self.cached.budget()

    def _forget(self) -> None:
        """Mark shards that were read for the last time as the first to be evicted, and those still
        to be read as the last.
        """
        done = [shard for shard, step in self._wanted.items() if step < self.now]

        for shard in done:
            del self._wanted[shard]
            self.cached.cache.mark(self.cached.shard(shard)[0], wanted=False)

        if monotonic() - self._refreshed > REFRESH:
            self._refreshed = monotonic()
            for shard in self._wanted:
                self.cached.cache.mark(self.cached.shard(shard)[0], wanted=True)

    def _pause(self) -> None:
        with self._moved:
            if not self._stopped:
                self._moved.wait(REFRESH)
        self._forget()


def _fill(origin: remote.Origin, name: str, size: int, sha256: str | None, file: Any) -> None:
    remote.download(origin, name, file, size, sha256)
