"""Speed of the run folder and of the data folder, by small bounded pieces that bypass the page
cache where they can.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from scaletrain import dist, environment
from scaletrain.doctor.page import Finding, limit, measured, spread

MIB = 2**20
BLOCK = 4 * MIB
# at most, into the run folder
WRITTEN = 64 * MIB
# whole pages of what an image of ImageNet takes, 110 kB
READ = 112 * 1024
# at most, from the data folder
READS = 200
# of each measurement, at most
SECONDS = 2.0
# GiB: some checkpoints of a ResNet-50 with its target and optimizer
FREE_NEED = 10
MOUNTS = Path("/proc/self/mounts")
# of files that live for the measurement
PREFIX = ".scaletrain-doctor-"
# MB/s; random reads/s of one process
SLOW_WRITE, SLOW_READS = 50, 100


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists: a check makes no folders."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())


def run_folder(folder: Path) -> list[Finding]:
    """Write with fsync, as a checkpoint is written, and read back; one process per node does it.
    Every rank calls it.
    """
    place = existing(folder)
    fix = "choose a folder that can be written with --run"
    first = environment.local_rank() == 0
    values, findings = measured("run folder", lambda: _write_and_read(place) if first else {}, fix)

    if not values:
        return findings

    free, wrote, read, direct = (values[name] for name in ("free", "write", "read", "direct"))
    low, slow = min(free) < FREE_NEED, min(wrote) < SLOW_WRITE
    how = (
        "past the page cache"
        if all(direct)
        else "from the page cache, which this file system does not bypass"
    )

    return [
        *findings,
        limit(
            low,
            "run folder",
            f"{filesystem(place)}, {spread(free, 'GiB')} free",
            f"free {FREE_NEED} GiB, or another --run",
        ),
        limit(
            slow,
            "run folder",
            f"write and fsync of {WRITTEN // MIB} MiB: {spread(wrote, 'MB/s')}; read {how}: "
            f"{spread(read, 'MB/s')}",
            f"below {SLOW_WRITE} MB/s checkpoints lag behind: use a faster disk, or save less "
            "often (checkpoint.every_steps)",
        ),
    ]


def shared(folder: Path) -> list[Finding]:
    """Whether all ranks see the same run folder: rank 0 makes a file, the others look for it. Every
    rank calls it.
    """
    place, name = existing(folder), None

    with contextlib.ExitStack() as stack:
        if dist.main():
            # run_folder() says so
            with contextlib.suppress(OSError):
                name = Path(
                    stack.enter_context(tempfile.NamedTemporaryFile(dir=place, prefix=PREFIX)).name
                ).name

        name = dist.broadcast_object(name)
        seen = name is not None and (place / name).exists()
        # the file stays until all have looked
        dist.gather_objects(seen)

    if seen:
        return [Finding("ok", "run folder", "the same for all ranks")]

    fix = (
        "checkpoints and resume need one folder on a file system that all nodes share: choose "
        "it "
        "with --run"
    )

    return (
        []
        if name is None
        else [Finding("fail", "run folder", "not the folder that rank 0 sees", fix)]
    )


def data_folder(folder: Path) -> list[Finding]:
    """Random reads of an image's size from the largest files, by all processes at once, as in
    training. Every rank calls it.
    """
    values, findings = measured(
        "data folder", lambda: _read_randomly(folder), "name the folder of shards with --data"
    )

    if not values:
        return findings

    rate, late, direct = (values[name] for name in ("rate", "p95", "direct"))
    how = "past" if all(direct) else "partly from"
    text = f"{filesystem(folder)}; random reads of {READ // 1024} KiB {how} the page cache: "
    text += f"{spread(rate, 'reads/s')} per process, 95 % within {max(late):.3g} ms"
    fix = (
        "a loader worker would wait for the disk: copy the shards to a disk of the node, or "
        "raise data.workers"
    )

    return [*findings, limit(min(rate) < SLOW_READS, "data folder", text, fix)]


def filesystem(folder: Path) -> str:
    """Type of the file system that holds a folder, such as ext4, nfs4 or lustre; its place would
    tell names.
    """
    where, best, found = folder.resolve(), Path("/"), "unknown file system"

    for line in os.fsdecode(MOUNTS.read_bytes()).strip("\n").split("\n"):
        _, point, kind = line.split(" ")[:3]
        # the kernel writes spaces as \040
        place = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point))
        # of several mounts in one place the last one is seen
        if where.is_relative_to(place) and len(place.parts) >= len(best.parts):
            best, found = place, kind

    return found


def _write_and_read(place: Path) -> Mapping[str, float]:
    facts = os.statvfs(place)
    # gone when closed
    with tempfile.NamedTemporaryFile(dir=place, prefix=PREFIX) as file:
        block, size, start = os.urandom(BLOCK), 0, time.perf_counter()
        while size < WRITTEN and time.perf_counter() - start < SECONDS:
            size += os.write(file.fileno(), block)

        os.fsync(file.fileno())
        wrote = size / (time.perf_counter() - start)
        handle, direct = _open(Path(file.name))
        with mmap.mmap(-1, BLOCK) as buffer:
            done, start = 0, time.perf_counter()
            while done < size and time.perf_counter() - start < SECONDS:
                done += os.preadv(handle, [buffer], done)
            read = done / (time.perf_counter() - start)

        os.close(handle)

    return {
        "free": facts.f_bavail * facts.f_frsize / 2**30,
        "write": wrote / 1e6,
        "read": read / 1e6,
        "direct": direct,
    }


def _read_randomly(folder: Path) -> Mapping[str, float]:
    with os.scandir(folder) as entries:
        sizes = {
            entry.path: entry.stat().st_size
            for entry in entries
            if entry.is_file() and entry.name.endswith(".tar")
        }

    if not sizes:
        raise FileNotFoundError(f"{folder} holds no .tar files")

    # not seeded: the same places would be in some cache the second time
    draw = random.Random()
    paths = draw.sample(sorted(sizes), min(32, len(sizes)))
    handles = {path: _open(Path(path)) for path in paths}
    took: list[float] = []
    begin = time.perf_counter()

    with mmap.mmap(-1, READ) as buffer:
        while len(took) < READS and time.perf_counter() - begin < SECONDS:
            path = draw.choice(paths)
            offset = draw.randrange(max(1, sizes[path] - READ)) // mmap.PAGESIZE * mmap.PAGESIZE
            start = time.perf_counter()
            os.preadv(handles[path][0], [buffer], offset)
            took.append(time.perf_counter() - start)

    for handle, _ in handles.values():
        os.close(handle)

    late = 1000 * sorted(took)[int(0.95 * (len(took) - 1))]
    return {
        "rate": 1 / statistics.fmean(took),
        "p95": late,
        "direct": all(direct for _, direct in handles.values()),
    }


def _open(path: Path) -> tuple[int, bool]:
    """A file to read, past the page cache if its file system can do that (O_DIRECT)."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT), True
    except OSError:
        return os.open(path, os.O_RDONLY), False
