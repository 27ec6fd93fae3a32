"""Several folders of shards as one data set, numbered folder after folder, and their class
names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletrain.config.schema import CacheConfig
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import names, selection
from scaletrain.data.format.names import CLASSES
from scaletrain.data.reading.reader import DEFAULT_CACHE, OPEN_SHARDS, Shards, StoredSample
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.storage import remote
from scaletrain.data.storage.prefetch import AccessOrder, FolderOrder
from scaletrain.runtime import local_files

CLASSES_BYTES = 16 << 20
# above this size, a classes.json must be a flat list of names
OTHER_BYTES = 1 << 20
# a flat JSON list of strings
_NAMES = re.compile(rb'\s*\[(?:\s*"(?:[^"\\]|\\.)*+"\s*,?)*+\s*\]\s*')


class ConcatShards:
    """The shards of several folders, with the interface of Shards.

    Labels are -1 unless all folders have the same classes.json, since class 3 of one folder may not
    be class 3 of another.
    """

    def __init__(
        self,
        folders: Sequence[selection.Paths],
        skip: bool = False,
        cache: CacheConfig = DEFAULT_CACHE,
        keep: int = OPEN_SHARDS,
    ) -> None:
        # the limit on open files is per process
        self.parts = [
            Shards(folder, keep=max(1, keep // len(folders)), skip=skip, cache=cache)
            for folder in folders
        ]
        self._first = np.cumsum([0, *map(len, self.parts)])
        first, *others = map(classes, folders)
        self.labelled = first is not None and all(other == first for other in others)
        self.folder_counts = [part.counts for part in self.parts]
        self.counts = np.concatenate(self.folder_counts)
        self.losses = tuple(loss for part in self.parts for loss in part.losses)
        # of the bytes of all shards of all folders, in this order
        self.fingerprint = hashlib.sha256(
            "".join(part.fingerprint for part in self.parts).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def shard_bytes(self) -> float:
        shards = [len(part.counts) for part in self.parts]
        return float(np.average([part.shard_bytes for part in self.parts], weights=shards))

    def check(self) -> None:
        for part in self.parts:
            part.check()

    def fits(self, shards: int) -> None:
        for part in self.parts:
            part.fits(shards)

    def expect(self, step: int, order: AccessOrder) -> None:
        for number, part in enumerate(self.parts):
            part.expect(
                step, FolderOrder(order, int(self._first[number]), int(self._first[number + 1]))
            )

    def read(self, sample: int, mask: bool = False) -> StoredSample:
        part, number = self._find(sample)
        stored = part.read(number, mask)
        return stored if self.labelled else stored._replace(label=-1)

    def labels(self) -> NDArray[np.int64]:
        """The labels of all samples [N], -1 where unknown or where the folders' classes differ."""
        labels = np.concatenate([part.labels() for part in self.parts])
        return labels if self.labelled else np.full_like(labels, -1)

    def key_hashes(self) -> NDArray[np.uint64]:
        """As Shards.key_hashes."""
        return np.concatenate([part.key_hashes() for part in self.parts])

    def unlabelled(self, rows: Ints | None = None) -> str:
        """As Shards.unlabelled; `rows` ascending."""
        samples = len(self) if rows is None else len(rows)
        if not self.labelled:
            what = f"that counts, since the folders differ in {CLASSES} or lack it"
            return f"{samples:,} of {samples:,} samples have no label {what}"

        for number, part in enumerate(self.parts):
            lo, hi = self._first[number : number + 2]
            own = None if rows is None else rows[(rows >= lo) & (rows < hi)] - lo
            if text := part.unlabelled(own):
                return f"{part.folder}: {text}"

        return ""

    def span(self, sample: int) -> tuple[int, int]:
        """The samples [lo, hi) of the folder that contains `sample`."""
        part = int(self._first.searchsorted(sample, "right")) - 1
        return int(self._first[part]), int(self._first[part + 1])

    def fault(self, sample: int, text: object) -> ShardError:
        part, number = self._find(sample)
        return part.fault(number, text)

    def name(self, sample: int) -> str:
        """FOLDER/SHARD.tar/KEY, since shards of different folders may have the same name."""
        part, number = self._find(sample)
        return f"{part.folder}/{part.name(number)}"

    def key(self, sample: int) -> str:
        part, number = self._find(sample)
        return part.name(number).partition("/")[2]

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _find(self, sample: int) -> tuple[Shards, int]:
        part = int(self._first.searchsorted(sample, "right")) - 1
        return self.parts[part], sample - int(self._first[part])


def shards_of(
    shards: selection.Paths,
    skip: bool = False,
    cache: CacheConfig = DEFAULT_CACHE,
    keep: int = OPEN_SHARDS,
) -> Shards | ConcatShards:
    """Open the shards of one folder, or of all folders of a list. Raises DataError."""
    places = selection.by_folder(shards)
    if len(places) == 1:
        return Shards(shards, keep=keep, skip=skip, cache=cache)
    return ConcatShards([place.paths for place in places], skip, cache, keep)


def classes(shards: selection.Paths) -> bytes | None:
    """The content of the folder's classes.json, which lists the names of the classes by label; None
    if there is none.

    Raises DataError if it cannot be read, or if parsing it could take many times its size in
    memory.
    """
    folder = selection.one_folder(shards).folder

    try:
        if names.is_remote(folder):
            data = remote.read(remote.origin(folder), CLASSES, CLASSES_BYTES)
        else:
            data = local_files.read(Path(folder, CLASSES), CLASSES_BYTES)
    except (FileNotFoundError, remote.LostError):
        return None
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from None

    if len(data) > OTHER_BYTES and not _NAMES.fullmatch(data):
        raise DataError(
            f"{folder}/{CLASSES} is no JSON list of names; restore it, or delete it if it is not "
            "of these shards"
        )

    return data
