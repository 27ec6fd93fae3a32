"""The errors that unusable data raises: all are ValueErrors whose one line says where the fault is
and what to do.
"""

from __future__ import annotations

import errno
from pathlib import Path

# errors of missing files, of paths that are no files and of bad disk blocks: a retry does not help
from scaletrain import exit_codes

# of missing files, what is no file, and bad disk blocks: waiting does not help
PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EIO)


class DataError(ValueError):
    """A data folder, an option or a source that cannot be used."""


class ImageError(DataError):
    """Bytes that are not a usable image; the caller adds where they come from."""


class ShardError(DataError):
    """A tar shard that is damaged, truncated, altered or hostile, at byte `offset` of `shard`."""

    def __init__(self, shard: str | Path, offset: int, text: str) -> None:
        super().__init__(printable(f"{shard} at byte {offset}: {text}"))
        self.shard, self.offset, self.text = str(shard), offset, text

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.text)


class ArchiveError(ShardError):
    """The archive itself is damaged or refused at that byte, and nothing after it can be read."""


class ShardStorageError(ShardError):
    """Bytes that storage failed to deliver. A restart may succeed, unless the disk block is
    permanently bad.
    """

    exit_code = exit_codes.RETRY


class LoaderError(DataError):
    """Loader processes that died or hang; a restart may succeed."""

    exit_code = exit_codes.RETRY


def unreadable(shard: str | Path, offset: int, error: OSError) -> DataError:
    """A ShardError if the failure is permanent. Any other may be transient and must not lead to a
    substitute.
    """
    if error.errno in PERMANENT:
        kind = ShardStorageError if error.errno == errno.EIO else ShardError
        return kind(shard, offset, f"cannot be read: {error.strerror}")
    return LoaderError(f"{shard} at byte {offset} cannot be read: {error.strerror}")


def printable(text: str) -> str:
    """The text with all characters escaped that could break the line or control a terminal, or are
    not Unicode.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
