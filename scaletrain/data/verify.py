"""Checks a folder of shards byte by byte against its index, and that every image decodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from scaletrain.data import image, index, table
from scaletrain.data.errors import DataError, ImageError, ShardError


@dataclass
class Found:
    shards: int = 0
    samples: int = 0
    labelled: int = 0
    masks: int = 0
    bytes: int = 0
    faults: list[DataError] = field(default_factory=list)


def verify(folder: Path, max_pixels: int, progress: Callable[[int, int], None] = lambda done, total: None) -> Found:
    """All faults, by sample or where an archive breaks off. Raises DataError if the folder itself is unusable."""
    shards = index.load(folder)
    found = Found()
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
        found.masks += int((rows["mask"] > 0).sum())
        found.bytes += shard["bytes"]
        found.faults += _images(folder / shard["name"], rows, max_pixels)
    progress(len(shards), len(shards))
    return found


def _structure(path: Path, shard: index.Shard, report: Callable[[ShardError], None]) -> table.Rows:
    """The rows of a shard whose checksum and offset table agree with the manifest. Raises ShardError.

    `report` gets the faults inside the archive, which an index made with --skip knows and leaves out.
    """
    if path.stat().st_size != shard["bytes"]:
        raise ShardError(
            path, path.stat().st_size, f"{path.stat().st_size} bytes and not the {shard['bytes']} indexed: truncated or altered"
        )
    indexed = table.load(index.table_path(path), shard["samples"], shard["bytes"])
    broken: list[ShardError] = []
    rows, _, sha = table.scan(path, broken.append)
    altered = len(rows) != len(indexed) or sha != shard["sha256"]
    for fault in broken[altered:]:
        report(fault)
    if altered and broken:  # which explains the rest
        raise broken[0]
    if len(rows) == len(indexed):
        for row, was in zip(rows, indexed, strict=True):
            if row != was:
                raise ShardError(path, int(was["image"]), "this sample is not what was indexed (offset, size, crc32 or label)")
    if altered:
        raise ShardError(path, 0, "the sha256 is not the one indexed: altered in names or padding")
    return rows


def _images(path: Path, rows: table.Rows, max_pixels: int) -> list[DataError]:
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
