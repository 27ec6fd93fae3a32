"""Writes that survive a crash: a file is complete and on disk, or it is as it was before."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("scaletrain")
# The key of a record that describes a start of the process, see train.records.
START = "start"


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


def write(path: Path, content: bytes | str, mode: int | None = None) -> None:
    """Replace what a file holds; readers see the old content or all of the new. mode: the file's
    permissions; None: those of any new file.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if mode is not None:
            os.fchmod(file.fileno(), mode)


@contextlib.contextmanager
def replacing(path: Path, tag: str = "", *, flushed: bool = True) -> Iterator[BinaryIO]:
    """A new binary file, which replaces `path` once it is complete and on disk.

    Until then it is a hidden file of the same folder; `tag` tells such files apart, and is random
    by default. After an error nothing has changed. flushed=False does not wait for the disk: after
    a power loss the file may be damaged.
    """
    temporary = path.with_name(f".{path.name}.{tag or secrets.token_hex(4)}.tmp")

    try:
        with temporary.open("wb") as file:
            yield file
            if flushed:
                flush(file)

        temporary.replace(path)
        if flushed:
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def drop_records(path: Path, start_step: int) -> None:
    """Remove the records at or after `start_step`, and damaged ones, from a file of JSON lines.
    Those of starts, which belong to no step, are kept.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return

    kept = []
    for line in lines:
        try:
            if not line.endswith(b"\n"):
                continue

            record = json.loads(line)
            if START in record or record["step"] < start_step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):  # cut short by a crash, or damaged since
            continue

    if kept != lines:
        write(path, b"".join(kept))


class Records:
    """A file of JSON lines whose loss must not end a run: lines that cannot be written are kept and
    written later, with one warning.

    A line is written in full or not at all, unless the process is killed in between.
    """

    # Most lines that are kept for later; the oldest are dropped beyond.
    KEPT = 10_000

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque(maxlen=self.KEPT)
        self._failed = False

    def add(self, record: Mapping[str, object]) -> None:
        """Append a record, after those that could not be written before."""
        self._waiting.append(json.dumps(record).encode() + b"\n")
        try:
            self._write()
        except OSError as error:
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); the run continues and will try again",
                    self._path,
                    error.strerror,
                )

            self._failed = True
            return

        self._waiting.clear()
        self._failed = False

    def _write(self) -> None:
        # Opened each time: the folder may have been moved or remounted since.
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
