"""DEST.partial: shards on their way to DEST, with a journal, so that the same command resumes after
a kill.

`.import.json` says what is imported and how; `.journal.jsonl`, one beside each split's shards, has
a line for every complete shard, written after the shard and its offset table are on disk. What is
not in the journal is written again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from scaletrain.data.errors import DataError
from scaletrain.data.format import index, manifest, offsets
from scaletrain.data.format.names import CLASSES
from scaletrain.runtime import locks

QUARANTINE = "quarantine.jsonl"
COPIES = "copies.jsonl"
HEAD = ".import.json"
JOURNAL = ".journal.jsonl"
# what is being moved out of the partial folder into the one around it
MOVED = ".moved.json"


@dataclass(frozen=True, slots=True)
class Bad:
    """A sample that is left out."""

    # in the source
    number: int
    path: str
    reason: str
    # it is sound, and there is the same one already
    copy: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """Of the journal: one complete shard and what was left out of it."""

    shard: index.Shard
    bad: list[Bad]

    def text(self) -> str:
        return json.dumps(asdict(self)) + "\n"


Map = Callable[[Callable[[str], Line | None], list[str]], Iterable[Line | None]]


class Journal:
    """The complete shards of one folder. Opening it reads all their bytes, and forgets them from
    the first unsound one on.
    """

    def __init__(self, folder: Path, pool_map: Map) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / JOURNAL
        texts = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines: list[Line] = [
            line for line in takewhile(bool, pool_map(self._sound, texts)) if line
        ]

        index.atomic(self.path, "".join(line.text() for line in self.lines).encode())

    @property
    def bad(self) -> list[Bad]:
        return [bad for line in self.lines for bad in line.bad if not bad.copy]

    @property
    def copies(self) -> list[Bad]:
        return [bad for line in self.lines for bad in line.bad if bad.copy]

    def unlabelled(self) -> int:
        """Samples without any label."""
        count = 0
        for shard in (line.shard for line in self.lines):
            rows = offsets.load(
                index.table_path(self.folder / shard["name"]), shard["samples"], shard["bytes"]
            )
            count += int((rows["target"] == 0).sum())

        return count

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
                lines = [
                    json.dumps({"number": one.number, "path": one.path, "reason": one.reason})
                    + "\n"
                    for one in left
                ]
                index.atomic(self.folder / name, "".join(lines).encode())

        index.publish(self.folder, [line.shard for line in self.lines])

    def _sound(self, text: str) -> Line | None:
        """The line if the shard is still what it says; a torn line or a damaged shard is written
        again, to the same bytes.
        """
        try:
            raw = json.loads(text)
            line = Line(raw["shard"], [Bad(**bad) for bad in raw["bad"]])
            return (
                line
                if index.tabulate(self.folder / Path(line.shard["name"]).name) == line.shard
                else None
            )
        except (ValueError, KeyError, TypeError, OSError):
            return None


class replacing:
    """Context: gives the folder `partial` to fill; on success it becomes DEST, which until then is
    as it was.

    `head` tells imports apart. A partial folder of the same head is gone on with, one of another is
    discarded only by `force`. On failure it is kept if it has complete shards, and removed else.
    Where DEST is a symbolic link, its target is written.

    A DEST that cannot be renamed (a mount point, the working directory, a folder in one that cannot
    be written) has the partial folder inside, and gets its content piece by piece, the manifest
    first: readers refuse it until all shards are there.
    """

    def __init__(self, dest: Path, head: Mapping[str, Any], force: bool = False) -> None:
        self.dest, self.head, self.force = (
            Path(os.path.realpath(dest)),
            json.dumps(head, sort_keys=True),
            force,
        )
        self._inside = self.dest.is_dir() and (
            os.path.ismount(self.dest)
            or self.dest == Path.cwd()
            or not os.access(self.dest.parent, os.W_OK)
        )

        self.partial = (
            self.dest / ".partial"
            if self._inside
            else self.dest.with_name(self.dest.name + ".partial")
        )
        self.resumed = False

    def __enter__(self) -> replacing:
        if not self._inside:
            self._check()

        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.partial, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.partial} cannot be made: {error.strerror}") from None

        try:
            self._claim()
            if self._inside:
                self._take_back()
                self._check()
            self._begin()
        except BaseException:
            with suppress(OSError):
                # if it is as empty as it was made
                self.partial.rmdir()
            os.close(self._lock)
            raise

        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._move_in() if self._inside else self._replace()
            elif not self.kept:
                shutil.rmtree(self.partial, ignore_errors=True)
        finally:
            os.close(self._lock)

    @property
    def kept(self) -> bool:
        """There are complete shards to go on with."""
        return any(self._journals(lambda path: path.stat().st_size > 0))

    def _check(self) -> None:
        """Refuse a DEST with content, or with more than shards if it is to be replaced."""
        if not self.dest.exists() or (self.dest.is_dir() and not self._content()):
            return
        if not self.force:
            raise DataError(
                f"{self.dest} exists already; choose another folder, or replace it with --force"
            )

        for path in self._content() if self.dest.is_dir() else [self.dest]:
            _only_shards(path, self.dest)

    def _content(self) -> list[Path]:
        """What DEST holds; of one that stays, without what a file system keeps at its root, and
        hidden files of others.
        """
        paths = list(self.dest.iterdir())
        return (
            [p for p in paths if not p.name.startswith(".") and p.name != "lost+found"]
            if self._inside
            else paths
        )

    def _claim(self) -> None:
        """Alone in the folder, where the file system has locks."""
        try:
            free = locks.acquire(self._lock, wait=False)
        except OSError:
            return

        if not free:
            raise DataError(f"another import is writing {self.partial} at this moment")

    def _begin(self) -> None:
        path = self.partial / HEAD
        there = path.read_text() if path.exists() else ""
        if there == self.head:
            self.resumed = self.kept
            return

        if any(self.partial.iterdir()):
            if not self.force:
                raise DataError(
                    f"{self.partial} was begun with {_difference(there, self.head)}; --force "
                    "discards what it holds"
                )

            _only_shards(self.partial, self.partial)
            for inner in self.partial.iterdir():
                shutil.rmtree(inner) if inner.is_dir() else inner.unlink()

        index.atomic(path, self.head.encode())

    def _journals(self, what: Callable[[Path], bool] = lambda path: True) -> Iterator[Path]:
        return filter(what, self.partial.rglob(JOURNAL))

    def _replace(self) -> None:
        old = self.dest.with_name(self.dest.name + ".old")
        # a kill between the two renamings left it
        if old.exists():
            _only_shards(old, old)
            shutil.rmtree(old)

        if self.dest.exists() and any(self.dest.iterdir()):
            self.dest.rename(old)

        self.partial.rename(self.dest)
        shutil.rmtree(old, ignore_errors=True)
        _tidy(self.dest)

    def _move_in(self) -> None:
        """A kill in here is undone by `_take_back`."""
        for path in sorted(self._content(), key=lambda path: path.name == index.MANIFEST):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        names = [path.name for path in self.partial.iterdir() if not path.name.startswith(".")]
        names.sort(key=lambda name: name != index.MANIFEST)
        index.atomic(self.partial / MOVED, json.dumps(names).encode())
        for name in names:
            (self.partial / name).rename(self.dest / name)

        (self.partial / MOVED).unlink()
        shutil.rmtree(self.partial)
        for name in names:
            _tidy(self.dest / name)

    def _take_back(self) -> None:
        path = self.partial / MOVED
        if path.exists():
            for name in map(os.path.basename, json.loads(path.read_text())):
                if (self.dest / name).exists():
                    (self.dest / name).rename(self.partial / name)
            path.unlink()


def _difference(one: str, other: str) -> str:
    """What two heads differ in, in words for the user."""
    with suppress(ValueError):
        a, b = json.loads(one), json.loads(other)
        keys = [key for key in b if a.get(key) != b[key]]
        names = ", ".join(
            "another source" if key == "splits" else f"{key}={a.get(key)} and not {b[key]}"
            for key in keys
        )

        return names or "other options"

    return "another command"


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tidy(folder: Path) -> None:
    """Remove the head, the journals, and files that a kill left half-written."""
    for path in list(folder.rglob(".*")):
        path.unlink(missing_ok=True)


def _only_shards(place: Path, folder: Path) -> None:
    """--force deletes shards and nothing else. Raises DataError for anything else at or below a
    place in a folder.
    """
    names = (index.MANIFEST, CLASSES, QUARANTINE, COPIES)

    for path in [place, *place.rglob("*")]:
        old = path.name.endswith(".tar.idx") or (
            path.name == index.OLD_MANIFEST and manifest.version(path)
        )
        ours = (
            path.suffix in (".tar", offsets.SUFFIX)
            or path.name in names
            or path.name.startswith(".")
            or old
        )

        if path.is_symlink() or not (path.is_dir() or ours):
            raise DataError(
                f"{folder} is not replaced, since it holds more than shards ({path.name}); delete "
                "it yourself if meant"
            )
