"""A folder of shards: its manifest `index.json` and the making of it, atomically and by several ranks at once.

The manifest lists, in the canonical order of samples, each shard's name, samples, bytes and sha256. The offset tables
`NAME.idx` lie beside it; the manifest is renamed into place last, so a folder with a manifest has all its tables.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import table
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.manifest import VERSION, Manifest, parse
from scaletrain.data.manifest import Shard as Shard
from scaletrain.tables import plural

MANIFEST = "index.json"
READERS = 8  # shards read at a time while indexing
SHOWN = 10  # faults said one by one
SILENCE = 10.0  # seconds between lines of progress


def load(folder: Path, notice: Callable[[str], None] = print, skip: bool = False) -> Manifest:
    """The shards of a folder in canonical order; a folder of tars without an index is indexed first. Raises DataError.

    `skip`: while indexing, faults are said and left out in place of raised.
    """
    there = np.array(_folder_of_tars(folder))
    place = home(folder) / MANIFEST
    if not place.exists():
        notice(f"{folder} has no index yet: reading every shard once to make it in {place.parent}")
        faults: list[ShardError] = []
        build(folder, progress=_said(notice), report=faults.append if skip else table.stop)
        for fault in faults[:SHOWN]:
            notice(f"left out: {fault}")
        if faults:
            notice(f"{len(faults)} faults left out of the index; shards/verify.py {folder} lists them")
    shards = _parse(place)
    _same_names(folder, there, shards)
    return shards


def build(
    folder: Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[ShardError], None] = table.stop,
) -> Sequence[Shard]:
    """Read all shards once and write the tables and the manifest. Of several processes one works, the others wait for it.

    Raises ShardError at the first fault unless `report`, called from this thread, takes it and returns.
    """
    names = sorted(name for name in map(os.fsdecode, _folder_of_tars(folder)) if (folder / name).is_file())
    place = home(folder)
    with _alone(place):
        if not force and (place / MANIFEST).exists():
            return _parse(place / MANIFEST)
        shards: list[Shard] = []
        # checksums let go of the interpreter's lock; a pool takes each shard with its own list, so that faults keep their order
        with ThreadPoolExecutor(min(READERS, len(os.sched_getaffinity(0)))) as pool:
            try:
                for shard, faults in pool.map(lambda name: _tried(folder / name), names):
                    for fault in faults:
                        report(fault)
                    shards.append(shard)
                    progress(len(shards), len(names))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        publish(folder, shards)
    return shards


def tabulate(path: Path, report: Callable[[ShardError], None] = table.stop) -> Shard:
    """Read one shard, write its offset table -> its entry of the manifest. Faults as in `table.scan`."""
    rows, size, sha = table.scan(path, report)
    atomic(table_path(path), table.pack(rows, size))
    return {"name": path.name, "samples": len(rows), "bytes": size, "sha256": sha}


def publish(folder: Path, shards: list[Shard]) -> None:
    """Write the manifest; all offset tables must lie there already. Raises DataError when there are no samples."""
    total = sum(s["samples"] for s in shards)
    if not total:
        raise DataError(f"{folder}: the shards hold no samples")
    manifest = {"version": VERSION, "samples": total, "shards": shards}
    atomic(home(folder) / MANIFEST, json.dumps(manifest, indent=0).encode())


def table_path(shard: Path) -> Path:
    return home(shard.parent) / (shard.name + ".idx")


def home(folder: Path) -> Path:
    """Where the index of a folder lies: in it, or in the user's cache if it has none and cannot be written."""
    if (folder / MANIFEST).exists() or os.access(folder, os.W_OK):
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletrain" / "index"
    place = cache / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        cure = f"let its owner run shards/index.py {folder}, or set XDG_CACHE_HOME"
        text = f"{folder} has no {MANIFEST} and cannot be written, nor can {place} ({error.strerror})"
        raise DataError(f"{text}: {cure}") from None
    return place


def _tried(path: Path) -> tuple[Shard, list[ShardError]]:
    faults: list[ShardError] = []
    return tabulate(path, faults.append), faults


def _said(notice: Callable[[str], None]) -> Callable[[int, int], None]:
    """Progress as lines, few enough for a log."""
    last = monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last > SILENCE:
            last = monotonic()
            notice(f"indexed {done:,} of {plural(total, 'shard')}")

    return progress


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


def _folder_of_tars(folder: Path) -> list[bytes]:
    """Names as the file system has them, in no order: decoding 300,000 of them takes longer than reading the folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such data folder; write one with shards/folder.py IMAGES {folder}")
    with os.scandir(os.fsencode(folder)) as entries:  # without a look at each, which is slow on a network
        names = [entry.name for entry in entries if entry.name.endswith(b".tar")]
    if not names:
        inner = sorted(p.parent.name for p in folder.glob("*/*.tar"))
        cure = f"did you mean {folder / inner[0]}?" if inner else "write shards with shards/folder.py IMAGES FOLDER"
        raise DataError(f"{folder} holds no .tar shards; {cure}")
    return names


def _parse(path: Path) -> Manifest:
    cure = f"remake it with shards/index.py --force {path.parent}"
    try:
        with path.open("rb") as file:
            return parse(file, str(path), cure)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); {cure}") from None


def _same_names(folder: Path, there: NDArray[np.bytes_], shards: Manifest) -> None:
    """The manifest and the folder must agree, else samples would be lost or invented silently."""
    if np.array_equal(np.sort(shards.names), np.sort(there)):  # a fraction of what telling differences takes
        return
    if len(lost := np.setdiff1d(shards.names, there)):
        raise DataError(
            f"{folder / os.fsdecode(lost[0])} is in {MANIFEST} but not in the folder; restore it or re-index with --force"
        )
    if len(new := np.setdiff1d(there, shards.names)):
        raise DataError(f"{folder / os.fsdecode(new[0])} is not in {MANIFEST}; run shards/index.py --force {folder}")


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
