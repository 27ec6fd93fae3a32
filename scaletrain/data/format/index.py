"""The index of a folder of shards: reads it, and builds it atomically when several ranks start.

The manifest `scaletrain-index.json` lists each shard's name, samples, bytes and sha256 in the
canonical order of samples. The offset tables `NAME.stidx` are in the same folder; the manifest is
renamed into place last, so a folder with a manifest has all its tables. It lists all shards of the
folder, from which a pattern may select some, and notes how many samples were left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from scaletrain import dist
from scaletrain.data.errors import ArchiveError, DataError, ShardError, printable
from scaletrain.data.format import manifest, offsets, selection
from scaletrain.data.format.manifest import Shard as Shard
from scaletrain.data.format.manifest import ShardManifest
from scaletrain.runtime import durable, local_files, locks
from scaletrain.runtime.tables import plural

MANIFEST, OLD_MANIFEST = manifest.NAME, manifest.OLD_NAME
# shards to read at the same time while indexing
READERS = 8
# most faults or names to print one by one
SHOWN = 10
# seconds between two lines of progress
SILENCE = 10.0
# most characters of a fault in the manifest
FAULT_CHARACTERS = 300
# most folders inside of a folder of shards in which to look for shards
FOLDERS = 100
COMPRESSED = (b".tar.gz", b".tgz", b".tar.zst", b".tar.bz2", b".tar.xz", b".tar.lz4")


def say(text: str) -> None:
    """Print on the main rank."""
    if dist.main():
        print(text)


def load(
    shards: selection.Paths, notice: Callable[[str], None] = say, skip: bool = False
) -> ShardManifest:
    """The shards of a folder, or those that a pattern or a list selects, in canonical order. Raises
    DataError.

    A folder without an index, or with one of an older version, is indexed first; with `skip`, bad
    samples are then reported and left out instead of raising. `notice` is called with a line about
    anything in the folder that looks like a shard and is not read.
    """
    place = selection.one_folder(shards)
    folder = Path(place.folder)
    present = np.array(_tars(folder, notice))

    path = home(folder) / MANIFEST
    if why := _missing(folder, path):
        notice(f"{why}: reading every shard once to make it in {path.parent}")
        faults: list[ShardError] = []
        build(folder, progress=_said(notice), report=faults.append if skip else offsets.stop)
        for fault in faults[:SHOWN]:
            notice(f"left out: {fault}")

        if faults:
            notice(
                f"{len(faults)} faults left out of the index; scaletrain shards verify {folder} "
                "lists them"
            )

    listed = _parse(path)
    if why and listed.unused:
        notice(f"{folder}: {unused(listed)}")

    _check_names(folder, present, listed)
    return listed.only(place.chosen(listed.names)) if place.patterns else listed


def build(
    folder: Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[ShardError], None] = offsets.stop,
) -> ShardManifest:
    """Read all shards once and write the tables and the manifest. If several processes call this,
    one does the work and the others wait.

    `report` is called from this thread with each fault; by default it raises the fault.
    """
    names = sorted(map(os.fsdecode, _tars(folder)))
    path = home(folder) / MANIFEST

    with _locked(path.parent):
        if force or _missing(folder, path):
            shards: list[Shard] = []
            # checksums release the interpreter's lock; each shard has its own list, so that the
            # order of faults is deterministic
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

    return _parse(path)


def tabulate(path: Path, report: Callable[[ShardError], None] = offsets.stop) -> Shard:
    """Read one shard and write its offset table -> its entry in the manifest. Faults as in
    `offsets.scan`.
    """
    faults: list[ShardError] = []
    unused: list[str] = []

    def left_out(fault: ShardError) -> None:
        report(fault)
        faults.append(fault)

    rows, size, sha = offsets.scan(path, left_out, unused.append)
    atomic(table_path(path), offsets.pack(rows, size))
    shard = {"name": path.name, "samples": len(rows), "bytes": size, "sha256": sha}
    if faults:
        text = printable(f"{path.name} at byte {faults[0].offset}: {faults[0].text}")
        broken = any(isinstance(fault, ArchiveError) for fault in faults)
        shard |= {"left_out": len(faults), "broken": broken, "fault": text[:FAULT_CHARACTERS]}

    if unused:
        shard |= {
            "unused": len(unused),
            "first_unused": printable(f"{path.name}/{unused[0]}")[:FAULT_CHARACTERS],
        }

    return shard


def publish(folder: Path, shards: list[Shard]) -> None:
    """Write the manifest, after all offset tables. Raises DataError if there are no samples."""
    total = sum(s["samples"] for s in shards)
    if not total:
        raise DataError(f"{folder}: the shards hold no samples")

    content = {"version": manifest.VERSION, "samples": total, "shards": shards}
    atomic(home(folder) / MANIFEST, json.dumps(content, indent=0).encode())


def unused(shards: ShardManifest) -> str:
    """A line about images that are not used as samples."""
    return (
        f"{shards.unused:,} images are not used, since by WebDataset's rule of the first dot they "
        f"belong to the samples of others, such as {shards.first_unused}; if they should be "
        "samples, write the shards with names without further dots"
    )


def table_path(shard: Path) -> Path:
    """The path of a shard's offset table."""
    return home(shard.parent) / (shard.name + offsets.SUFFIX)


def home(folder: Path) -> Path:
    """The folder of the index: the folder of shards itself, or one in the user's cache if that has
    no index and cannot be written.
    """
    if os.access(folder, os.W_OK) or (
        (folder / MANIFEST).exists() and not _outdated(folder / MANIFEST)
    ):
        return folder

    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletrain" / "index"
    )
    place = cache / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]

    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        fix = f"let its owner run scaletrain shards index {folder}, or set XDG_CACHE_HOME"
        text = (
            f"{folder} has no {MANIFEST} and cannot be written, nor can {place} ({error.strerror})"
        )
        raise DataError(f"{text}: {fix}") from None

    return place


def _missing(folder: Path, path: Path) -> str:
    """Why the index must be built, "" if it exists. A file of another format is no index, whatever
    its name.
    """
    if path.exists() and not _outdated(path):
        return ""

    old = next(filter(_outdated, (path, path.with_name(OLD_MANIFEST), folder / OLD_MANIFEST)), None)
    return (
        f"{folder} has no index yet"
        if old is None
        else f"{old} is the index of an older version and no longer used"
    )


def _outdated(path: Path) -> bool:
    return 0 < manifest.version(path) < manifest.VERSION


def _tried(path: Path) -> tuple[Shard, list[ShardError]]:
    faults: list[ShardError] = []
    return tabulate(path, faults.append), faults


def _said(notice: Callable[[str], None]) -> Callable[[int, int], None]:
    """Report progress in lines, few enough for a log."""
    last = monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last > SILENCE:
            last = monotonic()
            notice(f"indexed {done:,} of {plural(total, 'shard')}")

    return progress


def atomic(path: Path, data: bytes) -> None:
    """Write a file of a data folder, which all users may read."""
    durable.write(path, data, mode=0o644)


def _tars(folder: Path, notice: Callable[[str], None] = lambda text: None) -> list[bytes]:
    """The names of the shards in no particular order. `notice` is called with a line about anything
    that looks like a shard and is not read.

    The names are bytes, since decoding 300,000 of them takes longer than reading the folder.
    """
    if not folder.is_dir():
        fix = f"write one with scaletrain shards folder IMAGES {folder}"
        if any(sign in str(folder) for sign in "*?{"):
            fix = "patterns stand for the names of shards, in the last part of a path"
        raise DataError(f"{folder}: no such data folder; {fix}")

    tars: list[bytes] = []
    hidden: list[bytes] = []
    compressed: list[bytes] = []
    folders: list[bytes] = []
    tables = offsets.SUFFIX.encode()

    # without a stat of each entry, which is slow on network file systems
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(b".tar"):
                (hidden if name.startswith(b".") else tars).append(name)
            elif name.endswith(COMPRESSED):
                compressed.append(name)
            elif (
                not name.endswith(tables)
                and not name.startswith(b".")
                and local_files.is_folder(entry)
            ):
                folders.append(name)

    inner = [
        name
        for name in sorted(folders)[:FOLDERS]
        if next((folder / os.fsdecode(name)).glob("*.tar"), None)
    ]

    if not tars:
        fix = "write shards with scaletrain shards folder IMAGES FOLDER"
        if compressed:
            fix = f"{_first(compressed)} must be decompressed first"
        elif inner:
            fix = f"did you mean {folder / os.fsdecode(inner[0])}?"

        raise DataError(f"{folder} holds no .tar shards; {fix}")

    if compressed:
        notice(
            f"{folder}: not read, since compressed: {_first(compressed)}; decompress what belongs "
            "to the data set"
        )

    if hidden:
        notice(f"{folder}: not read, since hidden: {_first(hidden)}")

    if inner:
        notice(f"{folder}: not read are the shards in its folders: {_first(inner)}")

    return tars


def _first(names: list[bytes]) -> str:
    """The first names, and how many more there are."""
    first = printable(", ".join(map(os.fsdecode, sorted(names)[:SHOWN])))
    return first + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _parse(path: Path) -> ShardManifest:
    fix = f"remake it with scaletrain shards index --force {path.parent}"
    try:
        with local_files.reader(path) as file:
            return manifest.parse(file, str(path), fix)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {fix}") from None


def _check_names(folder: Path, present: NDArray[np.bytes_], shards: ShardManifest) -> None:
    """Raise DataError unless manifest and folder list the same shards, since samples would be lost
    or added silently.
    """
    # much faster than finding differences
    if np.array_equal(np.sort(shards.names), np.sort(present)):
        return

    if len(lost := np.setdiff1d(shards.names, present)):
        text = f"{folder / os.fsdecode(lost[0])} is in {MANIFEST} but not in the folder"
        raise DataError(f"{text}; restore it or run scaletrain shards index --force {folder}")

    if len(new := np.setdiff1d(present, shards.names)):
        raise DataError(
            f"{folder / os.fsdecode(new[0])} is not in {MANIFEST}; run scaletrain shards index "
            "--force "
            f"{folder}"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. On file systems without locks, each process does the same work and
    writes the same bytes.
    """
    handle = os.open(folder, os.O_RDONLY)

    try:
        with suppress(OSError):
            locks.acquire(handle, wait=True)
        yield
    finally:
        os.close(handle)
