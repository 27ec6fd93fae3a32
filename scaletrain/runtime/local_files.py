"""Safe reading of untrusted local files: never a pipe or a device, and up to a size limit.

All errors are OSErrors, with the reason in `strerror`.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | Path) -> int:
    """A descriptor of a regular file, for reading."""
    _check_regular(path, Path(path).stat().st_mode)
    # The file may have been replaced meanwhile; opening a pipe must not block.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check_regular(path, os.fstat(file).st_mode)
    except OSError:
        os.close(file)
        raise

    return file


def reader(path: str | Path) -> BufferedReader:
    """A regular file as a file object, for reading."""
    return os.fdopen(open_file(path), "rb")


def is_folder(entry: os.DirEntry[Any]) -> bool:
    """A folder or a link to one; a loop of links is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read(path: str | Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes."""
    with reader(path) as file:
        data = file.read(limit + 1)

    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))

    return data


def _check_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(
            errno.EINVAL,
            f"it is {_KINDS.get(stat.S_IFMT(mode), 'something else')} and not a file",
            str(path),
        )
