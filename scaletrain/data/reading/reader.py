"""Random access to the samples of a folder of shards: one pread per member at the indexed offset,
checked by crc32.
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


class Sample(NamedTuple):
    image: bytes
    # -1 where unknown
    label: int
    mask: bytes | None


class Shards:
    """The samples of a folder, or of the shards that a pattern chooses of it, numbered in the
    manifest's order.

    Files open when first read; safe to fork and to pickle. Raises DataError, also for a folder with
    shards of several splits.
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
        self._staged: prefetch.CachedShards | None = None
        # shards held open
        self._keep = keep
        # remote shards that are not to be had
        self._lost: dict[int, ShardError] = {}
        # one bad sample does not condemn its shard
        self._skip = skip
        place = selection.one_folder(shards)
        self.folder = Path(place.folder)
        remote = is_remote(place.folder)
        listed = prefetch.manifest(place) if remote else index.load(shards, notice, skip)

        if not place.patterns:
            selection.one_split(place.folder, listed.names)

        self.losses = (listed.loss(place.folder),)
        # arrays and not lists: workers that touch Python objects copy the parent's pages
        self._names, self._bytes = (
            np.ascontiguousarray(listed.names),
            np.ascontiguousarray(listed.bytes),
        )
        self.counts = np.ascontiguousarray(listed.samples)
        # of all bytes, in order
        self.fingerprint = hashlib.sha256(listed.sha256.tobytes()).hexdigest()
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))

        if remote or cache.stage:
            self._staged = prefetch.CachedShards(place.folder, cache, listed)

        if not remote:
            self._tables = index.home(self.folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self) -> None:
        """Compare every shard's size with the manifest. Raises ShardError naming the first that
        differs.
        """
        if self._staged is not None:
            # what is fetched is checked when it comes
            return

        for number in range(len(self._names)):
            try:
                size = self._path(number).stat().st_size
            except OSError as error:
                raise unreadable(self._path(number), 0, error) from None
            self._check_size(number, size)

    def fits(self, shards: int) -> None:
        """Raises DataError unless the cache, if these are fetched into it, holds the shards that
        this node uses at once.
        """
        if self._staged is not None:
            self._staged.fits(shards)

    def expect(self, step: int, order: prefetch.AccessOrder) -> None:
        """Shards that are fetched into the cache: those of this step and the next are
        needed soon.
        """
        if self._staged is not None:
            self._staged.expect(step, order)

    def read(self, sample: int, mask: bool = False) -> Sample:
        """Members of a sample. Raises ShardError naming shard, offset and key when the bytes are
        not those indexed.
        """
        number = self._number(sample)
        file, rows = self._shard(number)
        row = rows[sample - int(self._starts[number])].item()
        image = self._member(number, file, row[0:3])
        found = None

        if mask:
            if not row[7]:
                text = (
                    f"sample '{self._key(file, row[0])}' has no .mask.png member; add masks or "
                    "set data.masks=false"
                )
                raise ShardError(self._where(number), row[0], text)

            found = self._member(number, file, row[6:9])

        return Sample(image, max(-1, row[9]), found)

    @property
    def shard_bytes(self) -> float:
        """Mean size of a shard."""
        return float(self._bytes.mean())

    def span(self, sample: int) -> tuple[int, int]:
        """The samples [lo, hi) of the folder that holds it."""
        return 0, len(self)

    def labels(self) -> NDArray[np.int64]:
        """Of all samples [N], -1 where unknown."""
        return np.maximum(self._labels(), offsets.NO_LABEL)

    def unlabelled(self, rows: Ints | None = None) -> str:
        """In words, how many of the samples (or of those at `rows` [K]) have no label, and one of
        them; "" if all have one.
        """
        labels = self._labels()
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
        found = self._member(
            number, file, table_rows[sample - int(self._starts[number])].item()[3:6]
        )

        return (
            f"{text}, or none that is a whole number, such as {self.name(sample)} with "
            f"{offsets.shown(found)}"
        )

    def fault(self, sample: int, text: object) -> ShardError:
        """An error about a sample, with its shard, offset and key."""
        number, offset, key = self._find(sample)
        return ShardError(self._where(number), offset, f"sample '{key}': {text}")

    def name(self, sample: int) -> str:
        """Where to find a sample in the folder, as SHARD.tar/KEY. Raises ShardError when its shard
        is not what was indexed.
        """
        number, _, key = self._find(sample)
        return f"{self._path(number).name}/{key}"

    def close(self) -> None:
        self._release()
        if self._staged is not None:
            self._staged.close()

    def __del__(self) -> None:
        self.close()

    def _release(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _find(self, sample: int) -> tuple[int, int, str]:
        """Number of the shard, offset of the image in it, key."""
        number = self._number(sample)
        file, rows = self._shard(number)
        offset = int(rows[sample - int(self._starts[number])]["image"])
        return number, offset, self._key(file, offset)

    def _number(self, sample: int) -> int:
        return int(self._starts.searchsorted(sample, "right")) - 1

    def _labels(self) -> Ints:
        """As in the offset tables."""
        return np.concatenate([self._rows(number)["label"] for number in range(len(self._names))])

    def _rows(self, number: int) -> offsets.OffsetRows:
        return self._shard(number)[1] if self._staged is None else self._staged.rows(number)

    def _where(self, number: int) -> str | Path:
        """For people."""
        return self._path(number) if self._staged is None else self._staged.url(number)

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
                f"{text}; run shards/index.py --force {self.folder} if meant",
            )

    def _shard(self, number: int) -> tuple[int, offsets.OffsetRows]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]

        if self._staged is not None:
            return self._fetched(self._staged, number)

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

    def _fetched(self, held: prefetch.CachedShards, number: int) -> tuple[int, offsets.OffsetRows]:
        # one at a time: what is open stays in the cache
        self._release()
        if number in self._lost:
            raise self._lost[number]

        try:
            self._open[number] = held.open(number), held.rows(number)
        except LostError as error:
            if not self._skip:
                raise
            # remembered, as a minute of tries for each of its samples would be too long
            self._lost[number] = ShardError(held.url(number), 0, str(error))
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
                f"the index places {size} bytes there, outside the shard; run shards/index.py "
                f"--force {self.folder}"
            )
            raise ShardError(self._where(number), offset, text)

        try:
            # with its header, so that damage there is seen too
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

        text = f"{fault}: damaged or altered; run shards/verify.py {self.folder}"
        raise ShardError(self._where(number), offset, text)

    def _key(self, file: int, offset: int) -> str:
        """The key in the header before a payload, for error texts."""
        return key_in(os.pread(file, BLOCK, max(0, offset - BLOCK)))


def key_in(header: bytes) -> str:
    return offsets.key_of(name_in(header))
