"""Where a test set is looked for; without torch, for those that only name it."""

from __future__ import annotations

from pathlib import Path

from scaletrain.data.format import selection


def next_to(train: str) -> tuple[Path, Path]:
    """The folders `test` and `val` next to a training set; the first one that is there is used."""
    place = Path(selection.by_folder(train)[0].folder).parent
    return place / "test", place / "val"
