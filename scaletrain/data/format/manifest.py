"""The list of a folder's shards, read in pieces into columns: 300,000 shards are 40 MB and not 200,
within a second.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.data.format.tar import BLOCK
from scaletrain.runtime import local_files

# of the whole index, manifest and offset tables alike; an older index is made again
VERSION = 2
NAME = "scaletrain-index.json"
# of version 1, a name that other tools use too
OLD_NAME = "index.json"
# of a manifest; 300,000 shards need 50 MB
MOST_BYTES = 200 << 20
# of a shard
MOST_SAMPLES = 1 << 24
# bytes read at a time
PIECE = 1 << 20
# bytes without a place to cut, which stands behind every shard
UNCUT = 4 << 20
# of a file, on every usual file system
NAME_BYTES = 255
# faults that a Manifest keeps in words
KEPT = 10
# keys of a shard of which there is nothing more to tell
PLAIN = 4
# of a manifest, in which its version stands
HEAD_BYTES = 200
KEYS = {"version", "samples", "shards"}
# of few shards
NOTE = np.dtype([("shard", "<i8"), ("left_out", "<i4"), ("broken", "?"), ("unused", "<i4")])
_HEAD = re.compile(rb'\s*\{\s*"version":\s*(\d{1,9}),\s*"samples":\s*\d+,\s*"shards":\s*\[')

# name: str, samples: int, bytes: int, sha256: str of at most 64 characters, and where there is
# something to tell:
#   left_out: int, how many samples indexing left out; fault: str, why it did so first broken: true,
#   the archive is damaged, so nobody knows how many samples were behind unused: int, how many
#   images are members of another image's sample; first_unused: str, the name of the first
Shard = dict[str, Any]


class Loss(NamedTuple):
    """How many samples an index does not have, because indexing left them out."""

    folder: str
    # of a damaged archive as many as the other shards have more than it
    samples: int
    present: int
    # the first
    fault: str


class ShardManifest(Sequence[Shard]):
    """Shards in canonical order; a single one is made into a Shard when asked for.

    `rows` [S] as `_checked` makes them, `notes` [K] of NOTE, and the first `faults`, each with the
    name of its shard.
    """

    def __init__(
        self,
        rows: NDArray[np.void],
        notes: NDArray[np.void],
        faults: list[tuple[bytes, str]],
        first_unused: str,
    ) -> None:
        self._rows, self._notes, self._faults = rows, notes, faults
        # as the file system has them
        self.names: NDArray[np.bytes_] = rows["name"]
        self.samples: NDArray[np.int64] = rows["samples"]
        self.bytes: NDArray[np.int64] = rows["bytes"]
        self.sha256: NDArray[np.bytes_] = rows["sha256"]
        self.unused = int(notes["unused"].sum())
        self.first_unused = first_unused

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]

        name, samples, size, sha256 = self._rows[number].item()
        return {
            "name": os.fsdecode(name),
            "samples": samples,
            "bytes": size,
            "sha256": str(sha256, "ascii"),
        }

    def only(self, chosen: NDArray[np.bool_]) -> ShardManifest:
        """The shards of the mask `chosen` [S]."""
        rows, notes = self._rows[chosen], self._notes[chosen[self._notes["shard"]]]
        notes["shard"] = (np.cumsum(chosen) - 1)[notes["shard"]]
        names = set(rows["name"].tolist())
        return ShardManifest(
            rows, notes, [fault for fault in self._faults if fault[0] in names], self.first_unused
        )

    def loss(self, folder: str) -> Loss:
        broken = self._notes[self._notes["broken"]]
        whole = np.delete(self.samples, broken["shard"])
        usual = int(np.median(whole)) if len(whole) else 0
        behind = np.maximum(usual - self.samples[broken["shard"]] - broken["left_out"], 0)
        lost = int(self._notes["left_out"].sum() + behind.sum())

        return Loss(
            folder, lost, int(self.samples.sum()), next((text for _, text in self._faults), "")
        )


def version(path: Path) -> int:
    """Of the index that a file is the manifest of; 0 for anything else, such as the `index.json` of
    another tool.
    """
    try:
        with local_files.reader(path) as file:
            return version_in(file.read(HEAD_BYTES))
    except OSError:
        return 0


def version_in(head: bytes) -> int:
    """The same, by the beginning of the file."""
    found = _HEAD.match(head)
    return int(found[1]) if found else 0


def parse(file: IO[bytes], where: str, fix: str) -> ShardManifest:
    """The shards of a manifest. Raises DataError that names `where` it comes from and ends in the
    fix.
    """
    found: list[NDArray[np.void]] = []
    notes: list[tuple[int, int, bool, int]] = []
    faults: list[tuple[bytes, str]] = []
    unused, shards = "", 0

    try:
        for piece in _pieces(file, where, fix):
            raw = json.loads(piece)
            here = VERSION if found else None
            if (
                not isinstance(raw, dict)
                or raw.get("version", here) != VERSION
                or raw.keys() - KEYS
            ):
                raise DataError(f"{where} is not a version {VERSION} manifest; {fix}")
            if not isinstance(raw.get("shards"), list):
                raise DataError(f"{where} is not a version {VERSION} manifest; {fix}")

            found.append(_checked(raw["shards"], where, fix))
            for number, shard in enumerate(raw["shards"], shards):
                if len(shard) > PLAIN:
                    notes.append(_noted(number, shard, where, fix))
                    if "fault" in shard and len(faults) < KEPT:
                        faults.append((os.fsencode(shard["name"]), str(shard["fault"])))
                    unused = unused or str(shard.get("first_unused", ""))

            shards += len(raw["shards"])
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read ({error}); {fix}") from None

    manifest = ShardManifest(np.concatenate(found), np.array(notes, NOTE), faults, unused)
    ordered = np.sort(manifest.names)
    if (ordered[1:] == ordered[:-1]).any():
        raise DataError(f"{where} names a shard twice; {fix}")

    return manifest


def _pieces(file: IO[bytes], where: str, fix: str) -> Iterator[bytes]:
    """Documents of about PIECE bytes, cut between two shards: within a JSON string there is no line
    break.
    """
    head, text, read = b"", b"", 0

    while chunk := file.read(PIECE):
        text += chunk
        read += len(chunk)
        cut = text.rfind(b"},\n{")
        if cut >= 0:
            yield head + text[: cut + 1] + b"]}"
            head, text = b'{"shards": [', text[cut + 3 :]

        if len(text) > UNCUT or read > MOST_BYTES:
            raise DataError(f"{where} is too large or has too long lines to be a manifest; {fix}")

    yield head + text


def _checked(shards: list[Any], where: str, fix: str) -> NDArray[np.void]:
    rows: list[tuple[bytes, int, int, bytes]] = []
    for shard in shards:
        try:
            name, samples, size, sha = (
                shard["name"],
                shard["samples"],
                shard["bytes"],
                shard["sha256"],
            )
            stored = os.fsencode(name), samples, size, sha.encode("ascii")
            well = type(samples) is type(size) is int and len(sha) <= 64
        except (KeyError, TypeError, AttributeError, UnicodeError):
            well = False

        if not well:
            raise DataError(f"{where} has a malformed entry: {str(shard)[:80]}; {fix}")

        inside = (
            "/" not in name
            and "\0" not in name
            and name not in ("", ".", "..")
            and len(stored[0]) <= NAME_BYTES
        )

        if not inside or not 0 <= samples * BLOCK <= size < 1 << 62 or samples > MOST_SAMPLES:
            raise DataError(
                f"{where} names a shard outside its folder or of impossible length: "
                f"{str(shard)[:80]}; {fix}"
            )

        rows.append(stored)

    width = max((len(row[0]) for row in rows), default=1)
    return np.array(
        rows, [("name", f"S{width}"), ("samples", "<i8"), ("bytes", "<i8"), ("sha256", "S64")]
    )


def _noted(number: int, shard: Shard, where: str, fix: str) -> tuple[int, int, bool, int]:
    left_out, broken, unused = (
        shard.get("left_out", 0),
        shard.get("broken", False),
        shard.get("unused", 0),
    )
    if not (
        type(left_out) is type(unused) is int
        and type(broken) is bool
        and max(left_out, unused, 0) < 1 << 31
    ):
        raise DataError(f"{where} has a malformed entry: {str(shard)[:80]}; {fix}")

    return number, max(0, left_out), broken, max(0, unused)
