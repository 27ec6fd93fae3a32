"""The ways in which data can be wrong. All are ValueErrors, with one line that says where and what to do."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A data folder, an option or a source that cannot be used."""


class ImageError(DataError):
    """Bytes that are not a usable image. Whoever knows where they come from adds it."""


class ShardError(DataError):
    """A tar shard that is damaged, truncated, altered or hostile. `shard` and `offset` (bytes) say where."""

    def __init__(self, shard: str | Path, offset: int, text: str) -> None:
        line = f"{shard} at byte {offset}: {text}"  # a hostile name must not break the line or steer a terminal
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line))
        self.shard, self.offset, self.text = str(shard), offset, text

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, int, str]]:
        return ShardError, (self.shard, self.offset, self.text)


class LoaderError(DataError):
    """Loader processes died or hang: another start may succeed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h
