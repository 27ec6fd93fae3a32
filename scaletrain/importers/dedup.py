"""Which images of an import occurred before, byte for byte: a table of their hashes on disk, so
memory does not grow.

It lies in the partial folder. A shard's hashes are on disk before the journal names the shard, so
that a resumed import drops those of shards that it writes again, and decides everything as it
would have without the interruption.
"""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path

NAME = ".hashes.sqlite"


class Copies:
    """`begin`: the position in the order of writing from which the import resumes."""

    def __init__(self, folder: Path, begin: int) -> None:
        self._table = sqlite3.connect(folder / NAME, isolation_level=None)
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY, place INTEGER, number "
            "INTEGER) WITHOUT ROWID"
        )
        self._table.execute("BEGIN")
        self._table.execute("DELETE FROM seen WHERE place >= ?", (begin,))

    def first(self, digest: bytes, place: int, number: int) -> int:
        """The number of the sample that had this content first, in the order of writing: `number`
        itself if it is new.
        """
        put = "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
        if self._table.execute(put, (digest, place, number)).rowcount:
            return number

        with closing(
            self._table.execute("SELECT number FROM seen WHERE hash = ?", (digest,))
        ) as found:
            return int(found.fetchone()[0])

    def save(self) -> None:
        """On disk."""
        self._table.execute("COMMIT")
        self._table.execute("BEGIN")

    def close(self) -> None:
        self._table.close()


def digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
