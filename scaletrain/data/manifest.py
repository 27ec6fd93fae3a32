"""The list of a folder's shards, read in pieces into columns: 300,000 shards are 40 MB and not 200, within a second."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.data.tar import BLOCK

VERSION = 1
KEYS = {"version", "samples", "shards"}
PIECE = 1 << 20  # bytes read at a time
NAME_BYTES = 255  # of a file, on every usual file system
Shard = dict[str, Any]  # name: str, samples: int, bytes: int, sha256: str of at most 64 characters


class Manifest(Sequence[Shard]):
    """Shards in canonical order, [S] each; a single one is made into a Shard when asked for."""

    def __init__(self, rows: list[NDArray[np.void]]) -> None:
        self.names: NDArray[np.bytes_] = np.concatenate([r["name"] for r in rows])  # as the file system has them
        self.samples: NDArray[np.int64] = np.concatenate([r["samples"] for r in rows])
        self.bytes: NDArray[np.int64] = np.concatenate([r["bytes"] for r in rows])
        self.sha256: NDArray[np.bytes_] = np.concatenate([r["sha256"] for r in rows])

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, number: int) -> Shard: ...
    @overload
    def __getitem__(self, number: slice) -> list[Shard]: ...
    def __getitem__(self, number: int | slice) -> Shard | list[Shard]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        sizes = {"samples": int(self.samples[number]), "bytes": int(self.bytes[number])}
        return {"name": os.fsdecode(self.names[number]), **sizes, "sha256": str(self.sha256[number], "ascii")}


def parse(file: IO[bytes], where: str, cure: str) -> Manifest:
    """The shards of a manifest. Raises DataError that names `where` it comes from and ends in the cure."""
    found: list[NDArray[np.void]] = []
    try:
        for piece in _pieces(file):
            raw = json.loads(piece)
            version = VERSION if found else None
            if not isinstance(raw, dict) or raw.get("version", version) != VERSION or raw.keys() - KEYS:
                raise DataError(f"{where} is not a version {VERSION} manifest; {cure}")
            if not isinstance(raw.get("shards"), list):
                raise DataError(f"{where} is not a version {VERSION} manifest; {cure}")
            found.append(_checked(raw["shards"], where, cure))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} cannot be read ({error}); {cure}") from None
    manifest = Manifest(found)
    ordered = np.sort(manifest.names)
    if (ordered[1:] == ordered[:-1]).any():
        raise DataError(f"{where} names a shard twice; {cure}")
    return manifest


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Documents of about PIECE bytes, cut between two shards: within a JSON string there is no line break."""
    head, text = b"", b""
    while chunk := file.read(PIECE):
        text += chunk
        cut = text.rfind(b"},\n{")
        if cut >= 0:
            yield head + text[: cut + 1] + b"]}"
            head, text = b'{"shards": [', text[cut + 3 :]
    yield head + text


def _checked(shards: list[Any], where: str, cure: str) -> NDArray[np.void]:
    rows: list[tuple[bytes, int, int, bytes]] = []
    for shard in shards:
        try:
            name, samples, size, sha = shard["name"], shard["samples"], shard["bytes"], shard["sha256"]
            stored = os.fsencode(name), samples, size, sha.encode("ascii")
            well = type(samples) is type(size) is int and len(sha) <= 64
        except (KeyError, TypeError, AttributeError, UnicodeError):
            well = False
        if not well:
            raise DataError(f"{where} has a malformed entry: {str(shard)[:80]}; {cure}")
        inside = "/" not in name and "\0" not in name and name not in ("", ".", "..") and len(stored[0]) <= NAME_BYTES
        if not inside or not 0 <= samples * BLOCK <= size < 1 << 62:
            raise DataError(f"{where} names a shard outside its folder or of impossible length: {str(shard)[:80]}; {cure}")
        rows.append(stored)
    width = max((len(row[0]) for row in rows), default=1)
    return np.array(rows, [("name", f"S{width}"), ("samples", "<i8"), ("bytes", "<i8"), ("sha256", "S64")])
