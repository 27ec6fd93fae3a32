"""Checks shards byte by byte against their index, and that every image decodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scaletrain.data.errors import DataError, ImageError, ShardError, unreadable
from scaletrain.data.format import index, offsets, selection
from scaletrain.data.format.names import is_remote
from scaletrain.data.transforms import image
from scaletrain.runtime import local_files


@dataclass
class VerifyReport:
    shards: int = 0
    samples: int = 0
    labelled: int = 0
    # labels
    unreadable: int = 0
    masks: int = 0
    bytes: int = 0
    faults: list[DataError] = field(default_factory=list)
    # samples that the index does not have
    left_out: int = 0
    # images that are members of another one's sample
    unused: int = 0
    first_unused: str = ""


def verify(
    shards_of: selection.Paths,
    max_pixels: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """All faults, by sample or where an archive breaks off. Raises DataError if the folder itself
    is unusable.
    """
    place = selection.one_folder(shards_of)
    if is_remote(place.folder):
        raise DataError(
            f"{place.folder}: shards are verified where they lie on a disk; those of addresses "
            "while they are read"
        )

    folder = Path(place.folder)
    shards = index.load(shards_of)
    left_out = shards.loss(place.folder).samples
    found = VerifyReport(left_out=left_out, unused=shards.unused, first_unused=shards.first_unused)

    for done, shard in enumerate(shards):
        progress(done, len(shards))
        try:
            rows = _structure(folder / shard["name"], shard, found.faults.append)
        except DataError as error:
            found.faults.append(error)
            continue

        found.shards += 1
        found.samples += len(rows)
        found.labelled += int((rows["label"] >= 0).sum())
        found.unreadable += int((rows["label"] == offsets.UNREADABLE).sum())
        found.masks += int((rows["mask"] > 0).sum())
        found.bytes += shard["bytes"]
        found.faults += _images(folder / shard["name"], rows, max_pixels)

    progress(len(shards), len(shards))
    return found


def _structure(
    path: Path, shard: index.Shard, report: Callable[[ShardError], None]
) -> offsets.OffsetRows:
    """The rows of a shard whose checksum and offset table agree with the manifest. Raises
    ShardError.

    `report` gets the faults inside the archive, which an index made with --skip knows and leaves
    out.
    """
    try:
        with local_files.reader(path) as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise unreadable(path, 0, error) from None

    if size != shard["bytes"]:
        raise ShardError(
            path, size, f"{size} bytes and not the {shard['bytes']} indexed: truncated or altered"
        )

    indexed = offsets.load(index.table_path(path), shard["samples"], shard["bytes"])
    broken: list[ShardError] = []
    rows, _, sha = offsets.scan(path, broken.append)
    altered = len(rows) != len(indexed) or sha != shard["sha256"]

    for fault in broken[altered:]:
        report(fault)

    # which explains the rest
    if altered and broken:
        raise broken[0]

    if len(rows) == len(indexed):
        for row, was in zip(rows, indexed, strict=True):
            if row != was:
                what = "offset, size, crc32, label or key"
                raise ShardError(
                    path, int(was["image"]), f"this sample is not what was indexed ({what})"
                )

    if altered:
        raise ShardError(path, 0, "the sha256 is not the one indexed: altered in names or padding")

    return rows


def _images(path: Path, rows: offsets.OffsetRows, max_pixels: int) -> list[DataError]:
    faults: list[DataError] = []
    data = np.memmap(path, np.uint8, "r")
    for row in rows:
        for member in ("image", "mask"):
            start, size = int(row[member]), int(row[f"{member}_size"])
            if not size:
                continue

            try:
                image.strict(data[start : start + size].tobytes(), max_pixels)
            except ImageError as error:
                faults.append(ShardError(path, start, str(error)))

    return faults
