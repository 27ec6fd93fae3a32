"""Images inside tar archives, at any depth of tars in tars, read where they lie: nothing is
extracted.
"""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from scaletrain.data.errors import DataError
from scaletrain.data.format.tar import BLOCK, MEMBER_BYTES, NAME_BYTES, Reader
from scaletrain.importers.sources import digest, one
from scaletrain.importers.write import Entry
from scaletrain.runtime import local_files


class Place(NamedTuple):
    name: str
    # of the payload
    offset: int
    size: int


class _Headers(Reader):
    """Reads the headers only, from byte `start` to `stop`."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        super().__init__(path)
        self.at = start
        self.bytes = stop or self.bytes
        # of the member last met
        self.size = 0

    def _payload(self, file: BinaryIO, size: int, start: int, name: str, limit: int) -> bytes:
        # a long name, which is wanted
        if limit == NAME_BYTES:
            return super()._payload(file, size, start, name, limit)

        padded = -(-size // BLOCK) * BLOCK
        if self.at + padded > self.bytes:
            raise self._error(
                start,
                f"the payload of '{name}' ({size} bytes) runs past the end: truncated or damaged",
            )

        self.size = size
        self.at += padded
        file.seek(self.at)
        return b""

    def _end(self, file: BinaryIO, start: int) -> None:
        """What follows the first zero block belongs to the archive around this one."""


def members(path: Path, start: int = 0, stop: int = 0) -> Iterator[Place]:
    """The files of an archive, or of the one that lies at bytes start .. stop of it. Raises
    ShardError at the first fault.
    """
    headers = _Headers(path, start, stop)

    for member in headers:
        yield Place(member.name, member.offset, headers.size)


class TarFiles:
    """Images at known places of one archive, with their labels [N], -1 for none."""

    def __init__(
        self,
        archive: Path,
        places: Sequence[Place],
        labels: Sequence[int],
        classes: tuple[str, ...],
        ignored: Counter[str],
    ) -> None:
        self.archive, self.places, self.labels, self.classes, self.ignored = (
            archive,
            places,
            labels,
            classes,
            ignored,
        )
        self.labelled = bool(classes)
        self._file = local_files.open_file(archive)

        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, number: int) -> str:
        return f"{self.archive}, {self.places[number].name}"

    def load(self, number: int) -> Entry:
        name, offset, size = self.places[number]
        if size > MEMBER_BYTES:
            raise DataError(f"is larger than {MEMBER_BYTES} bytes")
        data = os.pread(self._file, size, offset)
        return Entry(str(Path(name).with_suffix("")), data, one(self.labels[number]))

    def digest(self) -> str:
        return digest(self.classes, self.labels, repr(self.places).encode())
