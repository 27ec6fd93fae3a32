"""A cache of whole files in a folder of this node, of bounded size and shared by all processes of
one user: ranks, loader workers, several jobs.

A file under its final name is complete and verified. All coordination uses the kernel's file locks,
so a killed process leaves nothing to clean up:
- `KEY.part` is filled by the process that holds its exclusive lock, and renamed when complete. Its
  size is reserved beforehand.
- `KEY` is in use while any process holds a shared lock on it, and only deleted under the exclusive
  lock.
- `.room` is locked while space is counted, reserved or freed, so the folder never exceeds its
  limit.
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

# writes a file of exactly the announced size, or raises
Fill = Callable[[BinaryIO], None]
# seconds to wait for space while other processes use every file
PATIENCE = 60.0
# seconds between two updates of the time at which a file was last used
TOUCH = 1.0
# seconds between two checks of what other processes do
POLL = 0.02


class NodeCache:
    """The cache in `place`, a folder on this node's disk ("": the one for temporary files), of at
    most `limit` bytes. Raises DataError.
    """

    def __init__(self, place: str, limit: int) -> None:
        self.folder = Path(place or tempfile.gettempdir()) / f"scaletrain-{os.geteuid()}"
        self.limit = limit
        _private(self.folder)

    def open(self, key: str, size: int, fill: Fill) -> int:
        """A file descriptor to read the file, which stays in the cache until the descriptor is
        closed. A missing file is filled first.
        """
        while (file := self._opened(key)) is None:
            if not self._make(key, size, fill):
                # another process fills the file, which takes as long as it takes
                _pause()

        return file

    def ensure(self, key: str, size: int, fill: Fill) -> None:
        """Fill a missing file unless another process is filling it; mark an existing one as
        used.
        """
        file = self._opened(key)

        if file is None:
            self._make(key, size, fill)
        else:
            os.close(file)

    def mark(self, key: str, wanted: bool) -> None:
        """Make a file one of the last to be evicted if it is wanted, else one of the first."""
        with suppress(FileNotFoundError):
            os.utime(self.folder / key, None if wanted else (0, 0))

    def used(self) -> int:
        """Bytes of all files, including those being filled."""
        with self._counting():
            return sum(size for _, size, _ in self._files())

    def check(self, wanted: int) -> None:
        """Raise DataError if the disk has no room for the smaller of `wanted` and the limit, both
        in bytes.
        """
        disk = os.statvfs(self.folder)
        room = disk.f_bavail * disk.f_frsize + self.used()
        if min(wanted, self.limit) > room:
            raise DataError(
                f"the disk of {self.folder} has room for {room:,} bytes and data.cache.bytes is "
                f"{self.limit:,}: lower it, or choose another disk of this node with "
                "data.cache.path"
            )

    def _opened(self, key: str) -> int | None:
        """A descriptor of the file with a shared lock, or None if the file does not exist."""
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
        """Fill the file unless another process has done so; False if another process is filling it.

        Waiting for that process's lock would not work: after the renaming, readers hold locks on
        the same file.
        """
        part = self.folder / f"{key}.part"

        with locks.locked(part, wait=False) as file:
            if file is None:
                return False
            # renamed or deleted by the previous owner of the lock
            if not _is(part, file):
                return True

            try:
                if (self.folder / key).exists():
                    part.unlink()
                    return True

                # a killed process may have left a part of it
                os.ftruncate(file, 0)
                self._reserve(file, size)
                with os.fdopen(os.dup(file), "r+b") as writer:
                    fill(writer)

                # may take long with a large file and a slow disk
                with heartbeat.unwatched():
                    os.fsync(file)

                # a process that lists the folder during the renaming may see the file twice, or not
                # at all
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
            for _, bytes_used, path in files:
                if free >= 0:
                    break
                if self._evicted(path):
                    free += bytes_used

            if free < 0:
                return False

            if size:
                os.posix_fallocate(file, 0, size)

            return True

    def _counting(self) -> AbstractContextManager[int | None]:
        return locks.locked(self.folder / ".room", wait=True)

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """Each file as (time of last use, bytes, path)."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.name != ".room":
                        yield status.st_mtime_ns, status.st_size, Path(entry.path)

    def _evicted(self, path: Path) -> bool:
        """Delete a file that no process uses or fills. False if it is in use, or was renamed in the
        meantime.
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
    """Create the folder for this user alone. A folder that others own or may write could supply the
    run with any content.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise DataError(
            f"the cache {folder} cannot be made: {error.strerror}; choose a folder with "
            "data.cache.path"
        ) from None

    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise DataError(
            f"the cache {folder} must be a folder that belongs to you alone (chmod 700); remove "
            "it, or set data.cache.path"
        )


def _is(path: Path, file: int) -> bool:
    """Whether the path still refers to the open file."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(file))
    except FileNotFoundError:
        return False
