"""The offset table of one shard: the offset, size and crc32 of each sample's members.

A sample consists of consecutive members with the same key: `key.jpg|jpeg|png|webp`, optionally
`key.cls` or `key.json` (`{"label": 3}`, or `{"labels": [1, 5]}` for several) and `key.mask.png`.
The key is the path up to the first dot of its last part, as in WebDataset.

Where by this rule members have no image (`img.1.jpg`, `img.2.jpg`), each of their images is a
sample whose key is its name without the suffix (`img.1`). It has the label with the longest key
that is a prefix of its own (`img.1.cls`, else `img.cls`).
"""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import ArchiveError, ShardError
from scaletrain.data.format.manifest import VERSION
from scaletrain.data.format.tar import Member, Reader
from scaletrain.runtime import local_files

IMAGES = ("jpg", "jpeg", "png", "webp")
# extensions of labels; a sample has the first that it contains
LABELS = ("cls", "json")
MASK = "mask.png"
MEMBERS = (*IMAGES, *LABELS, "txt", MASK)
# suffix of an offset table, appended to the name of its shard
SUFFIX = ".stidx"
MAGIC = b"STIDX\0\0" + bytes([VERSION])
# extensions of pickles, whose code other readers of such archives would run
PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "joblib", "dill")
# the location of a missing member
NONE = (0, 0, 0)
NO_LABEL = -1
# the label is no whole number; methods that need no labels still use the sample
UNREADABLE = -2
LABEL_BYTES = 1 << 20
# bytes of a table to read at a time
PIECE = 1 << 20
ROW = np.dtype(
    [
        *(("image", "<u8"), ("image_size", "<u4"), ("image_crc", "<u4")),
        # the member with the label; zeros if there is none
        *(("target", "<u8"), ("target_size", "<u4"), ("target_crc", "<u4")),
        # zeros if there is none
        *(("mask", "<u8"), ("mask_size", "<u4"), ("mask_crc", "<u4")),
        # NO_LABEL, UNREADABLE, or the class
        ("label", "<i8"),
        # its `key_hash`
        ("key", "<u8"),
    ]
)
HEAD = np.dtype(
    [("magic", "S8"), ("samples", "<u8"), ("bytes", "<u8"), ("crc", "<u4"), ("spare", "<u4")]
)
OffsetRows = NDArray[np.void]
OffsetRow = tuple[int, ...]


class SampleMember(NamedTuple):
    """A member of a sample, without its payload."""

    name: str
    extension: str
    # offset, size and crc32 of the payload
    place: tuple[int, int, int]
    label: int = NO_LABEL


def split(name: str) -> tuple[str, str]:
    """Key and extension: `a/b.mask.png` -> ("a/b", "mask.png")."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def key_of(name: str) -> str:
    """The key of the sample to which a member of this name belongs; an image with several dots
    counts as a sample of its own.
    """
    key, extension = split(name)
    return (
        name.rpartition(".")[0] if extension not in MEMBERS and _last(extension) in IMAGES else key
    )


def key_hash(key: str) -> int:
    """A 64-bit hash by which samples of several data sets are matched."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def stop(fault: ShardError) -> None:
    """Raise the fault: what `scan` does by default."""
    raise fault


def scan(
    path: Path,
    report: Callable[[ShardError], None] = stop,
    unused: Callable[[str], None] = lambda name: None,
) -> tuple[OffsetRows, int, str]:
    """Read a whole shard once -> its rows, its bytes and its sha256. Members of other types are
    skipped.

    `report` is called with each fault. If it returns, a bad sample is left out; where the archive
    itself is damaged (ArchiveError), so are the sample at that byte, which may be incomplete, and
    all that follow. `unused` is called with the name of every image that belongs to the sample of
    another image, such as `cat.v2.jpg` where there is a `cat.jpg`.
    """
    reader = Reader(path)

    rows: list[OffsetRow] = []
    seen: set[str] = set()
    try:
        for key, group in groupby(_members(reader), itemgetter(0)):
            for item in _samples(path, key, _parts(group), seen):
                if isinstance(item, ShardError):
                    report(item)
                elif isinstance(item, str):
                    unused(item)
                else:
                    rows.append(item)
    except ArchiveError as fault:
        report(fault)

    return np.array(rows, ROW), reader.bytes, reader.sha256()


def _members(reader: Reader) -> Iterator[tuple[str, str, Member]]:
    """The members of samples, with key and extension. As in WebDataset, names without a dot, hidden
    names and `__x__` are ignored.
    """
    for member in reader:
        key, extension = split(member.name)
        stem = key.rpartition("/")[2]
        if stem and extension and not (stem.startswith("__") and stem.endswith("__")):
            known = extension in MEMBERS or _last(extension) in (*IMAGES, *LABELS)
            yield key, extension, member if known else replace(member, data=b"")


def _parts(members: Iterator[tuple[str, str, Member]]) -> list[SampleMember]:
    """The members without their payloads, of which only one at a time is in memory."""
    parts: list[SampleMember] = []
    extensions: set[str] = set()
    for _, extension, member in members:
        label, last = NO_LABEL, _last(extension)
        # if there is an image with this very key, only its own label counts
        counts = extension in LABELS or (last in LABELS and extensions.isdisjoint(IMAGES))
        if counts and "cls" not in extensions:
            label = label_in(member.data, last)

        extensions.add(extension)
        place = member.offset, len(member.data), zlib.crc32(member.data)
        parts.append(SampleMember(member.name, extension, place, label))

    return parts


def _samples(
    path: Path, key: str, parts: list[SampleMember], seen: set[str]
) -> Iterator[OffsetRow | str | ShardError]:
    """The rows, names of unused images, and faults of the members with one key."""
    plain = any(part.extension in IMAGES for part in parts)
    dotted = [
        part.name for part in parts if part.extension not in MEMBERS and _image(part.extension)
    ]

    for own, members in _apart(key, parts) if dotted and not plain else [(key, parts)]:
        try:
            if key in seen or own in seen:
                text = f"key '{own}' occurs twice, or its members are not together"
                raise ShardError(path, members[0].place[0], text)
            seen.add(own)
            yield _row(path, own, members)
        except ShardError as fault:
            yield fault

    if plain:
        yield from dotted


def _apart(key: str, parts: list[SampleMember]) -> Iterator[tuple[str, list[SampleMember]]]:
    """The key and members of each image, where all images of a key have further dots."""
    members: dict[str, list[SampleMember]] = {}
    for part in parts:
        extension = MASK if part.extension.endswith(f".{MASK}") else _last(part.extension)
        stem = part.name[len(key) + 1 : -len(extension)].rstrip(".")
        members.setdefault(stem, []).append(part._replace(extension=extension))

    for stem, own in members.items():
        if not any(part.extension in (*IMAGES, *PICKLES) for part in own):
            continue

        shorter = stem
        while shorter and not any(part.extension in LABELS for part in own):
            shorter = shorter.rpartition(".")[0]
            own = [*own, *(part for part in members.get(shorter, ()) if part.extension in LABELS)]

        yield f"{key}.{stem}", own


def _row(path: Path, key: str, members: list[SampleMember]) -> OffsetRow:
    by_extension: dict[str, SampleMember] = {}
    for part in members:
        if _last(part.extension) in PICKLES:
            text = f"member '{part.name}' is a pickle, which could run code, and is not read"
            raise ShardError(path, part.place[0], text)

        if part.extension in by_extension or (
            part.extension in IMAGES and not by_extension.keys().isdisjoint(IMAGES)
        ):
            raise ShardError(
                path, part.place[0], f"key '{key}' has two members of one kind ('{part.name}')"
            )

        by_extension[part.extension] = part

    image = next((by_extension[e].place for e in IMAGES if e in by_extension), None)
    if image is None:
        text = (
            f"sample '{key}' has no image ({', '.join(IMAGES)}) but {', '.join(by_extension)[:80]}"
        )
        raise ShardError(path, members[0].place[0], text)

    nothing = SampleMember("", "", NONE)
    target = next((by_extension[e] for e in LABELS if e in by_extension), nothing)
    return (
        *image,
        *target.place,
        *by_extension.get(MASK, nothing).place,
        target.label,
        key_hash(key),
    )


def _last(extension: str) -> str:
    return extension.rpartition(".")[2]


def _image(extension: str) -> bool:
    return _last(extension) in IMAGES and not extension.endswith(f".{MASK}")


def label_in(data: bytes, extension: str) -> int:
    """The label in a .cls or .json member; NO_LABEL for -1 and for a record without a label,
    UNREADABLE for anything else.
    """
    try:
        if len(data) > LABEL_BYTES:
            return UNREADABLE

        if extension == "cls":
            value: Any = int(data.decode("ascii"))
        else:
            record = json.loads(data)
            value = _single(record) if isinstance(record, dict) else None
    except (ValueError, RecursionError):
        return UNREADABLE

    return value if type(value) is int and NO_LABEL <= value < 1 << 62 else UNREADABLE


def _single(record: dict[str, Any]) -> Any:
    """The value of `label`, or the only one of `labels`; NO_LABEL if there are several, None if
    they are malformed.
    """
    if record.get("label") is not None:
        return record["label"]

    many = record.get("labels")
    if many is None:
        return NO_LABEL
    if not isinstance(many, list) or not all(
        type(label) is int and label >= NO_LABEL for label in many
    ):
        return None

    known = [label for label in many if label != NO_LABEL]
    return known[0] if len(known) == 1 else NO_LABEL


def abbreviated(data: bytes) -> str:
    """The content of a member with a label, shortened for an error message."""
    if len(data) > LABEL_BYTES:
        return f"{len(data):,} bytes"

    value: Any = data.decode("utf-8", "backslashreplace")
    with suppress(ValueError, RecursionError):
        record = json.loads(data)
        value = record.get("label", record.get("labels")) if isinstance(record, dict) else record

    return reprlib.repr(value)


def pack(rows: OffsetRows, shard_bytes: int) -> bytes:
    """The content of a table's file: a 32-byte header, then the rows."""
    body = rows.tobytes()
    return np.array([(MAGIC, len(rows), shard_bytes, zlib.crc32(body), 0)], HEAD).tobytes() + body


def load(path: Path, samples: int, shard_bytes: int) -> OffsetRows:
    """The memory-mapped rows of a table. Raises ShardError if it is damaged or belongs to another
    shard.
    """
    fix = "run scaletrain shards index --force on its folder"
    size = HEAD.itemsize + samples * ROW.itemsize

    try:
        with local_files.reader(path) as file:
            if (actual := os.fstat(file.fileno()).st_size) != size:
                raise ShardError(
                    path,
                    0,
                    f"{actual} bytes do not hold {samples} samples; the index is damaged: {fix}",
                )

            head = np.frombuffer(file.read(HEAD.itemsize), HEAD)[0]
            crc = 0
            # read instead of mapped, which would count as memory of this process
            while piece := file.read(PIECE):
                crc = zlib.crc32(piece, crc)

            rows = (
                np.memmap(file, ROW, "r", HEAD.itemsize, (samples,))
                if samples
                else np.zeros(0, ROW)
            )
    except OSError as error:
        raise ShardError(path, 0, f"{error.strerror}; {fix}") from None

    expected = (MAGIC, samples, shard_bytes, crc)
    if (bytes(head["magic"]), head["samples"], head["bytes"], head["crc"]) != expected:
        raise ShardError(path, 0, f"the index is damaged or of another shard: {fix}")

    return rows
