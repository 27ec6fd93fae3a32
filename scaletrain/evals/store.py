"""Features on disk: encoded once, memory-mapped by every benchmark and process that needs them.

One folder per entry, named by a digest of all that defines its features:

    entry.json      that identity, the number of samples, the width and the rows of a chunk
    x.f32           [N, D] float32; the row of a sample is its number
    chunks-R.jsonl  a line for each chunk that rank R wrote: its number, the crc32 of its bytes and
                    the samples that could not be read
    use.lock        locked, with others, by every process that uses the features
    encode.lock     locked by the one process that encodes them

A chunk counts once its line is there and its bytes have the checksum, which is compared whenever an
entry is opened. So whatever a killed process or a machine without power left is either whole or
encoded again. The kernel releases the locks of killed processes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from torch import Tensor

from scaletrain import exit_codes
from scaletrain.evals.errors import EvalError
from scaletrain.runtime import durable, local_files, locks

FORMAT = 1
# Rows of the smallest chunk. With a multiple of it, chunks begin at pages of 4 KiB whatever the
# width, so that several nodes never write to the same page.
ROWS = 1024
# Map files that are larger than the memory; Python names this flag of Linux from 3.13 on.
_MAP_NORESERVE = 0x4000
_NAME = re.compile(r"[0-9a-f]{24}")
_JSON_BYTES = 1 << 20
_RECORD_BYTES = 256 << 20


class StoreFullError(EvalError):
    """All stored features are in use by other processes; later there may be room."""

    exit_code = exit_codes.RETRY


@dataclass(frozen=True)
class Stored:
    """The features of all samples of a data set; they stay in the store as long as `x` lives."""

    x: Tensor  # [N, D] float32, memory-mapped; a row without a meaning where a sample is left out
    left_out: Mapping[int, str]  # number of each sample that could not be read -> why

    def rows(self, rows: Tensor) -> Stored:
        """Those of the samples `rows` [n] int64, which ascend."""
        lo, hi = int(rows[0]), int(rows[-1]) + 1
        # without a copy where it is one range
        x = self.x[lo:hi] if hi - lo == len(rows) else self.x[rows]
        bad = torch.tensor(list(self.left_out), dtype=torch.int64)
        place = torch.searchsorted(rows, bad).tolist()
        wanted = torch.isin(bad, rows).tolist()
        faults = zip(place, self.left_out.values(), wanted, strict=True)
        return Stored(x, {number: why for number, why, used in faults if used})


class Layout(BaseModel):
    """The content of entry.json."""

    format: int
    identity: dict[str, Any]
    samples: NonNegativeInt
    width: Annotated[int, Field(ge=1)]
    # of a chunk
    rows: Annotated[int, Field(ge=1)]

    @property
    def bytes(self) -> int:
        return 4 * self.samples * self.width

    @property
    def chunks(self) -> range:
        return range(-(-self.samples // self.rows))

    def part(self, chunk: int) -> tuple[int, int]:
        """The samples [lo, hi) of a chunk."""
        return chunk * self.rows, min((chunk + 1) * self.rows, self.samples)


class Chunk(BaseModel):
    """A line of chunks-R.jsonl."""

    chunk: NonNegativeInt
    crc32: NonNegativeInt
    left_out: dict[NonNegativeInt, str] = {}

    def fits(self, layout: Layout) -> bool:
        lo, hi = layout.part(self.chunk)
        return self.chunk in layout.chunks and all(lo <= sample < hi for sample in self.left_out)


class FeatureStore:
    """The entries in `folder`, of at most `limit` bytes together. The folder may be shared by
    processes, nodes and runs.

    Where there is no more room, the entries that were not used for longest are deleted; never one
    in use.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def entry(self, identity: Mapping[str, Any], samples: int) -> Entry:
        """The entry of the features with this identity, which need not exist yet."""
        return Entry(self, json.loads(json.dumps(identity)), samples)

    def make_room(self, path: Path, size: int) -> None:
        """Give the file `path` the size, and delete other entries if the limit demands it."""
        if size > self.limit:
            raise EvalError(
                f"features of {size / 1e9:.3g} GB do not fit in features.store_gb="
                f"{self.limit / 1e9:g} ({self.folder}); raise it, or store none with 0"
            )

        with locks.locked(self.folder / ".room", wait=True):
            for left in self.folder.glob(".*.deleted"):
                shutil.rmtree(left, ignore_errors=True)

            others = sorted(entry for entry in self._entries() if entry[2] != path.parent)
            free = self.limit - size - sum(used for _, used, _ in others)
            for _, used, folder in others:
                if free < 0 and self._deleted(folder):
                    free += used

            if free < 0:
                raise StoreFullError(
                    f"{self.folder}: other evaluations use its features, and features.store_gb="
                    f"{self.limit / 1e9:g} leaves no room for {size / 1e9:.3g} GB more; raise it"
                )

            with path.open("ab") as file:
                file.truncate(size)

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """Each entry as (time of its last use, bytes, folder)."""
        for folder in self.folder.iterdir():
            if _NAME.fullmatch(folder.name):
                with suppress(OSError):
                    used = (folder / "use.lock").stat().st_mtime_ns
                    yield used, _size(folder / "x.f32"), folder

    def _deleted(self, folder: Path) -> bool:
        """Delete an entry; False if it is in use."""
        try:
            lock = (folder / "use.lock").open("r+b")
        except FileNotFoundError:
            return False

        with lock:
            if not locks.acquire(lock.fileno(), wait=False):
                return False

            aside = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}.deleted")
            folder.rename(aside)
            # NFS keeps the open lock file a little longer; the next one removes it
            shutil.rmtree(aside, ignore_errors=True)
            return True


class Entry:
    """The features of one data set by one encoder and transform.

    One process encodes at a time: within `encoding` it calls `begin`, and then `write` for each
    missing chunk, as may the other ranks of its job.
    """

    def __init__(self, store: FeatureStore, identity: dict[str, Any], samples: int) -> None:
        self.store, self.identity, self.samples = store, identity, samples
        name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        self.folder = store.folder / name
        self._x = self.folder / "x.f32"

    def read(self, skip: bool) -> Stored | None:
        """The features, if they are complete. Without `skip`, they are not where samples could not
        be read. Raises EvalError.
        """
        try:
            return self._read(skip)
        except OSError as error:
            raise self._unusable(error) from error

    @contextmanager
    def encoding(self) -> Iterator[bool]:
        """Hold the right to encode while the context lasts; False where another process has it.
        Raises EvalError where the folder cannot be written.
        """
        with ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                mine = None
                # without a lock it was deleted in the meantime
                if (lock := self._used()) is not None:
                    stack.callback(os.close, lock)
                    place = self.folder / "encode.lock"
                    mine = stack.enter_context(locks.locked(place, wait=False))
            except OSError as error:
                raise self._unusable(error) from error

            yield mine is not None

    def begin(
        self, width: Callable[[], int], rows: int, skip: bool, world: int = 1
    ) -> tuple[Layout, list[int]]:
        """Make the files of [samples, width()] features in chunks of `rows`, or find them as they
        were begun before, and list the chunks that are missing. Raises EvalError.

        world: the ranks that will write; a node may not see at once which files others make.
        """
        layout = self._layout() or Layout(
            format=FORMAT, identity=self.identity, samples=self.samples, width=width(), rows=rows
        )
        try:
            self.store.make_room(self._x, layout.bytes)
            durable.write(self.folder / "entry.json", layout.model_dump_json(indent=1) + "\n")
            for rank in range(world):
                self._records_of(rank).touch()
        except OSError as error:
            raise self._unusable(error) from error

        good = self._good(layout, skip)
        return layout, [chunk for chunk in layout.chunks if chunk not in good]

    def write(
        self, layout: Layout, chunk: int, x: Tensor, left_out: Mapping[int, str], rank: int = 0
    ) -> None:
        """Store the features [n, D] of a chunk, and then its record."""
        lo, hi = layout.part(chunk)
        if x.shape != (hi - lo, layout.width) or x.dtype != torch.float32:
            raise ValueError(f"chunk {chunk} of {self.folder} cannot be {list(x.shape)} {x.dtype}")

        data = x.contiguous().numpy()
        record = Chunk(chunk=chunk, crc32=zlib.crc32(data.data), left_out=dict(left_out))
        try:
            with self._x.open("r+b", buffering=0) as file:
                _write_at(file.fileno(), data.data.cast("B"), 4 * lo * layout.width)
            with self._records_of(rank).open("ab") as file:
                # ends what a killed process may have left of a line
                file.write(b"\n" + record.model_dump_json().encode() + b"\n")
        except OSError as error:
            raise self._unusable(error) from error

    def _read(self, skip: bool) -> Stored | None:
        with ExitStack() as stack:
            if (lock := self._used()) is None:
                return None
            stack.callback(os.close, lock)

            layout = self._layout()
            good = {} if layout is None else self._good(layout, skip)
            if layout is None or len(good) < len(layout.chunks):
                return None

            # that it was used; of a foreign store this cannot be noted
            with suppress(OSError):
                os.utime(lock)
            x = self._mapped(layout)
            # from now on the lock lives as long as the array
            stack.pop_all()
            weakref.finalize(x, os.close, lock)
            left_out = {n: why for one in good.values() for n, why in one.left_out.items()}
            return Stored(torch.from_numpy(x), dict(sorted(left_out.items())))

    def _used(self) -> int | None:
        """A descriptor that keeps the entry in the store until it is closed; None if there is no
        entry.
        """
        path = self.folder / "use.lock"
        while self.folder.is_dir():
            with suppress(FileNotFoundError), ExitStack() as stack:
                file = _lock_file(path)
                stack.callback(os.close, file)
                locks.acquire(file, wait=True, shared=True)
                # otherwise it was deleted between the opening and the lock
                if os.path.samestat(path.stat(), os.fstat(file)):
                    stack.pop_all()
                    return file

        return None

    def _layout(self) -> Layout | None:
        """What entry.json says; None before it is written. Raises EvalError."""
        path = self.folder / "entry.json"
        try:
            layout = Layout.model_validate_json(local_files.read(path, _JSON_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            layout = None

        if layout is None or (layout.format, layout.identity, layout.samples) != (
            FORMAT,
            self.identity,
            self.samples,
        ):
            raise EvalError(f"{path} does not describe these features; delete {self.folder}")

        return layout

    def _good(self, layout: Layout, skip: bool) -> dict[int, Chunk]:
        """The chunks that are complete, by number."""
        if _size(self._x) != layout.bytes or not layout.samples:
            return {}

        x, records = self._mapped(layout), list(self._records(layout, skip))

        def intact(record: Chunk) -> bool:
            lo, hi = layout.part(record.chunk)
            return zlib.crc32(x[lo:hi].data) == record.crc32

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            results = pool.map(intact, records)
            return {one.chunk: one for one, good in zip(records, results, strict=True) if good}

    def _records(self, layout: Layout, skip: bool) -> Iterator[Chunk]:
        for path in sorted(self.folder.glob("chunks-*.jsonl")):
            for line in local_files.read(path, _RECORD_BYTES).splitlines():
                # a torn line, or a damaged one
                with suppress(ValidationError):
                    record = Chunk.model_validate_json(line)
                    if record.fits(layout) and (skip or not record.left_out):
                        yield record

    def _records_of(self, rank: int) -> Path:
        return self.folder / f"chunks-{rank}.jsonl"

    def _mapped(self, layout: Layout) -> NDArray[np.float32]:
        """Writing to it changes this process's copy only."""
        with self._x.open("rb") as file:
            memory = mmap.mmap(
                file.fileno(),
                layout.bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        return np.frombuffer(memory, np.float32).reshape(layout.samples, layout.width)

    def _unusable(self, error: OSError) -> EvalError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free the disk, lower features.store_gb, or choose another disk with --store"
        elif error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            fix = "choose a file system with file locks with --store"
        else:
            fix = "choose another folder with --store"

        text = f"features cannot be stored in {self.folder}: {error.strerror}; {fix}, or store "
        return EvalError(f"{text}none with --set features.store_gb=0")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _lock_file(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o644)
    except OSError as error:
        # a store that this user may only read
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | flags)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written
