"""Writes folders of shards: samples shuffled globally by a seed, indexed, then renamed into place.

The same input gives the same bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scaletrain import dist
from scaletrain.data import image, index
from scaletrain.data.errors import DataError

CLASSES = "classes.json"
PER_SHARD = 1000
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample to write; `name` makes its key readable and need not be unique."""

    name: str
    image: bytes  # an encoded JPEG, PNG or WebP
    label: int = -1  # -1: none
    mask: bytes | None = None  # an encoded PNG


class Source(Protocol):
    """What an importer provides: a number of samples, each loaded (and checked) when asked for, from any thread."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def load(self, number: int) -> Entry: ...


def write(
    source: Source,
    dest: Path,
    *,
    name: str = "train",
    per_shard: int = PER_SHARD,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[index.Shard]:
    """Write dest/NAME-000000.tar ..., their index and classes.json. Use inside `replacing`."""
    os.environ["WDS_SECURE"] = "1"  # before the import: webdataset then neither unpickles nor runs shells
    from webdataset import TarWriter

    dest.mkdir(parents=True, exist_ok=True)
    total = len(source)
    order = dist.permutation(total, seed, "write").numpy()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for shard, begin in enumerate(range(0, total, per_shard)):
            numbers = order[begin : begin + per_shard].tolist()
            path = dest / f"{name}-{shard:06d}.tar"
            with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0, user="scaletrain", group="scaletrain") as tar:
                for number, entry in zip(numbers, pool.map(source.load, numbers), strict=True):
                    tar.write(_members(number, entry))
            progress(min(begin + per_shard, total), total)
    if source.classes:
        index.atomic(dest / CLASSES, json.dumps(source.classes, ensure_ascii=False).encode())
    return index.build(dest)


def _members(number: int, entry: Entry) -> dict[str, bytes | str]:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", entry.name)[-60:]
    members: dict[str, bytes | str] = {"__key__": f"{number:09d}-{slug}", image.kind(entry.image): entry.image}
    if entry.label >= 0:
        members["cls"] = str(entry.label).encode()
    if entry.mask is not None:
        members["mask.png"] = entry.mask
    return members


class replacing:
    """Context: gives DEST.partial to fill; on success it becomes DEST, on failure it is removed and DEST is as it was."""

    def __init__(self, dest: Path, force: bool = False) -> None:
        self.dest, self.force = dest, force
        self.partial = dest.with_name(dest.name + ".partial")

    def __enter__(self) -> Path:
        if self.dest.exists() and (not self.dest.is_dir() or any(self.dest.iterdir())):
            if not self.force:
                raise DataError(f"{self.dest} exists already; choose another folder, or replace it with --force")
            _only_shards(self.dest)
        if self.partial.exists():
            _only_shards(self.partial)
            shutil.rmtree(self.partial)
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise DataError(f"{self.partial} cannot be made: {error.strerror}") from None
        return self.partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        old = self.dest.with_name(self.dest.name + ".old")
        if self.dest.exists():
            self.dest.rename(old)
        self.partial.rename(self.dest)
        shutil.rmtree(old, ignore_errors=True)


def _only_shards(folder: Path) -> None:
    """--force deletes a folder of shards and nothing else."""
    for path in folder.rglob("*"):
        ours = path.suffix in (".tar", ".idx") or path.name in (index.MANIFEST, CLASSES) or path.name.startswith(".")
        if path.is_symlink() or not (path.is_dir() or ours):
            raise DataError(
                f"{folder} is not replaced, since it holds more than shards ({path.name}); delete it yourself if meant"
            )
