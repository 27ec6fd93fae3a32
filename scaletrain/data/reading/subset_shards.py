"""A subset of the samples of shards as a data set of its own."""

from __future__ import annotations

import hashlib

import numpy as np

from scaletrain.data.errors import ShardError
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.reader import Shards, StoredSample
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.storage.prefetch import AccessOrder, MatchedOrder


class SubsetShards:
    """The samples `rows` [n] of shards, in ascending order, with the interface of Shards.

    They are numbered 0 .. n - 1, and this numbering is the only one that everything above the
    reading of shards knows: the plan of an epoch, random keys, substitutes, batches and memories
    of methods. `name` maps a number back to where the sample is stored. `rows` of a subset are
    numbers in that subset.
    """

    def __init__(self, shards: AnyShards, rows: Ints) -> None:
        if isinstance(shards, SubsetShards):
            rows, shards = shards.rows[rows], shards.shards

        self.shards: Shards | ConcatShards = shards
        self.rows: Ints = rows
        self.losses, self.shard_bytes = shards.losses, shards.shard_bytes
        # which samples of which shards these are
        self.fingerprint = hashlib.sha256(
            shards.fingerprint.encode() + np.ascontiguousarray(rows, "<i8").tobytes()
        ).hexdigest()

        ends = rows.searchsorted(np.cumsum(shards.counts))
        in_shards = np.diff(ends, prepend=0)
        parts = shards.parts if isinstance(shards, ConcatShards) else [shards]
        by_folder = np.split(in_shards, np.cumsum([len(part.counts) for part in parts])[:-1])
        # samples of each shard that has any, as an epoch shuffles over these
        self.folder_counts = [counts[counts > 0] for counts in by_folder]
        self.counts = np.concatenate(self.folder_counts)

    def __len__(self) -> int:
        return len(self.rows)

    def check(self) -> None:
        self.shards.check()

    def fits(self, shards: int) -> None:
        self.shards.fits(shards)

    def expect(self, step: int, order: AccessOrder) -> None:
        self.shards.expect(step, MatchedOrder(order, self.rows))

    def read(self, sample: int, mask: bool = False) -> StoredSample:
        return self.shards.read(int(self.rows[sample]), mask)

    def span(self, sample: int) -> tuple[int, int]:
        """The samples [lo, hi) of the subset that are in the folder that contains `sample`."""
        lo, hi = self.rows.searchsorted(self.shards.span(int(self.rows[sample]))).tolist()
        return lo, hi

    def labels(self) -> Ints:
        """The labels of all samples of the subset [n], -1 where unknown."""
        labels: Ints = self.shards.labels()[self.rows]
        return labels

    def unlabelled(self) -> str:
        """As Shards.unlabelled."""
        return self.shards.unlabelled(self.rows)

    def fault(self, sample: int, text: object) -> ShardError:
        return self.shards.fault(int(self.rows[sample]), text)

    def name(self, sample: int) -> str:
        return self.shards.name(int(self.rows[sample]))

    def close(self) -> None:
        self.shards.close()


AnyShards = Shards | ConcatShards | SubsetShards
