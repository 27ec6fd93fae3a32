"""Reads tar archives with a parser of its own, since Python's `tarfile` treats a damaged header as
the end of the archive.

The parser knows ustar headers, GNU long names and pax paths. It refuses links, devices, absolute
names and names with `..`, and never writes to disk. Format: POSIX.1-1988 ustar, POSIX.1-2001 pax,
GNU tar manual "Basic Tar Format".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from scaletrain.data.errors import ArchiveError, unreadable
from scaletrain.runtime import local_files

BLOCK = 512
# most bytes of one member, which also bounds the memory for reading it
MEMBER_BYTES = 64 << 20
# most bytes of a long name or a pax record
NAME_BYTES = 1 << 16
_REFUSED = {
    "1": "a hard link",
    "2": "a symbolic link",
    "3": "a device",
    "4": "a device",
    "6": "a pipe",
    "K": "a long link",
    "S": "a sparse file",
}


def name_in(header: bytes) -> str:
    """The name in a member's header, truncated if it is longer than 100 bytes and stored in a block
    before the header.
    """
    name = header[:100].split(b"\0")[0]
    # GNU tar stores times there
    prefix = header[345:500].split(b"\0")[0] if header[257:263] == b"ustar\0" else b""

    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def checksum(header: bytes) -> int:
    """The checksum of a header block, in which its own field counts as blanks."""
    return sum(header) - sum(header[148:156]) + 8 * 32


def header_fault(header: bytes) -> str:
    """What is wrong with the header block before a payload, "" if nothing: the cheap part of the
    checks of `Reader`.
    """
    if not any(header):
        return "the header is zeroed"

    return "" if _octal(header[148:156]) == checksum(header) else "bad header checksum"


def _octal(field: bytes) -> int | None:
    """The value of a field of blanks, octal digits, then NUL or blank; None if malformed. int()
    would also accept signs and underscores.
    """
    digits = field.split(b"\0")[0].strip(b" ")
    return None if digits.strip(b"01234567") else int(digits or b"0", 8)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive."""

    name: str
    # offset of the payload
    offset: int
    data: bytes


class Reader:
    """Reads a tar file once, member by member. Iterating raises ArchiveError at the first fault."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.at = 0
        self._hash, self._whole = hashlib.sha256(), False
        with self._opened() as file:
            self.bytes = os.fstat(file.fileno()).st_size

    def __iter__(self) -> Iterator[Member]:
        long_name: str | None = None
        with self._opened() as file:
            file.seek(self.at)
            while True:
                start, header = self.at, self._read(file, BLOCK, "header")
                if not any(header):
                    self._end(file, start)
                    self._whole = True
                    return

                kind, name, size = self._header(header, start)
                offset = self.at
                data = self._payload(
                    file, size, start, name, NAME_BYTES if kind in "Lxg" else MEMBER_BYTES
                )

                if kind == "L":
                    long_name = data.rstrip(b"\0").decode("utf-8", "backslashreplace")
                elif kind == "x":
                    long_name = self._pax(data, start) or long_name
                elif kind == "0":
                    yield Member(self._safe(long_name or name, start), offset, data)
                    long_name = None
                elif kind == "5":
                    self._safe(long_name or name, start)
                    long_name = None
                elif kind != "g":
                    raise self._error(
                        start,
                        f"member '{name}' is {_REFUSED.get(kind, f'of unknown type {kind!r}')}, "
                        "which is refused",
                    )

    def sha256(self) -> str:
        """The sha256 of the whole file, which must have been iterated; it is read again if the
        iteration ended at a fault.
        """
        if self._whole:
            return self._hash.hexdigest()
        with self._opened() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _opened(self) -> BufferedReader:
        try:
            return local_files.reader(self.path)
        except OSError as error:
            raise unreadable(self.path, 0, error) from None

    def _error(self, offset: int, text: str) -> ArchiveError:
        return ArchiveError(self.path, offset, text)

    def _read(self, file: BinaryIO, size: int, what: str) -> bytes:
        data = file.read(size)
        if len(data) < size:
            if what == "header" and not data:
                raise self._error(
                    self.at, "the end-of-archive marker is missing: the shard was cut short"
                )
            raise self._error(self.at, f"the {what} is cut short ({len(data)} of {size} bytes)")

        self._hash.update(data)
        self.at += size
        return data

    def _payload(self, file: BinaryIO, size: int, start: int, name: str, limit: int) -> bytes:
        if self.at + size > self.bytes:
            raise self._error(
                start,
                f"the payload of '{name}' ({size} bytes) runs past the end of the shard: truncated "
                "or damaged",
            )
        if size > limit:
            raise self._error(start, f"member '{name}' has {size} bytes; at most {limit} are read")

        return self._read(file, -(-size // BLOCK) * BLOCK, "payload")[:size]

    def _end(self, file: BinaryIO, start: int) -> None:
        if any(self._read(file, BLOCK, "end-of-archive marker")):
            raise self._error(start, "a zeroed header in the middle of the archive")

        while rest := file.read(1 << 20):
            if rest.count(0) != len(rest):
                raise self._error(self.at, "data after the end-of-archive marker")
            self._hash.update(rest)
            self.at += len(rest)

    def _header(self, header: bytes, start: int) -> tuple[str, str, int]:
        if self._number(header[148:156], start, "checksum") != checksum(header):
            raise self._error(start, "bad header checksum")

        magic = header[257:263]
        if magic not in (b"ustar\0", b"ustar "):
            raise self._error(start, "not a ustar, GNU or pax header")

        kind = chr(header[156])
        return (
            "0" if kind in "\0007" else kind,
            name_in(header),
            self._number(header[124:136], start, "size"),
        )

    def _number(self, field: bytes, start: int, what: str) -> int:
        """The value of a field of octal digits, or of GNU's base-256 for large values."""
        if field[0] == 0x80:
            return int.from_bytes(field[1:], "big")

        number = _octal(field)
        if number is None:
            raise self._error(start, f"bad {what} field in a header")

        return number

    def _pax(self, data: bytes, start: int) -> str | None:
        """The `path` of a pax record; records are `length key=value\\n`."""
        path = None
        while data:
            length, _, rest = data.partition(b" ")
            end = int(length) if length.isdigit() and len(length) < 8 else 0
            key, sign, value = data[len(length) + 1 : end - 1].partition(b"=")
            if not rest or not sign or data[end - 1 : end] != b"\n":
                raise self._error(start, "bad pax record")
            if key == b"size" or key.startswith(b"GNU.sparse"):
                raise self._error(
                    start,
                    f"pax key '{key.decode('ascii', 'backslashreplace')}' is refused: too large or "
                    "sparse",
                )

            if key == b"path":
                path = value.decode("utf-8", "backslashreplace")

            data = data[end:]

        return path

    def _safe(self, name: str, start: int) -> str:
        if name.startswith("/") or "\0" in name or ".." in name.split("/"):
            raise self._error(
                start, f"member name {name!r} is absolute or leaves the archive, which is refused"
            )
        return name
