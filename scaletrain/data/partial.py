"""DEST.partial: shards on their way to DEST, with a journal, so that the same command goes on after a kill.

`.import.json` says what is imported and how; `.journal.jsonl`, one beside each split's shards, has a line for every complete
shard, written after the shard and its offset table are on disk. What is not in the journal is written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from scaletrain.data import index
from scaletrain.data.errors import DataError

CLASSES = "classes.json"
QUARANTINE = "quarantine.jsonl"
COPIES = "copies.jsonl"
HEAD = ".import.json"
JOURNAL = ".journal.jsonl"


@dataclass(frozen=True, slots=True)
class Bad:
    """A sample that is left out."""

    number: int  # in the source
    path: str
    reason: str
    copy: bool = False  # it is sound, and there is the same one already


@dataclass(frozen=True, slots=True)
class Line:
    """Of the journal: one complete shard and what was left out of it."""

    shard: index.Shard
    bad: list[Bad]

    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"


Map = Callable[[Callable[[str], Line | None], list[str]], Iterable[Line | None]]


class Journal:
    """The complete shards of one folder. Opening it reads all their bytes, and forgets them from the first unsound one on."""

    def __init__(self, folder: Path, pool_map: Map) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / JOURNAL
        texts = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines: list[Line] = [line for line in takewhile(bool, pool_map(self._sound, texts)) if line]
        index.atomic(self.path, "".join(line.text() for line in self.lines).encode())

    @property
    def bad(self) -> list[Bad]:
        return [bad for line in self.lines for bad in line.bad if not bad.copy]

    @property
    def copies(self) -> list[Bad]:
        return [bad for line in self.lines for bad in line.bad if bad.copy]

    def add(self, shard: Path, bad: list[Bad]) -> None:
        """Index a shard that was just written, and note it once both are on disk."""
        _to_disk(shard)
        line = Line(index.tabulate(shard), bad)
        with self.path.open("a") as file:
            file.write(line.text())
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)

    def finish(self, classes: tuple[str, ...]) -> None:
        if classes:
            index.atomic(self.folder / CLASSES, json.dumps(classes, ensure_ascii=False).encode())
        for name, left in ((QUARANTINE, self.bad), (COPIES, self.copies)):
            if left:
                lines = [json.dumps({"number": one.number, "path": one.path, "reason": one.reason}) + "\n" for one in left]
                index.atomic(self.folder / name, "".join(lines).encode())
        index.publish(self.folder, [line.shard for line in self.lines])

    def _sound(self, text: str) -> Line | None:
        """The line if the shard is still what it says; a torn line or a damaged shard is written again, to the same bytes."""
        try:
            raw = json.loads(text)
            line = Line(raw["shard"], [Bad(**bad) for bad in raw["bad"]])
            return line if index.tabulate(self.folder / Path(line.shard["name"]).name) == line.shard else None
        except (ValueError, KeyError, TypeError, OSError):
            return None


class replacing:
    """Context: gives DEST.partial to fill; on success it becomes DEST, which until then is as it was.

    `head` tells imports apart. A partial folder of the same head is gone on with, one of another is discarded only by `force`.
    On failure it is kept if it has complete shards, and removed else.
    """

    def __init__(self, dest: Path, head: Mapping[str, Any], force: bool = False) -> None:
        self.dest, self.head, self.force = dest, json.dumps(head, sort_keys=True), force
        self.partial = dest.with_name(dest.name + ".partial")
        self.resumed = False

    def __enter__(self) -> replacing:
        if self.dest.exists() and (not self.dest.is_dir() or any(self.dest.iterdir())):
            if not self.force:
                raise DataError(f"{self.dest} exists already; choose another folder, or replace it with --force")
            _only_shards(self.dest)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.partial} cannot be made: {error.strerror}") from None
        try:
            self._claim()
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                if not any(self._journals(lambda path: path.stat().st_size > 0)):
                    shutil.rmtree(self.partial, ignore_errors=True)
                return
            self._replace()
        finally:
            os.close(self._lock)

    @property
    def kept(self) -> bool:
        """There are shards to go on with."""
        return self.partial.exists()

    def _claim(self) -> None:
        """Alone in the folder, where the file system has locks."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another import is writing {self.partial} at this moment") from None
        except OSError:
            pass

    def _begin(self) -> None:
        path = self.partial / HEAD
        there = path.read_text() if path.exists() else ""
        if there == self.head:
            self.resumed = any(self._journals(lambda path: path.stat().st_size > 0))
            return
        if any(self.partial.iterdir()):
            if not self.force:
                raise DataError(
                    f"{self.partial} was begun with {_difference(there, self.head)}; --force discards what it holds"
                )
            _only_shards(self.partial)
            for inner in self.partial.iterdir():
                shutil.rmtree(inner) if inner.is_dir() else inner.unlink()
        index.atomic(path, self.head.encode())

    def _journals(self, what: Callable[[Path], bool] = lambda path: True) -> Iterator[Path]:
        return filter(what, self.partial.rglob(JOURNAL))

    def _replace(self) -> None:
        old = self.dest.with_name(self.dest.name + ".old")
        if old.exists():  # a kill between the two renamings left it
            _only_shards(old)
            shutil.rmtree(old)
        if self.dest.exists():
            self.dest.rename(old)
        self.partial.rename(self.dest)
        shutil.rmtree(old, ignore_errors=True)
        for path in list(self.dest.rglob(".*")):  # the head, the journals, and files that a kill left half-written
            path.unlink(missing_ok=True)


def _difference(one: str, other: str) -> str:
    """What two heads differ in, in words for the user."""
    with suppress(ValueError):
        a, b = json.loads(one), json.loads(other)
        keys = [key for key in b if a.get(key) != b[key]]
        names = ", ".join("another source" if key == "splits" else f"{key}={a.get(key)} and not {b[key]}" for key in keys)
        return names or "other options"
    return "another command"


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _only_shards(folder: Path) -> None:
    """--force deletes a folder of shards and nothing else."""
    names = (index.MANIFEST, CLASSES, QUARANTINE, COPIES)
    for path in folder.rglob("*"):
        ours = path.suffix in (".tar", ".idx") or path.name in names or path.name.startswith(".")
        if path.is_symlink() or not (path.is_dir() or ours):
            raise DataError(
                f"{folder} is not replaced, since it holds more than shards ({path.name}); delete it yourself if meant"
            )
