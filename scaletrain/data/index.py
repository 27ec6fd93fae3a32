"""A folder of shards: its manifest `index.json` and the making of it, atomically and by several ranks at once.

The manifest lists, in the canonical order of samples, each shard's name, samples, bytes and sha256. The offset tables
`NAME.idx` lie beside it; the manifest is renamed into place last, so a folder with a manifest has all its tables.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from scaletrain.data import table
from scaletrain.data.errors import DataError

MANIFEST = "index.json"
VERSION = 1
FIELDS = {"name": str, "samples": int, "bytes": int, "sha256": str}
Shard = dict[str, Any]  # FIELDS


def load(folder: Path, notice: Callable[[str], None] = print) -> list[Shard]:
    """The shards of a folder in canonical order; a folder of tars without an index is indexed first. Raises DataError."""
    _folder_of_tars(folder)
    if not (folder / MANIFEST).exists():
        if not os.access(folder, os.W_OK):
            raise DataError(f"{folder} has no {MANIFEST} and cannot be written: let its owner run shards/index.py {folder}")
        notice(f"{folder} has no index yet: reading every shard once to make it")
        build(folder)
    shards = _parse(folder / MANIFEST)
    _same_names(folder, shards)
    return shards


def build(folder: Path, *, force: bool = False, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Shard]:
    """Read all shards once and write the tables and the manifest. Of several processes one works, the others wait for it."""
    names = _folder_of_tars(folder)
    with _alone(folder):
        if not force and (folder / MANIFEST).exists():
            return _parse(folder / MANIFEST)
        shards: list[Shard] = []
        for done, name in enumerate(names):
            progress(done, len(names))
            shards.append(tabulate(folder / name))
        progress(len(names), len(names))
        publish(folder, shards)
    return shards


def tabulate(path: Path) -> Shard:
    """Read one shard, write its offset table beside it -> its entry of the manifest. Raises ShardError."""
    rows, size, sha = table.scan(path)
    atomic(table_path(path), table.pack(rows, size))
    return {"name": path.name, "samples": len(rows), "bytes": size, "sha256": sha}


def publish(folder: Path, shards: list[Shard]) -> None:
    """Write the manifest; all offset tables must lie there already. Raises DataError when there are no samples."""
    total = sum(s["samples"] for s in shards)
    if not total:
        raise DataError(f"{folder}: the shards hold no samples")
    atomic(folder / MANIFEST, json.dumps({"version": VERSION, "samples": total, "shards": shards}, indent=0).encode())


def table_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file of the same folder: a reader sees the old content, or all of the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _folder_of_tars(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data folder; write one with shards/folder.py IMAGES {folder}")
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".tar" and p.is_file())
    if not names:
        inner = sorted(p.parent.name for p in folder.glob("*/*.tar"))
        cure = f"did you mean {folder / inner[0]}?" if inner else "write shards with shards/folder.py IMAGES FOLDER"
        raise DataError(f"{folder} holds no .tar shards; {cure}")
    return names


def _parse(path: Path) -> list[Shard]:
    cure = f"remake it with shards/index.py --force {path.parent}"
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from None
    if not isinstance(raw, dict) or raw.get("version") != VERSION or not isinstance(raw.get("shards"), list):
        raise DataError(f"{path} is not a version {VERSION} manifest; {cure}")
    for shard in raw["shards"]:
        if not isinstance(shard, dict) or not all(isinstance(shard.get(k), t) for k, t in FIELDS.items()):
            raise DataError(f"{path} has a malformed entry: {str(shard)[:80]}; {cure}")
        if Path(shard["name"]).name != shard["name"] or shard["samples"] < 0:
            raise DataError(f"{path} names a shard outside its folder or of negative length: {str(shard)[:80]}; {cure}")
    return cast(list[Shard], raw["shards"])


def _same_names(folder: Path, shards: list[Shard]) -> None:
    """The manifest and the folder must agree, else samples would be lost or invented silently."""
    there = {p.name for p in folder.iterdir() if p.suffix == ".tar"}
    listed = {s["name"] for s in shards}
    if listed - there:
        raise DataError(
            f"{folder / min(listed - there)} is in {MANIFEST} but not in the folder; restore it or re-index with --force"
        )
    if there - listed:
        raise DataError(f"{folder / min(there - listed)} is not in {MANIFEST}; run shards/index.py --force {folder}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Where there are no locks, each process does the same work and renames the same bytes."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
