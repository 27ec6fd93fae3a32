"""The index of a folder of shards: its manifest `scaletrain-index.json` and the making of it,
atomically and by several ranks.

The manifest lists, in the canonical order of samples, each shard's name, samples, bytes and sha256.
The offset tables `NAME.stidx` lie beside it; the manifest is renamed into place last, so a folder
with a manifest has all its tables. It has all shards of the folder, of which a pattern chooses
some, and remembers which samples were left out of it.
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
# shards read at a time while indexing
READERS = 8
# faults, and other things, that are named one by one
SHOWN = 10
# seconds between lines of progress
SILENCE = 10.0
# of a fault that the manifest keeps
FAULT_CHARACTERS = 300
# inside a folder of shards that are looked into
FOLDERS = 100
COMPRESSED = (b".tar.gz", b".tgz", b".tar.zst", b".tar.bz2", b".tar.xz", b".tar.lz4")


def say(text: str) -> None:
    """Print, once for all ranks."""
    if dist.main():
        print(text)


def load(
    shards: selection.Paths, notice: Callable[[str], None] = say, skip: bool = False
) -> ShardManifest:
    """The shards of a folder, or those that a pattern or a list chooses of it, in canonical order.
    Raises DataError.

    A folder without an index, or with one of an older version, is indexed first. `skip`: faults are
    then said and left out in place of raised. What else lies in the folder and is not read is said.
    """
    place = selection.one_folder(shards)
    folder = Path(place.folder)
    there = np.array(_tars(folder, notice))

    path = home(folder) / MANIFEST
    if why := _missing(folder, path):
        notice(f"{why}: reading every shard once to make it in {path.parent}")
        faults: list[ShardError] = []
        build(folder, progress=_said(notice), report=faults.append if skip else offsets.stop)
        for fault in faults[:SHOWN]:
            notice(f"left out: {fault}")

        if faults:
            notice(
                f"{len(faults)} faults left out of the index; shards/verify.py {folder} lists them"
            )

    found = _parse(path)
    if why and found.unused:
        notice(f"{folder}: {unused(found)}")

    _same_names(folder, there, found)
    return found.only(place.chosen(found.names)) if place.patterns else found


def build(
    folder: Path,
    *,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    report: Callable[[ShardError], None] = offsets.stop,
) -> ShardManifest:
    """Read all shards once and write the tables and the manifest. Of several processes one works,
    the others wait for it.

    Raises ShardError at the first fault unless `report`, called from this thread, takes it and
    returns.
    """
    names = sorted(map(os.fsdecode, _tars(folder)))
    path = home(folder) / MANIFEST

    with _alone(path.parent):
        if force or _missing(folder, path):
            shards: list[Shard] = []
            # checksums let go of the interpreter's lock; each shard has its own list, so that
            # faults keep their order
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
    """Read one shard, write its offset table -> its entry of the manifest. Faults as in
    `table.scan`.
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
    """Write the manifest; all offset tables must lie there already. Raises DataError when there are
    no samples.
    """
    total = sum(s["samples"] for s in shards)
    if not total:
        raise DataError(f"{folder}: the shards hold no samples")

    content = {"version": manifest.VERSION, "samples": total, "shards": shards}
    atomic(home(folder) / MANIFEST, json.dumps(content, indent=0).encode())


def unused(shards: ShardManifest) -> str:
    """What to say of images that are no samples."""
    return (
        f"{shards.unused:,} images are not used, since by WebDataset's rule of the first dot they "
        "belong to samples of others, "
        f"such as {shards.first_unused}; if they should be samples, write the shards with names "
        "without further dots"
    )


def table_path(shard: Path) -> Path:
    return home(shard.parent) / (shard.name + offsets.SUFFIX)


def home(folder: Path) -> Path:
    """Where the index of a folder lies: in it, or in the user's cache if it has none and cannot be
    written.
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
        fix = f"let its owner run shards/index.py {folder}, or set XDG_CACHE_HOME"
        text = (
            f"{folder} has no {MANIFEST} and cannot be written, nor can {place} ({error.strerror})"
        )
        raise DataError(f"{text}: {fix}") from None

    return place


def _missing(folder: Path, path: Path) -> str:
    """Why the index must be made, "" if it is there. Files that are not ours are no index, whatever
    their names.
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
    """Progress as lines, few enough for a log."""
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
    """Names of the shards as the file system has them, in no order. `notice` is told what may be
    taken for a shard and is none.

    Decoding 300,000 names takes longer than reading the folder.
    """
    if not folder.is_dir():
        fix = f"write one with shards/folder.py IMAGES {folder}"
        if any(sign in str(folder) for sign in "*?{"):
            fix = "patterns stand for the names of shards, in the last part of a path"
        raise DataError(f"{folder}: no such data folder; {fix}")

    tars: list[bytes] = []
    hidden: list[bytes] = []
    compressed: list[bytes] = []
    folders: list[bytes] = []
    ours = offsets.SUFFIX.encode()

    # without a look at each, which is slow on a network
    with os.scandir(os.fsencode(folder)) as entries:
        for entry in entries:
            name = entry.name
            if name.endswith(b".tar"):
                (hidden if name.startswith(b".") else tars).append(name)
            elif name.endswith(COMPRESSED):
                compressed.append(name)
            elif (
                not name.endswith(ours)
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
        fix = "write shards with shards/folder.py IMAGES FOLDER"
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
    """Some names, and how many more there are."""
    shown = printable(", ".join(map(os.fsdecode, sorted(names)[:SHOWN])))
    return shown + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def _parse(path: Path) -> ShardManifest:
    fix = f"remake it with shards/index.py --force {path.parent}"
    try:
        with local_files.reader(path) as file:
            return manifest.parse(file, str(path), fix)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {fix}") from None


def _same_names(folder: Path, there: NDArray[np.bytes_], shards: ShardManifest) -> None:
    """The manifest and the folder must agree, else samples would be lost or invented silently."""
    # a fraction of what telling differences takes
    if np.array_equal(np.sort(shards.names), np.sort(there)):
        return

    if len(lost := np.setdiff1d(shards.names, there)):
        text = f"{folder / os.fsdecode(lost[0])} is in {MANIFEST} but not in the folder"
        raise DataError(f"{text}; restore it or run shards/index.py --force {folder}")

    if len(new := np.setdiff1d(there, shards.names)):
        raise DataError(
            f"{folder / os.fsdecode(new[0])} is not in {MANIFEST}; run shards/index.py --force "
            f"{folder}"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Where there are no locks, each process does the same work and renames
    the same bytes.
    """
    handle = os.open(folder, os.O_RDONLY)

    try:
        with suppress(OSError):
            locks.acquire(handle, wait=True)
        yield
    finally:
        os.close(handle)
