"""Whole files in a bounded folder of this node, shared by all processes of one user: ranks, loader
workers, several jobs.

Every file is complete and verified from the moment it has its name. The kernel's locks hold all
together, so a killed process leaves nothing to clean up:
- `KEY.part` is being filled by who holds its exclusive lock, and renamed when whole. Its size is
  reserved beforehand.
- `KEY` is in use while somebody holds a shared lock of it. Only who gets the exclusive one may
  delete it.
- `.room` is locked while space is counted, reserved or freed, so the folder never holds more than
  its limit.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from time import monotonic, sleep, time
from typing import BinaryIO

from scaletrain.data.errors import DataError
from scaletrain.runtime import heartbeat, locks

# writes exactly the size announced, or raises
Fill = Callable[[BinaryIO], None]
# seconds to wait for room while other processes use every file
PATIENCE = 60.0
# seconds between notes that a file is in use
TOUCH = 1.0
# seconds between two looks at what other processes do
POLL = 0.02


class NodeCache:
    """`place`: a folder on this node's disk ("": the one for temporary files); `limit` in bytes.
    Raises DataError.
    """

    def __init__(self, place: str, limit: int) -> None:
        self.folder = Path(place or tempfile.gettempdir()) / f"scaletrain-{os.geteuid()}"
        self.limit = limit
        _private(self.folder)

    def open(self, key: str, size: int, fill: Fill) -> int:
        """A file descriptor to read the file with, which stays in the cache until it is closed;
        filled first if missing.
        """
        while (file := self._held(key)) is None:
            if not self._make(key, size, fill):
                # whoever fills the file may take as long as that takes
                _pause()

        return file

    def ensure(self, key: str, size: int, fill: Fill) -> None:
        """Have the file there soon: marks it as used, fills it, or leaves it to the process that
        does so at this moment.
        """
        file = self._held(key)

        if file is None:
            self._make(key, size, fill)
        else:
            os.close(file)

    def mark(self, key: str, wanted: bool) -> None:
        """Let a file be among the last to be deleted, or the first."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / key, None if wanted else (0, 0))

    def used(self) -> int:
        """Bytes of all files, those on their way included."""
        with self._counting():
            return sum(size for _, size, _ in self._files())

    def check(self, wanted: int) -> None:
        """Raises DataError if the disk cannot hold `wanted` bytes here, or the limit where that is
        less.
        """
        disk = os.statvfs(self.folder)
        room = disk.f_bavail * disk.f_frsize + self.used()
        if min(wanted, self.limit) > room:
            raise DataError(
                f"the disk of {self.folder} has room for {room:,} bytes and data.cache.bytes is "
                f"{self.limit:,}: "
                "lower it, or choose another disk of this node with data.cache.path"
            )

    def _held(self, key: str) -> int | None:
        """Open and in use, or None if it is not there."""
        try:
            file = os.open(self.folder / key, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None

        try:
            locks.acquire(file, wait=True, shared=True)
            found = os.fstat(file)
            # deleted between the opening and the lock
            if not found.st_nlink:
                os.close(file)
                return None

            if time() - found.st_mtime > TOUCH:
                os.utime(file)
        except BaseException:
            os.close(file)
            raise

        return file

    def _make(self, key: str, size: int, fill: Fill) -> bool:
        """Fill the file unless another process did. False if another one is about it.

        To wait for its lock would not do: once the file has its name, whoever reads it holds a lock
        of that same file.
        """
        part = self.folder / f"{key}.part"

        with locks.locked(part, wait=False) as file:
            if file is None:
                return False
            # renamed or deleted by who had the lock before
            if not _is(part, file):
                return True

            try:
                if (self.folder / key).exists():
                    part.unlink()
                    return True

                # a killed process may have left some of it
                os.ftruncate(file, 0)
                self._reserve(file, size)
                with os.fdopen(os.dup(file), "r+b") as writer:
                    fill(writer)

                # a large file and a slow disk
                with heartbeat.unwatched():
                    os.fsync(file)

                # who lists the folder during a renaming may see the file twice, or not at all
                with self._counting():
                    part.rename(self.folder / key)
            except BaseException as error:
                part.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(
                        f"the disk of {self.folder} is full: lower data.cache.bytes"
                    ) from None

                raise

            return True

    def _reserve(self, file: int, size: int) -> None:
        if size > self.limit:
            raise DataError(
                f"a file of {size:,} bytes does not fit in data.cache.bytes={self.limit:,}; raise "
                "it"
            )

        end = monotonic() + PATIENCE
        while not self._reserved(file, size):
            if monotonic() > end:
                raise DataError(
                    f"{self.folder}: every file is in use and data.cache.bytes={self.limit:,} is "
                    "full; raise it"
                )

            _pause()

    def _reserved(self, file: int, size: int) -> bool:
        with self._counting():
            files = sorted(self._files())
            free = self.limit - sum(size for _, size, _ in files) - size
            for _, held, path in files:
                if free >= 0:
                    break
                if self._evicted(path):
                    free += held

            if free < 0:
                return False

            if size:
                os.posix_fallocate(file, 0, size)

            return True

    def _counting(self) -> AbstractContextManager[int | None]:
        return locks.locked(self.folder / ".room", wait=True)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(last use, bytes, path)"""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if entry.name != ".room":
                        yield found.st_mtime_ns, found.st_size, Path(entry.path)

    def _evicted(self, path: Path) -> bool:
        """Delete a file that nobody uses or fills. False if it is in use, or was renamed
        meanwhile.
        """
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True

        try:
            free = locks.acquire(file, wait=False) and _is(path, file)
            if free:
                path.unlink()
            return free
        finally:
            os.close(file)


def _pause() -> None:
    heartbeat.beat()
    sleep(POLL)


def _private(folder: Path) -> None:
    """Make the folder for this user alone. One that others own or may write could feed the run with
    anything.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be made: {error.strerror}; choose a folder with "
            "data.cache.path"
        ) from None

    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise DataError(
            f"the cache {folder} must be a folder that belongs to you alone (chmod 700); remove "
            "it, or set data.cache.path"
        )


def _is(path: Path, file: int) -> bool:
    """The path still names the opened file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
