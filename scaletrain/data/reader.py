"""Random access to the samples of a folder of shards: one pread per member at the indexed offset, checked by crc32."""

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

from scaletrain.data import index, table
from scaletrain.data.errors import ShardError
from scaletrain.data.tar import BLOCK, MEMBER_BYTES, name_in

OPEN_SHARDS = 256  # two file descriptors each; the usual limit of a process is 1024


class Sample(NamedTuple):
    image: bytes
    label: int  # -1 where unknown
    mask: bytes | None


class Shards:
    """The samples of a folder, numbered in the manifest's order. Files open when first read; safe to fork and to pickle."""

    def __init__(self, folder: str | Path, notice: Callable[[str], None] = print) -> None:
        self._open: OrderedDict[int, tuple[int, table.Rows]] = OrderedDict()
        self.folder = Path(folder)
        shards = index.load(self.folder, notice)
        # arrays and not lists: workers that touch Python objects copy the parent's pages
        self._names: NDArray[np.bytes_] = np.array([s["name"].encode() for s in shards], np.bytes_)
        self._bytes = np.array([s["bytes"] for s in shards], np.int64)
        self.fingerprint = hashlib.sha256("".join(s["sha256"] for s in shards).encode()).hexdigest()  # of all bytes, in order
        self.counts: NDArray[np.int64] = np.array([s["samples"] for s in shards], np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def check(self) -> None:
        """Compare every shard's size with the manifest. Raises ShardError naming the first that differs."""
        for number in range(len(self._names)):
            self._check_size(number, self._path(number).stat().st_size)

    def read(self, sample: int, mask: bool = False) -> Sample:
        """Members of a sample. Raises ShardError naming shard, offset and key when the bytes are not those indexed."""
        number = self._number(sample)
        file, rows = self._shard(number)
        row = rows[sample - int(self._starts[number])].item()
        image = self._member(number, file, row[0:3])
        found = None
        if mask:
            if not row[7]:
                text = f"sample '{self._key(file, row[0])}' has no .mask.png member; add masks or set data.masks=false"
                raise ShardError(self._path(number), row[0], text)
            found = self._member(number, file, row[6:9])
        return Sample(image, row[9], found)

    def labels(self) -> NDArray[np.int64]:
        """Of all samples [N], -1 where unknown."""
        return np.concatenate([self._shard(number)[1]["label"] for number in range(len(self._names))])

    def fault(self, sample: int, text: object) -> ShardError:
        """An error about a sample, with its shard, offset and key."""
        number, offset, key = self._find(sample)
        return ShardError(self._path(number), offset, f"sample '{key}': {text}")

    def name(self, sample: int) -> str:
        """Where to find a sample in the folder, as SHARD.tar/KEY. Raises ShardError when its shard is not what was indexed."""
        number, _, key = self._find(sample)
        return f"{self._path(number).name}/{key}"

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        self.close()

    def _find(self, sample: int) -> tuple[int, int, str]:
        """Number of the shard, offset of the image in it, key."""
        number = self._number(sample)
        file, rows = self._shard(number)
        offset = int(rows[sample - int(self._starts[number])]["image"])
        return number, offset, self._key(file, offset)

    def _number(self, sample: int) -> int:
        return int(self._starts.searchsorted(sample, "right")) - 1

    def _path(self, number: int) -> Path:
        return self.folder / str(self._names[number], "utf-8")

    def _check_size(self, number: int, size: int) -> None:
        expected = int(self._bytes[number])
        if size != expected:
            text = f"the shard has {size} bytes and not the {expected} indexed: truncated or altered after indexing"
            raise ShardError(self._path(number), min(size, expected), f"{text}; run shards/index.py --force if meant")

    def _shard(self, number: int) -> tuple[int, table.Rows]:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        path = self._path(number)
        try:
            file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ShardError(path, 0, f"cannot be opened: {error.strerror}") from None
        try:
            self._check_size(number, os.fstat(file).st_size)
            rows = table.load(index.table_path(path), int(self.counts[number]), int(self._bytes[number]))
        except BaseException:
            os.close(file)
            raise
        if len(self._open) >= OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        self._open[number] = (file, rows)
        return file, rows

    def _member(self, number: int, file: int, place: tuple[int, int, int]) -> bytes:
        offset, size, crc = place
        if size > MEMBER_BYTES:
            raise ShardError(self._path(number), offset, f"a member of {size} bytes is above the limit of {MEMBER_BYTES}")
        try:
            data = os.pread(file, size, offset)
        except OSError as error:
            raise ShardError(self._path(number), offset, f"reading failed: {error.strerror}") from None
        if len(data) != size or zlib.crc32(data) != crc:
            text = f"the content of '{self._key(file, offset)}' is not what was indexed (crc32 differs): damaged or altered"
            raise ShardError(self._path(number), offset, f"{text}; run shards/verify.py {self.folder}")
        return data

    def _key(self, file: int, offset: int) -> str:
        """The key in the header before a payload, for error texts."""
        return table.split(name_in(os.pread(file, BLOCK, offset - BLOCK)))[0]
