"""The shards of a remote data set through the node's cache: fetched when read, and ahead of need.

The plan is a pure function, so every loader process knows which shards its rank reads next. Each
has one thread that walks along the coming steps and has their shards fetched, as far as the cache
reaches; processes that meet the same shard leave it to the first. The thread starts with the first
read, so after the fork that makes a loader process.
"""

from __future__ import annotations

import atexit
import copy
import hashlib
import io
import os
from collections import OrderedDict
from collections.abc import Iterator
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

# steps to look ahead at most: a small data set is known after a few
HORIZON = 1000
# seconds between notes that what was fetched ahead is still wanted
REFRESH = 5.0
# offset tables kept open
TABLES = 256
# of the cache that is filled ahead of need
SHARE = 0.9


class AccessOrder(Protocol):
    """What a rank reads. Called by one thread, on a copy of its own."""

    def samples(self, step: int) -> Ints:
        """Of a step. Raises IndexError behind the last."""
        ...


@dataclass
class EpochOrder:
    """Positions [lo, hi) of a plan's batches, epoch after epoch."""

    plan: Batches
    lo: int
    hi: int

    def samples(self, step: int) -> Ints:
        return self.plan.batch(*divmod(step, self.plan.steps_per_epoch), self.lo, self.hi)


@dataclass
class SequentialOrder:
    """The samples 0 .. stop - 1 in order, one a step."""

    stop: int

    def samples(self, step: int) -> Ints:
        if step >= self.stop:
            raise IndexError
        return np.array([step])


@dataclass
class FolderOrder:
    """The samples [lo, hi) of a course, numbered from 0: those of one folder of several."""

    order: AccessOrder
    lo: int
    hi: int

    def samples(self, step: int) -> Ints:
        found = self.order.samples(step)
        return found[(found >= self.lo) & (found < self.hi)] - self.lo


def manifest(place: ShardSelection) -> ShardManifest:
    """The shards of a remote folder, which must have been indexed before. Raises DataError."""
    url, origin = place.folder, remote.origin(place.folder)
    fix = (
        f"is {url} a folder of shards with its index? Make the index with shards/index.py "
        "before "
        "you upload it"
    )

    try:
        data = remote.read(origin, index.MANIFEST, MOST_BYTES)
    except remote.LostError as error:
        with suppress(remote.RemoteError):
            if version_in(remote.read(origin, OLD_NAME, MOST_BYTES)):
                fix = (
                    f"its {OLD_NAME} is the index of an older version: run shards/index.py on "
                    "the folder, and upload it again"
                )

        raise remote.RemoteError(f"{error}; {fix}") from None
    except remote.RemoteError as error:
        raise remote.RemoteError(f"{error}; {fix}") from None

    found = parse(io.BytesIO(data), f"{url}/{index.MANIFEST}", fix)
    return found.only(place.chosen(found.names)) if place.patterns else found


class CachedShards:
    """`place`: an address, or a local folder to be copied from. Safe to fork and to pickle."""

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
        """A file descriptor of the whole shard, which stays in the cache until it is closed. Raises
        DataError.
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
        facts = int(self.shards.samples[number]), int(self.shards.bytes[number])
        if isinstance(self.origin, remote.LocalOrigin):
            return offsets.load(index.table_path(Path(self.url(number))), *facts)

        key, size, fill = self._table(number)
        file = self.cache.open(key, size, fill)
        try:
            return offsets.load(self.cache.folder / key, *facts)
        except ShardError as error:
            # the next start asks for it again
            (self.cache.folder / key).unlink(missing_ok=True)
            raise ShardError(
                f"{self.url(number)}{offsets.SUFFIX}", error.offset, error.text
            ) from None
        finally:
            os.close(file)

    def numbers(self, samples: Ints) -> list[int]:
        """Of the shards that hold the samples."""
        found: list[int] = np.unique(np.searchsorted(self._starts, samples, "right") - 1).tolist()
        return found

    def fits(self, shards: int) -> None:
        """Raises DataError unless so many shards, as this node needs at once, fit in the cache, and
        the cache on its disk.
        """
        total = int(self.shards.bytes.sum())
        wanted = min(int(self.shards.bytes.mean() * shards), total)
        if wanted > self.options.bytes:
            raise DataError(
                f"this node keeps about {shards:,} shards in use, {wanted:,} bytes, and "
                "data.cache.bytes is "
                f"{self.options.bytes:,}: raise it (twice that lets it read ahead), or lower "
                "data.window or data.lanes"
            )

        self.cache.check(min(total, 2 * wanted))

    def expect(self, step: int, order: AccessOrder) -> None:
        """Read ahead from this step on."""
        if self._ahead is None or self._ahead[0] != os.getpid():
            self._ahead = os.getpid(), Prefetcher(self, copy.deepcopy(order), step)
            self._ahead[1].start()
        self._ahead[1].at(step)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._ahead is not None and self._ahead[0] == os.getpid():
            self._ahead[1].stop()
        self._ahead = None

    def budget(self) -> int:
        """Bytes that one rank of this node may have fetched for the steps to come."""
        return int(SHARE * self.options.bytes / dist.local_world())

    def fetch(self, number: int) -> None:
        """Have a shard and its table in the cache soon."""
        if not isinstance(self.origin, remote.LocalOrigin):
            self.cache.ensure(*self._table(number))
        self.cache.ensure(*self.shard(number))

    def shard(self, number: int) -> tuple[str, int, Fill]:
        """Its key in the cache, its bytes, and what writes it."""
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
    def __init__(self, staged: CachedShards, order: AccessOrder, step: int) -> None:
        super().__init__(name="scaletrain-read-ahead", daemon=True)
        self.staged, self.order, self.now = staged, order, step
        self._moved = Condition()
        # shard -> the last step seen that reads it
        self._wanted: dict[int, int] = {}
        self._refreshed = monotonic()
        self._stopped = False

        # a thread that is in torch's own code when Python ends would abort the process
        atexit.register(self.stop)

    def at(self, step: int) -> None:
        """The process reads this step at the moment."""
        with self._moved:
            self.now = step
            self._moved.notify()

    def stop(self) -> None:
        atexit.unregister(self.stop)
        with self._moved:
            self._stopped = True
            self._moved.notify()

        # where the collector of garbage runs in it
        if current_thread() is not self:
            # it may wait for the network, and then ends with the process
            self.join(1.0)

    def run(self) -> None:
        for step, shard in self._coming():
            while not self._stopped and shard not in self._wanted and not self._room(step, shard):
                self._pause()

            if step < self.now:
                # too late
                continue

            if shard not in self._wanted and not self._stopped:
                # whoever reads the shard tries again, and says what is wrong
                with suppress(DataError, OSError):
                    self.staged.fetch(shard)

            self._wanted[shard] = step

    def _coming(self) -> Iterator[tuple[int, int]]:
        """(step, shard) of the steps to come, some way ahead of the reading."""
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

            for shard in self.staged.numbers(samples):
                yield step, shard

            step += 1

    def _room(self, step: int, shard: int) -> bool:
        self._forget()
        sizes = self.staged.shards.bytes
        held = int(sizes[list(self._wanted)].sum())
        return step <= self.now or held + int(sizes[shard]) <= self.staged.budget()

    def _forget(self) -> None:
        """Shards that were read for the last time are the first to go, and those to be read
        stay.
        """
        done = [shard for shard, step in self._wanted.items() if step < self.now]

        for shard in done:
            del self._wanted[shard]
            self.staged.cache.mark(self.staged.shard(shard)[0], wanted=False)

        if monotonic() - self._refreshed > REFRESH:
            self._refreshed = monotonic()
            for shard in self._wanted:
                self.staged.cache.mark(self.staged.shard(shard)[0], wanted=True)

    def _pause(self) -> None:
        with self._moved:
            if not self._stopped:
                self._moved.wait(REFRESH)
        self._forget()


def _fill(origin: remote.Origin, name: str, size: int, sha256: str | None, file: Any) -> None:
    remote.download(origin, name, file, size, sha256)
