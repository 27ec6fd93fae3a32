"""The ways in which data can be wrong. All are ValueErrors, with one line that says where and what
to do.
"""

from __future__ import annotations

import errno
from pathlib import Path

from scaletrain import exit_codes

# of missing files, what is no file, and bad disk blocks: waiting does not help
PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.EIO)


class DataError(ValueError):
    """A data folder, an option or a source that cannot be used."""


class ImageError(DataError):
    """Bytes that are not a usable image. Whoever knows where they come from adds it."""


class ShardError(DataError):
    """A tar shard that is damaged, truncated, altered or hostile. `shard` and `offset` (bytes) say
    where.
    """

    def __init__(self, shard: str | Path, offset: int, text: str) -> None:
        super().__init__(printable(f"{shard} at byte {offset}: {text}"))
        self.shard, self.offset, self.text = str(shard), offset, text

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, int, str]]:
        return type(self), (self.shard, self.offset, self.text)


class ArchiveError(ShardError):
    """The archive itself is damaged or refused at that byte, and nothing behind it can be read."""


class ShardStorageError(ShardError):
    """Bytes that storage failed to give. Another start may succeed, unless the disk block is bad
    for good.
    """

    exit_code = exit_codes.RETRY


class LoaderError(DataError):
    """Loader processes died or hang: another start may succeed."""

    exit_code = exit_codes.RETRY


def unreadable(shard: str | Path, offset: int, error: OSError) -> DataError:
    """A ShardError for what stays so; anything else may pass, and must not lead to a substitute."""
    if error.errno in PERMANENT:
        kind = ShardStorageError if error.errno == errno.EIO else ShardError
        return kind(shard, offset, f"cannot be read: {error.strerror}")
    return LoaderError(f"{shard} at byte {offset} cannot be read: {error.strerror}")


def printable(text: str) -> str:
    """The text with everything escaped that could break the line or steer a terminal, and what is
    not Unicode.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
