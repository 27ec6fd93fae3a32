"""Writes that survive a crash: a file appears complete and on disk, or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("scaletrain")


def sync(folder: Path) -> None:
    """Make the folder's entries (new, renamed and removed names) survive a power loss."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path, tag: str) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete and on disk, or not at all. `tag` keeps
    temporary names apart.
    """
    temporary = path.with_name(f"{path.name}.{tag}.tmp")

    try:
        with temporary.open("wb") as file:
            yield file
            flush(file)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def drop_records(path: Path, start_step: int) -> None:
    """Remove from a file of JSON lines those whose `step` is at or after `start_step`, and what is
    damaged. All or nothing.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return

    kept = []
    for line in lines:
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] < start_step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # cut short by a crash, or damaged since
            continue

    if kept != lines:
        with replacing(path, str(os.getpid())) as file:
            file.writelines(kept)


class Records:
    """A file of JSON lines that is a by-product: what cannot be written is said once, waits, and
    never raises.

    Each line is there whole or not at all, unless the process is killed in between.
    """

    # lines that wait at most
    KEPT = 10_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=self.KEPT)
        self._failed = False

    def add(self, record: Mapping[str, object]) -> None:
        """Append it, and what has been waiting."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); the run goes on and tries again later",
                    self._path,
                    error.strerror,
                )

            self._failed = True
            return

        self._waiting.clear()
        self._failed = False

    def _write(self) -> None:
        # opened each time: the folder may have been moved or mounted anew meanwhile
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                data = b"".join(self._waiting)
                while data:
                    data = data[file.write(data) :]
            except OSError:
                # possible on a full disk too
                file.truncate(size)
                raise
