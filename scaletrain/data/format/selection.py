"""Which shards a path means: those of a folder, of a pattern as
`FOLDER/train-{000000..000099}.tar`, or of a list of both.

A pattern is the last part of a path, with `*`, `?`, `[...]`, `{a,b}` and `{000..127}`; of an
address, with `*` and braces only. A list is a sequence, or the text `[A, B]`, as one writes it in
YAML.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletrain.config.recipe import listed
from scaletrain.data.errors import DataError
from scaletrain.data.format.names import is_remote

Paths = str | Path | Sequence[str]
# names that braces may stand for
MOST = 1_000_000
DIGITS = b"0123456789"
SPLITS = {
    **dict.fromkeys((b"train", b"training"), "train"),
    **dict.fromkeys((b"val", b"valid", b"validation", b"dev"), "val"),
    **dict.fromkeys((b"test", b"testing"), "test"),
}


class ShardSelection(NamedTuple):
    """Paths of one folder, local or an address."""

    folder: str
    # of names; none: all
    patterns: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """What `places` makes this place of."""
        return tuple(f"{self.folder}/{pattern}" for pattern in self.patterns) or (self.folder,)

    def chosen(self, names: NDArray[np.bytes_]) -> NDArray[np.bool_]:
        """Which of the names [S] are meant. Raises DataError for a name or pattern that none of
        them fits.
        """
        if not self.patterns:
            return np.ones(len(names), np.bool_)

        wanted = [name for pattern in self.patterns for name in expanded(pattern)]
        exact = np.array([os.fsencode(name) for name in wanted if not _wild(name)] or [b""])
        chosen = np.isin(names, exact)
        missing = exact[~np.isin(exact, names)]
        if len(missing) and missing[0]:
            raise DataError(f"{self.folder}/{os.fsdecode(missing[0])}: there is no such shard")

        texts = list(map(os.fsdecode, names.tolist())) if any(map(_wild, wanted)) else []
        for name in filter(_wild, wanted):
            fits = re.compile(fnmatch.translate(name)).match
            here = np.fromiter((fits(text) is not None for text in texts), np.bool_, len(texts))
            if not here.any():
                raise DataError(f"{self.folder}/{name}: no shard has such a name")
            chosen |= here

        return chosen


def by_folder(shards: Paths) -> list[ShardSelection]:
    """Folder by folder, in the order of their first mention. Raises DataError."""
    found: dict[str, list[str]] = {}
    whole: set[str] = set()
    for path in _listed(shards):
        folder, pattern = _cut(path)
        found.setdefault(folder, []).append(pattern)
        if not pattern:
            whole.add(folder)

    return [
        ShardSelection(folder, () if folder in whole else tuple(patterns))
        for folder, patterns in found.items()
    ]


def one_folder(shards: Paths) -> ShardSelection:
    """The one folder of shards. Raises DataError for a list of several."""
    first, *others = by_folder(shards)
    if others:
        raise DataError(
            f"{first.folder} and {others[0].folder} are two folders, and one is needed here"
        )

    return first


def one_split(folder: str, names: NDArray[np.bytes_]) -> None:
    """Raises DataError where the shards of a folder are of several splits, as train-*.tar beside
    test-*.tar.

    That is: two of the words `train`, `val`, `test` and their like occur in the names, as words of
    their own.
    """
    # few, where names are numbered
    forms = Counter(b"\n".join(names.tolist()).translate(None, DIGITS).split(b"\n"))
    splits: dict[str, list[bytes]] = {}

    for form in forms:
        if word := next(
            (word for word in re.split(rb"[^a-z]+", form.lower()) if word in SPLITS), b""
        ):
            splits.setdefault(SPLITS[word], []).append(form)

    if len(splits) < 2:
        return

    def pattern(split: str) -> str:
        first = next(
            name for name in names.tolist() if name.translate(None, DIGITS) == splits[split][0]
        )
        return f"{_prefix(first)}*.tar"

    found = sorted(splits, key=list(SPLITS.values()).index)
    shown = " and ".join(
        f"{pattern(split)} ({sum(forms[form] for form in splits[split]):,})" for split in found
    )
    choice = f"choose one, such as {folder}/{pattern(found[0])}, or all of them with {folder}/*.tar"
    raise DataError(f"{folder} holds the shards of several splits, {shown}: {choice}")


def expanded(pattern: str) -> list[str]:
    """The patterns without braces that one with braces stands for, in no order."""
    names, left = [], [pattern]
    while left:
        name = left.pop()
        if found := re.search(r"\{([^{}]*)\}", name):
            left += [
                name[: found.start()] + text + name[found.end() :]
                for text in _alternatives(found[1])
            ]
        elif "{" in name or "}" in name:
            raise DataError(f"{pattern}: a brace is open; write {{a,b}} or {{000..127}}")
        else:
            names.append(name)

        if len(names) + len(left) > MOST:
            raise DataError(f"{pattern} stands for more than {MOST:,} shards")

    return names


def _alternatives(text: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text):
        first, last = int(bounds[1]), int(bounds[2])
        if last < first or last - first >= MOST:
            raise DataError(f"{{{text}}} stands for no shards, or for more than {MOST:,}")
        return [f"{number:0{len(bounds[1])}d}" for number in range(first, last + 1)]

    if "," not in text:
        raise DataError(f"{{{text}}} is neither {{a,b}} nor {{000..127}}")

    return text.split(",")


def _listed(shards: Paths) -> list[str]:
    found = listed(str(shards)) if isinstance(shards, str | Path) else list(shards)
    if not found or not all(found):
        raise DataError(f"{shards}: a list of shards that is empty, or has an empty entry")
    return found


def _cut(path: str) -> tuple[str, str]:
    """Folder and pattern, "" for all shards of the folder."""
    signs = "*{" if is_remote(path) else "*?[{"
    folder, slash, last = path.rpartition("/")
    folder = folder if slash else "."
    pattern = last.endswith(".tar") or any(sign in last for sign in signs)
    if not pattern or (not is_remote(path) and Path(path).is_dir()):
        return path if path.endswith("://") else path.rstrip("/") or "/", ""

    return folder or "/", last


def _wild(name: str) -> bool:
    return any(sign in name for sign in "*?[")


def _prefix(name: bytes) -> str:
    """What stands before the number of a shard."""
    numbered = re.fullmatch(rb"(.*?)\d+\D*", name, re.DOTALL)
    return os.fsdecode(numbered[1] if numbered else name.removesuffix(b".tar"))
