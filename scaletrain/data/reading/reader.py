"""Random access to the samples of a folder of shards: each member is read with one pread at its
indexed offset and checked by its crc32.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletrain.config.schema import CacheConfig
from scaletrain.data.errors import ShardError, unreadable
from scaletrain.data.format import index, offsets, selection
from scaletrain.data.format.names import is_remote
from scaletrain.data.format.tar import BLOCK, MEMBER_BYTES, header_fault, name_in
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.storage import prefetch
from scaletrain.data.storage.remote import LostError
from scaletrain.runtime import local_files

DEFAULT_CACHE = CacheConfig()
# two file descriptors each; the usual limit of a process is 1024
OPEN_SHARDS = 256


class StoredSample(NamedTuple):
    """The stored content of one sample."""

    image: bytes
    # -1 where unknown
    label: int
    # of the member with the mask; None if there is none or it is not wanted
    mask: bytes | None


class Shards:
    """The samples of a folder of shards, or of those of its shards that a pattern selects, numbered
    in the order of the manifest.

    `skip`: a bad sample or a lost remote shard raises only when that sample is read. Files are
    opened when first read, so that objects can be forked and pickled. Raises DataError, also for a
    folder with shards of several splits.
    """

    def __init__(
        self,
        shards: selection.Paths,
        notice: Callable[[str], None] = index.say,
        keep: int = OPEN_SHARDS,
        skip: bool = False,
        cache: CacheConfig = DEFAULT_CACHE,
    ) -> None:
        self._open: OrderedDict[int, tuple[int, offsets.OffsetRows]] = OrderedDict()
        self._cached: prefetch.CachedShards | None = None
        # most shards to keep open
        self._keep = keep
        # remote shards that cannot be fetched
        self._lost: dict[int, ShardError] = {}
        # a shard of the wrong size may still have good samples
        self._skip = skip
        place = selection.one_folder(shards)
        self.folder = Path(place.folder)
        remote = is_remote(place.folder)
        listed = prefetch.manifest(place) if remote else index.load(shards, notice, skip)

        if not place.patterns:
            selection.one_split(place.folder, listed.names)

        self.losses = (listed.loss(place.folder),)
        # arrays instead of lists, since workers that use Python objects copy the parent's pages
        self._names, self._bytes = (
            np.ascontiguousarray(listed.names),
            np.ascontiguousarray(listed.bytes),
        )
        self.counts = np.ascontiguousarray(listed.samples)
        # sha256 of each shard [S], and of all in order
        self.checksums: NDArray[np.bytes_] = np.ascontiguousarray(listed.sha256)
        self.fingerprint = hashlib.sha256(listed.sha256.tobytes()).hexdigest()
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))

        if remote or cache.stage:
            self._cached = prefetch.CachedShards(place.folder, cache, listed)

        if not remote:
            self._tables = index.home(self.folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self) -> None:
        """Compare the size of every shard with the manifest. Raises ShardError for the first that
        differs.
        """
        if self._cached is not None:
            # fetched shards are checked when they arrive
            return

        for number in range(len(self._names)):
            try:
                size = self._path(number).stat().st_size
            except OSError as error:
                raise unreadable(self._path(number), 0, error) from None
            self._check_size(number, size)

    def fits(self, shards: int) -> None:
        """Raise DataError if these shards are cached and the cache has no room for `shards` of
        them, as many as this node uses at once.
        """
        if self._cached is not None:
            self._cached.fits(shards)

    def expect(self, step: int, order: prefetch.AccessOrder) -> None:
        """If these shards are cached, prefetch those of this step and the next ones."""
        if self._cached is not None:
            self._cached.expect(step, order)

    def read(self, sample: int, mask: bool = False) -> StoredSample:
        """Read a sample. Raises ShardError with shard, offset and key if the bytes are not those
        that were indexed.
        """
        number = self._number(sample)
        file, rows = self._shard(number)
        row = rows[sample - int(self._starts[number])].item()
        image = self._member(number, file, row[0:3])
        mask_data = self._member(number, file, row[6:9]) if mask and row[7] else None
        return StoredSample(image, max(-1, row[9]), mask_data)

    @property
    def shard_bytes(self) -> float:
        """Mean size of a shard in bytes."""
        return float(self._bytes.mean())

    def span(self, sample: int) -> tuple[int, int]:
        """The samples [lo, hi) of the folder that contains `sample`."""
        return 0, len(self)

    def labels(self) -> Ints:
        """The labels of all samples [N], -1 where unknown."""
        labels: Ints = np.maximum(self._column("label"), offsets.NO_LABEL)
        return labels

    def key_hashes(self) -> NDArray[np.uint64]:
        """The offsets.key_hash of every sample's key [N]."""
        return self._column("key")

    def unlabelled(self, rows: Ints | None = None) -> str:
        """How many of the samples (or of those in `rows` [K]) have no label and an example, in
        words; "" if all have one.
        """
        labels = self._column("label")
        numbers = np.arange(len(labels)) if rows is None else rows
        lacking = numbers[labels[numbers] < 0]

        if not len(lacking):
            return ""

        text = f"{len(lacking):,} of {len(numbers):,} samples have no label, or several"
        odd = lacking[labels[lacking] == offsets.UNREADABLE]
        if not len(odd):
            return f"{text}, such as {self.name(int(lacking[0]))}"

        sample = int(odd[0])
        number = self._number(sample)
        file, table_rows = self._shard(number)
        label_data = self._member(
            number, file, table_rows[sample - int(self._starts[number])].item()[3:6]
        )

        return (
            f"{text}, or none that is a whole number, such as {self.name(sample)} with "
            f"{offsets.abbreviated(label_data)}"
        )

    def fault(self, sample: int, text: object) -> ShardError:
        """An error about a sample, with its shard, offset and key."""
        number, offset, key = self._find(sample)
        return ShardError(self._where(number), offset, f"sample '{key}': {text}")

    def name(self, sample: int) -> str:
        """Where a sample is stored in the folder: SHARD.tar/KEY. Raises ShardError if its shard is
        not the one that was indexed.
        """
        number, _, key = self._find(sample)
        return f"{self._path(number).name}/{key}"

    def close(self) -> None:
        self._release()
        if self._cached is not None:
            self._cached.close()

    def __del__(self) -> None:
        self.close()

    def _release(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _find(self, sample: int) -> tuple[int, int, str]:
        """The number of a sample's shard, the offset of its image in it, and its key."""
        number = self._number(sample)
        file, rows = self._shard(number)
        offset = int(rows[sample - int(self._starts[number])]["image"])
        return number, offset, self._key(file, offset)

    def _number(self, sample: int) -> int:
        return int(self._starts.searchsorted(sample, "right")) - 1

    def _column(self, name: str) -> NDArray[Any]:
        """A column of the offset tables, of all samples."""
        return np.concatenate([self._rows(number)[name] for number in range(len(self._names))])

    def _rows(self, number: int) -> offsets.OffsetRows:
        return self._shard(number)[1] if self._cached is None else self._cached.rows(number)

    def _where(self, number: int) -> str | Path:
        """The path or address of a shard, for messages."""
        return self._path(number) if self._cached is None else self._cached.url(number)

    def _path(self, number: int) -> Path:
        return self.folder / os.fsdecode(self._names[number])

    def _check_size(self, number: int, size: int) -> None:
        expected = int(self._bytes[number])
        if size != expected and not self._skip:
            text = (
                f"the shard has {size} bytes and not the {expected} indexed: truncated or "
                "altered after indexing"
            )
            raise ShardError(
                self._where(number),
                min(size, expected),
                f"{text}; run scaletrain shards index --force {self.folder} if meant",
            )

    def _shard(self, number: int) -> tuple[int, offsets.OffsetRows]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]

        if self._cached is not None:
            return self._fetched(self._cached, number)

        path = self._path(number)
        try:
            file = local_files.open_file(path)
        except OSError as error:
            raise unreadable(path, 0, error) from None

        try:
            self._check_size(number, os.fstat(file).st_size)
            rows = offsets.load(
                self._tables / (path.name + offsets.SUFFIX),
                int(self.counts[number]),
                int(self._bytes[number]),
            )
        except BaseException:
            os.close(file)
            raise

        if len(self._open) >= self._keep:
            os.close(self._open.popitem(last=False)[1][0])

        self._open[number] = (file, rows)
        return file, rows

    def _fetched(
        self, cached: prefetch.CachedShards, number: int
    ) -> tuple[int, offsets.OffsetRows]:
        # keep one shard open, since an open shard cannot be evicted from the cache
        self._release()
        if number in self._lost:
            raise self._lost[number]

        try:
            self._open[number] = cached.open(number), cached.rows(number)
        except LostError as error:
            if not self._skip:
                raise
            # remembered, since a minute of tries for each of its samples would take too long
            self._lost[number] = ShardError(cached.url(number), 0, str(error))
            raise self._lost[number] from None

        return self._open[number]

    def _member(self, number: int, file: int, place: tuple[int, int, int]) -> bytes:
        offset, size, crc = place
        if size > MEMBER_BYTES:
            raise ShardError(
                self._where(number),
                offset,
                f"a member of {size} bytes is above the limit of {MEMBER_BYTES}",
            )

        if not BLOCK <= offset <= int(self._bytes[number]) - size:
            text = (
                f"the index places {size} bytes there, outside the shard; run scaletrain shards "
                "index "
                f"--force {self.folder}"
            )
            raise ShardError(self._where(number), offset, text)

        try:
            # read with its header, so that damage to the header is detected too
            block = os.pread(file, BLOCK + size, offset - BLOCK)
        except OSError as error:
            raise unreadable(self._where(number), offset, error) from None

        header, data = block[:BLOCK], block[BLOCK:]
        if not header:
            fault = "the shard ends before this sample"
        elif len(data) != size:
            fault = f"the shard ends after {len(data)} of {size} bytes of '{key_in(header)}'"
        elif zlib.crc32(data) != crc:
            fault = f"the content of '{key_in(header)}' is not what was indexed (crc32 differs)"
        elif wrong := header_fault(header):
            offset, fault = offset - BLOCK, f"{wrong} before the content of '{key_in(header)}'"
        else:
            return data

        text = f"{fault}: damaged or altered; run scaletrain shards verify {self.folder}"
        raise ShardError(self._where(number), offset, text)

    def _key(self, file: int, offset: int) -> str:
        """The key in the header before a payload, for error texts."""
        return key_in(os.pread(file, BLOCK, max(0, offset - BLOCK)))


def key_in(header: bytes) -> str:
    """The key of the sample to which the member with this tar header belongs."""
    return offsets.key_of(name_in(header))
