"""Writes folders of shards: samples shuffled globally by a seed, each decoded once; the same bytes
at any number of workers.

Memory is 40 bytes a sample while it is shuffled, 8 from then on, and some images for each worker.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np
import typer
from numpy.typing import NDArray

from scaletrain import rng
from scaletrain.data.errors import DataError, ImageError
from scaletrain.data.format.names import CLASSES, slug
from scaletrain.data.transforms import image, maps
from scaletrain.importers.dedup import Copies, digest
from scaletrain.importers.journal import QUARANTINE, Bad, Journal

__all__ = ["CLASSES", "MAX_PIXELS", "QUARANTINE", "Entry", "How", "Source", "head", "slug", "write"]
PER_SHARD = 1000
# of an image; the default of config.Data.max_pixels
MAX_PIXELS = 50_000_000
QUALITY = 95
Progress = Callable[[int, int], None]
# of one sample, by extension
Members = dict[str, bytes | str]


class Ready(NamedTuple):
    """A sample to be written."""

    # in the source
    number: int
    members: Members
    # of the image as it came
    digest: bytes


Sample = Ready | Bad


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample to write; `name` makes its key readable and need not be unique."""

    name: str
    # an encoded JPEG, PNG or WebP, not yet checked
    image: bytes
    # none, one (`key.cls`) or many (`key.json`)
    labels: tuple[int, ...] = ()
    # an encoded PNG
    mask: bytes | None = None
    # its file, for people
    mask_where: str = ""


class Source(Protocol):
    """What an importer provides: a number of samples, each loaded when asked for, from any
    thread.
    """

    # their names, if known
    classes: tuple[str, ...]
    labelled: bool
    # files, folders or rows that are left aside, by what they are
    ignored: Counter[str]

    def __len__(self) -> int: ...

    def where(self, number: int) -> str:
        """Path, URL or the like of a sample, for people."""
        ...

    def load(self, number: int) -> Entry:
        """Raises DataError, without `where`, for a sample that cannot be had."""
        ...

    def digest(self) -> str:
        """Differs for sources of other samples, order, names or labels; the content of files need
        not be read.
        """
        ...


@dataclass(frozen=True)
class How:
    """The options that all importers share."""

    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = PER_SHARD
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle.")] = 0
    resize: Annotated[
        int,
        typer.Option(
            min=0,
            help="Shrink the short side to this many pixels; smaller images stay as they are.",
        ),
    ] = 0
    quality: Annotated[
        int,
        typer.Option(
            min=0,
            max=100,
            help=f"JPEG quality after --resize [{QUALITY}]; without --resize, all images are "
            "re-encoded.",
        ),
    ] = 0
    max_pixels: Annotated[int, typer.Option(min=1, help="Larger images are bad images.")] = (
        MAX_PIXELS
    )
    max_bad: Annotated[
        str,
        typer.Option(
            metavar="N|N%",
            help=f"Leave out at most this many unreadable images, listed in {QUARANTINE}; stop at "
            "more.",
        ),
    ] = "0"
    workers: Annotated[
        int,
        typer.Option(
            min=0, help="Threads that read and decode; 0 is one per core. The output is the same."
        ),
    ] = 0
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace DEST if it holds shards, and another import's DEST.partial."
        ),
    ] = False

    def allowed(self, total: int) -> int:
        """How many of `total` images may be bad. Raises DataError."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", self.max_bad)
        if not match:
            raise DataError(
                f"--max-bad {self.max_bad!r} is neither a number of images nor a share such as 0.1%"
            )

        return int(match[1]) if match[1] else int(float(match[2]) / 100 * total)


def head(splits: Mapping[str, Source], how: How, name: str, unique: bool = False) -> dict[str, Any]:
    """What the bytes of an import follow from, for `partial.replacing`."""
    options = {k: getattr(how, k) for k in ("per_shard", "seed", "resize", "quality", "max_pixels")}
    return {
        **options,
        "name": name,
        "unique": unique,
        "splits": {split: [len(s), s.digest()] for split, s in splits.items()},
    }


def write(
    source: Source,
    folder: Path,
    *,
    name: str = "train",
    how: How,
    unique: bool = False,
    progress: Progress = lambda done, total: None,
) -> Journal:
    """Write folder/NAME-000000.tar ..., their index and classes.json, after what a journal says is
    there already.

    Use inside `partial.replacing`. A bad image makes its shard one sample shorter and changes
    nothing else. `unique`: of images of the same bytes, the first in the order of writing stays.
    Raises DataError.
    """
    # before webdataset is imported: it then neither unpickles nor runs shells
    os.environ["WDS_SECURE"] = "1"
    total = len(source)

    limit = how.allowed(total)
    order: NDArray[np.int64] = rng.permutation(total, how.seed, "write").numpy()
    workers = how.workers or len(os.sched_getaffinity(0))
    # not processes: decoders let go of the interpreter's lock, about 9/10 of the work
    pool = ThreadPoolExecutor(workers)
    copies: Copies | None = None

    try:
        journal = Journal(folder, pool.map)
        begin = min(len(journal.lines) * how.per_shard, total)
        _check(journal.bad, limit)
        bad = len(journal.bad)

        if unique:
            copies = Copies(folder, begin)

        samples = _ahead(
            pool, lambda number: _sample(source, number, how), map(int, order[begin:]), 4 * workers
        )
        if copies is not None:
            samples = _firsts(samples, copies, source, begin)

        # one shard is indexed while the next is written
        closing: Future[None] | None = None
        for start in range(begin, total, how.per_shard):
            path = folder / f"{name}-{start // how.per_shard:06d}.tar"
            found = _shard(
                path, islice(samples, how.per_shard), start, total, limit - bad, progress
            )
            bad += sum(not one.copy for one in found)

            if copies is not None:
                copies.save()

            if closing is not None:
                closing.result()

            closing = pool.submit(journal.add, path, found)

        if closing is not None:
            closing.result()
    finally:
        pool.shutdown(cancel_futures=True)
        if copies is not None:
            copies.close()

    journal.finish(source.classes)
    return journal


def _ahead(
    pool: Executor, work: Callable[[int], Sample], numbers: Iterator[int], most: int
) -> Iterator[Sample]:
    """The results in order, of which a limited number is computed ahead."""
    running: deque[Future[Sample]] = deque()
    for number in numbers:
        running.append(pool.submit(work, number))
        if len(running) == most:
            yield running.popleft().result()

    while running:
        yield running.popleft().result()


def _firsts(
    samples: Iterator[Sample], copies: Copies, source: Source, begin: int
) -> Iterator[Sample]:
    for place, sample in enumerate(samples, begin):
        if isinstance(sample, Ready):
            first = copies.first(sample.digest, place, sample.number)
            if first != sample.number:
                yield Bad(
                    sample.number,
                    source.where(sample.number),
                    f"the same bytes as {source.where(first)}",
                    copy=True,
                )
                continue

        yield sample


def _shard(
    path: Path, samples: Iterator[Sample], start: int, total: int, spare: int, progress: Progress
) -> list[Bad]:
    """Write one tar; the samples that were left out of it. Raises DataError if more than `spare` of
    them are bad.
    """
    from webdataset import TarWriter

    bad: list[Bad] = []
    with (
        path.open("wb") as file,
        TarWriter(file, encoder=False, mtime=0, user="scaletrain", group="scaletrain") as tar,
    ):
        for done, sample in enumerate(samples, start + 1):
            if isinstance(sample, Bad):
                bad.append(sample)
                _check([one for one in bad if not one.copy], spare)
            else:
                tar.write(sample.members)

            progress(done, total)

    return bad


def _check(bad: list[Bad], most: int) -> None:
    if len(bad) > most:
        fix = f"--max-bad N or N% leaves such images out and lists them in {QUARANTINE}"
        raise DataError(f"{bad[-1].path}: {bad[-1].reason}; {fix}")


def _sample(source: Source, number: int, how: How) -> Sample:
    try:
        entry = source.load(number)
        return Ready(number, _members(number, _prepared(entry, how)), digest(entry.image))
    except DataError as error:
        return Bad(number, source.where(number), str(error))


def _prepared(entry: Entry, how: How) -> Entry:
    """The entry, proven to decode; shrunk or re-encoded where asked."""
    pixels = image.strict(entry.image, how.max_pixels)
    size = pixels.shape[:2]
    mask = entry.mask
    if mask is not None and (image.kind(mask) != "png" or _size(mask, how) != size):
        raise ImageError(f"{entry.mask_where}: the mask of this image must be a PNG of its size")

    large = 0 < how.resize < min(size)
    if not large and (how.resize or not how.quality):
        return entry

    if large:
        pixels = image.shrink(pixels, how.resize)
        mask = None if mask is None else maps.shrink(mask, how.resize)

    return replace(entry, image=image.jpeg(pixels, how.quality or QUALITY), mask=mask)


def _size(mask: bytes, how: How) -> tuple[int, int]:
    """Height and width of a mask, proven to decode."""
    image.check(mask, how.max_pixels)
    width, height = image.upright(mask).size
    return height, width


def _members(number: int, entry: Entry) -> Members:
    members: Members = {
        "__key__": f"{number:09d}-{slug(entry.name)}",
        image.kind(entry.image): entry.image,
    }

    if len(entry.labels) == 1:
        members["cls"] = str(entry.labels[0]).encode()
    elif entry.labels:
        members["json"] = json.dumps({"labels": entry.labels}).encode()

    if entry.mask is not None:
        members["mask.png"] = entry.mask

    return members
