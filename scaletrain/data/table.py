"""The offset table of one shard: where each sample's members are, how long, and their crc32.

A sample is a run of members with one key: `key.jpg|jpeg|png|webp`, optionally `key.cls` or `key.json` (`{"label": 3}`, or
`{"labels": [1, 5]}` for many) and `key.mask.png`. The key is the path up to the first dot of its last part, as in WebDataset.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import ShardError
from scaletrain.data.tar import Member, Reader

IMAGES = ("jpg", "jpeg", "png", "webp")
MEMBERS = (*IMAGES, "cls", "json", "txt", "mask.png")
MAGIC = b"STIDX\0\0\1"
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill")  # other readers of such archives would run their code
LABELS = ("cls", "json")  # the first that a sample has
NONE = (0, 0, 0)  # the place of a member that is not there
LABEL_BYTES = 1 << 20
ROW = np.dtype(
    [
        *(("image", "<u8"), ("image_size", "<u4"), ("image_crc", "<u4")),
        *(("target", "<u8"), ("target_size", "<u4"), ("target_crc", "<u4")),  # the label's member; zeros if none
        *(("mask", "<u8"), ("mask_size", "<u4"), ("mask_crc", "<u4")),  # zeros if none
        ("label", "<i8"),  # -1 if none
    ]
)
HEAD = np.dtype([("magic", "S8"), ("samples", "<u8"), ("bytes", "<u8"), ("crc", "<u4"), ("spare", "<u4")])
Rows = NDArray[np.void]


def split(name: str) -> tuple[str, str]:
    """Key and extension: `a/b.mask.png` -> ("a/b", "mask.png")."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def stop(fault: ShardError) -> None:
    """What `scan` does with a fault unless told otherwise."""
    raise fault


def scan(path: Path, report: Callable[[ShardError], None] = stop) -> tuple[Rows, int, str]:
    """Read a whole shard once -> its rows, its bytes and its sha256. Members of other types are passed over unread.

    Each fault goes to `report`. If that returns, a bad sample is left out; where the archive itself is damaged, also the
    sample that may not have ended there, and all that follows.
    """
    reader = Reader(path)
    rows: list[tuple[int, ...]] = []
    seen: set[str] = set()
    try:
        for key, group in groupby(_members(reader), lambda member: split(member.name)[0]):
            try:
                rows.append(_row(path, key, key in seen, group))
            except ShardError as fault:
                report(fault)
            seen.add(key)
    except ShardError as fault:  # between samples
        report(fault)
    return np.array(rows, ROW), reader.bytes, reader.sha256()


def _members(reader: Reader) -> Iterator[Member]:
    """Those of samples: names without a dot, hidden ones and `__x__` are not, as in WebDataset."""
    for member in reader:
        key, extension = split(member.name)
        stem = key.rpartition("/")[2]
        if stem and extension and not (stem.startswith("__") and stem.endswith("__")):
            yield member if extension in MEMBERS else replace(member, data=b"")


def _row(path: Path, key: str, again: bool, members: Iterator[Member]) -> tuple[int, ...]:
    """Of the members that have one key. At most one payload and the label are in memory at a time."""
    places: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, Member] = {}
    start = 0
    for member in members:
        start = start or member.offset
        if again:
            raise ShardError(path, start, f"key '{key}' occurs twice, or its members are not together")
        extension = split(member.name)[1]
        if extension.rpartition(".")[2] in PICKLES:
            raise ShardError(path, member.offset, f"member '{member.name}' is a pickle, which could run code, and is not read")
        if extension in places or (extension in IMAGES and any(e in IMAGES for e in places)):
            raise ShardError(path, member.offset, f"key '{key}' has two members of one kind ('{member.name}')")
        places[extension] = member.offset, len(member.data), zlib.crc32(member.data)
        if extension in LABELS:
            labels[extension] = member
    image = next((places[e] for e in IMAGES if e in places), None)
    if image is None:
        raise ShardError(path, start, f"sample '{key}' has no image ({', '.join(IMAGES)}) but {', '.join(places)[:80]}")
    target = next((e for e in LABELS if e in places), "")
    label = _label(path, key, labels[target]) if target else -1
    return *image, *places.get(target, NONE), *places.get("mask.png", NONE), label


def _label(path: Path, key: str, member: Member) -> int:
    value: Any = None
    try:
        if len(member.data) > LABEL_BYTES:
            raise ValueError
        if member.name.lower().endswith(".cls"):
            value = int(member.data.decode("ascii"))
        else:
            record = json.loads(member.data)
            value = _single(record) if isinstance(record, dict) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < 1 << 62:
        text = f"the label of '{key}' is not a whole number; write `3` in .cls or {{\"label\": 3}} in .json"
        raise ShardError(path, member.offset, text)
    return value


def _single(record: dict[str, Any]) -> Any:
    """`label`, or the only one of `labels`: a sample with several labels has no single one. None if they are malformed."""
    many = record.get("labels")
    if "label" in record or many is None:
        return record.get("label", -1)
    if not isinstance(many, list) or not all(type(label) is int and label >= 0 for label in many):
        return None
    return many[0] if len(many) == 1 else -1


def pack(rows: Rows, shard_bytes: int) -> bytes:
    """The content of `NAME.idx`: a 32-byte head, then the rows."""
    body = rows.tobytes()
    return np.array([(MAGIC, len(rows), shard_bytes, zlib.crc32(body), 0)], HEAD).tobytes() + body


def load(path: Path, samples: int, shard_bytes: int) -> Rows:
    """The rows of an `.idx` file, memory-mapped. Raises ShardError when it is damaged or of another shard."""
    cure = "the index is damaged or of another shard: run shards/index.py --force"
    try:
        size = path.stat().st_size
        if size != HEAD.itemsize + samples * ROW.itemsize:
            raise ShardError(path, 0, f"{size} bytes do not hold {samples} samples; {cure}")
        head = np.fromfile(path, HEAD, 1)[0]
        rows = np.memmap(path, ROW, "r", HEAD.itemsize, (samples,)) if samples else np.zeros(0, ROW)
    except OSError as error:
        raise ShardError(path, 0, f"{error.strerror}; run shards/index.py --force") from None
    expected = (MAGIC, samples, shard_bytes, zlib.crc32(rows.data))
    if (bytes(head["magic"]), head["samples"], head["bytes"], head["crc"]) != expected:
        raise ShardError(path, 0, cure)
    return rows
