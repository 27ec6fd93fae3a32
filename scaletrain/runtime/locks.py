"""Locks of files between processes and, on network file systems, between nodes.

A lock belongs to the open file or to the process:

- open file (flock): two openings within one process exclude each other too, and readers may share
  the lock. A forked child keeps it until the child, too, has closed the file.
- process (lockf): a forked child does not keep it, so it ends with its process even if loader
  workers live on. Closing any descriptor of the file in that process releases it.

The two do not exclude each other, so all users of a file must take the same kind. Linux passes both
on to an NFS server, which grants an exclusive lock only for a file that is open for writing.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def acquire(file: int, *, wait: bool, shared: bool = False, of_process: bool = False) -> bool:
    """Lock an open file until it is closed; False where another holds the lock and `wait` is false.

    shared: exclude only those who want the lock exclusively. of_process: lock for the process, not
    for the open file. Raises OSError where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        (fcntl.lockf if of_process else fcntl.flock)(file, kind | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if wait or error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        return False

    return True


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[int | None]:
    """The descriptor of the exclusively locked file, which is made if need be; None where another
    holds the lock and `wait` is false.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield file if acquire(file, wait=wait) else None
    finally:
        os.close(file)


def taken(path: Path) -> bool:
    """Whether another process holds the exclusive lock `of_process` of a file, which is not taken
    for that. Raises OSError where the file system has no locks.

    Not for a process that holds the lock itself: it would lose it, as after any closing of the
    file.
    """
    # struct flock of 64-bit Linux: type, whence, start, length, process
    layout = "hhqqi4x"
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False

    try:
        wanted = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, wanted))[0]
    finally:
        os.close(file)

    return bool(kind != fcntl.F_UNLCK)
