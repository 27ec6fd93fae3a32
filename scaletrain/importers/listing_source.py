"""Images named by a listing: CSV or Parquet, one row an image, with its path or web address and no,
one or many labels.

The listing is read once, row by row, into a table in an unnamed temporary file, as large as the
image and label columns. Memory is 8 bytes a row for the table's offsets and up to 40 for the
shuffle of `write`: 15 GB for 300 million rows.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import math
import os
import re
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from scaletrain.data.errors import DataError
from scaletrain.importers.sources import clutter, plain, read
from scaletrain.importers.write import Entry
from scaletrain.runtime import local_files

# names that a column of images may have
IMAGES = ("path", "url", "image", "file")
LABELS = ("label", "labels")
# more are a sign of the wrong column
MOST_CLASSES = 1_000_000
WHOLE = re.compile(r"\d{1,18}", re.ASCII)
# what programs write where there is nothing
NULLS = ("na", "n/a", "nan", "null", "none")
ODD = {
    "null": "may mean that there is none",
    "fraction": "is no whole number from 0 on, of at most 18 digits",
    "name": "is a name, where most are numbers",
    "number": "is a number, where most are names",
}


class Columns(NamedTuple):
    # "": the first of IMAGES
    image: str = ""
    # "": the first of LABELS, if any
    label: str = ""
    # between the labels of a CSV cell
    separator: str = ";"
    # words that mean that there is none, in addition to -1 and null; "": an empty cell does
    no_label: tuple[str, ...] = ()
    # labels are names, even where they look like numbers
    names: bool = False


class Row(NamedTuple):
    # file and row, for errors
    where: str
    image: str
    labels: list[str]
    # the cell of the labels, though nobody said that this means that there is none
    empty: bool = False


class Labels:
    """The labels of a listing as they are met, and the classes that they become.

    They are numbers where all of them are whole numbers, and names where none is one. Anything
    between is refused, unless the classes are `given`, or all labels are `names`: one word among
    numbers would make names of all of them, sorted as texts.
    """

    def __init__(self, given: tuple[str, ...], names: bool) -> None:
        # as written, in the order met
        self.seen: dict[str, int] = {}
        # of each of them
        self._kinds: list[str] = []
        # of each kind
        self._rows: Counter[str] = Counter()
        # of each kind, with its place
        self._firsts: dict[str, str] = {}
        # the place of the first row without a label that should have one
        self.first_empty = ""
        self._names = names
        self._given = {name: number for number, name in enumerate(given)}
        # else a number is the name of a class
        self._positions = not names and not any(map(WHOLE.fullmatch, given))

        if len(self._given) < len(given):
            raise DataError("--classes names a class twice")

    def add(self, label: str, where: str) -> int:
        """The place of a label in `seen`. Raises DataError."""
        number = self.seen.setdefault(label, len(self.seen))
        if number == MOST_CLASSES:
            raise DataError(
                f"{where}: more than {MOST_CLASSES:,} different labels; name the right column with "
                "--label"
            )

        if number == len(self._kinds):
            self._kinds.append(self._kind(label, where))

        kind = self._kinds[number]
        self._rows[kind] += 1
        self._firsts.setdefault(kind, f"{where}: label '{label}'")
        return number

    def numbered(self) -> tuple[tuple[str, ...], array[int]]:
        """The names of the classes, and the class of each of `seen`, without gaps. Raises DataError
        for odd rows.
        """
        if self.first_empty and self.seen:
            fix = (
                "fill it, write -1, or give --no-label '' where an empty cell means that there "
                "is none"
            )
            raise DataError(f"{self.first_empty}: no label, where other rows have one; {fix}")

        rarer = [kind for kind, _ in self._rows.most_common()[1:]]
        odd = next((kind for kind in ("null", "fraction", *rarer) if kind in self._rows), "")
        if odd:
            fix = (
                "correct it, or give --no-label WORD where a word means that there is none, or "
                "--names if all labels are names"
            )
            raise DataError(f"{self._firsts[odd]} {ODD[odd]}; {fix}")

        numbers = "number" in self._rows
        if self._given:
            classes = [int(label) if numbers else self._given[label] for label in self.seen]
            return tuple(self._given), array("q", classes)

        values = [int(label) if numbers else label for label in self.seen]
        order = {value: number for number, value in enumerate(sorted(set(values)))}
        return tuple(map(str, order)), array("q", [order[value] for value in values])

    def _kind(self, label: str, where: str) -> str:
        if label in self._given or (self._names and not self._given):
            return "name"

        whole = WHOLE.fullmatch(label) is not None
        if self._given and not (self._positions and whole and int(label) < len(self._given)):
            outside = whole and self._positions
            fault = (
                f"is outside the {len(self._given)} classes of --classes"
                if outside
                else "is not in --classes"
            )

            raise DataError(
                f"{where}: label '{label}' {fault}; add it there, or give --no-label WORD where "
                "there is none"
            )

        if whole:
            return "number"
        if label.casefold() in NULLS:
            return "null"

        try:
            float(label)
        except ValueError:
            return "name"

        return "fraction"


class Listing:
    """Samples in the order of the rows. `classes` are the names by number, those `given` or else
    those that occur, sorted.
    """

    def __init__(
        self,
        source: Path,
        columns: Columns,
        fetch: Callable[[str], bytes],
        *,
        root: Path,
        scratch: Path,
        given: tuple[str, ...] = (),
    ) -> None:
        self.root, self.fetch = root, fetch
        self.ignored: Counter[str] = Counter()
        self._offsets = array("Q", [0])
        self._hash = hashlib.sha256()
        self._table = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 -- without a name: it goes however the process ends
        weakref.finalize(self, self._table.close)

        labels = Labels(given, columns.names)
        for row in _rows(source, columns):
            self._add(row, labels)

        self._table.flush()
        if not len(self):
            raise DataError(f"{source} lists no images")

        self.labelled = bool(labels.seen)
        self.classes, self._numbers = labels.numbered()
        self.renumbered = not given and any(
            name.isdigit() and int(name) != n for n, name in enumerate(self.classes)
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def where(self, number: int) -> str:
        image = self._row(number)[0]
        return image if "://" in image else plain(str(self.root / image))

    def load(self, number: int) -> Entry:
        image, found = self._row(number)
        labels = tuple(sorted(self._numbers[label] for label in found))
        if "://" in image:
            return Entry(PurePosixPath(urlsplit(image).path).stem, self.fetch(image), labels)
        return Entry(str(Path(image).with_suffix("")), read(self.root / image), labels)

    def digest(self) -> str:
        return hashlib.sha256(
            self._hash.digest() + json.dumps([self.classes, list(self._numbers)]).encode()
        ).hexdigest()

    def _add(self, row: Row, labels: Labels) -> None:
        if not row.image:
            raise DataError(f"{row.where}: no path or address")

        *folders, name = row.image.split("/")
        odd = clutter(name) or next(
            (folder for folder in folders if folder.lower() == "__macosx"), ""
        )

        if odd and "://" not in row.image:
            self.ignored[odd] += 1
            return

        if row.empty:
            labels.first_empty = labels.first_empty or row.where

        data = json.dumps(
            [row.image, sorted({labels.add(label, row.where) for label in row.labels})]
        ).encode()
        self._table.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def _row(self, number: int) -> tuple[str, list[int]]:
        begin, end = self._offsets[number], self._offsets[number + 1]
        image, labels = json.loads(os.pread(self._table.fileno(), end - begin, begin))
        return image, labels


def _rows(source: Path, columns: Columns) -> Iterator[Row]:
    """Of one file, or of all .csv and .parquet files of a folder by name."""
    parts = [source]
    if source.is_dir():
        parts = sorted(
            p for p in source.iterdir() if p.suffix in (".csv", ".parquet") and not clutter(p.name)
        )

    if not parts:
        raise DataError(f"{source} holds neither .csv nor .parquet files")

    for part in parts:
        yield from _parquet(part, columns) if part.suffix == ".parquet" else _csv(part, columns)


def _csv(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        with io.TextIOWrapper(local_files.reader(path), encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            head = next(lines, [])
            image, label = _find(head, columns, path)
            for cells in lines:
                if not cells:
                    continue

                where = f"{path}, line {lines.line_num}"
                if len(cells) != len(head):
                    raise DataError(
                        f"{where}: {len(cells)} cells, and {len(head)} columns in the first line"
                    )

                texts = [] if label is None else cells[label].split(columns.separator or None)
                empty = (
                    label is not None and not cells[label].strip() and "" not in columns.no_label
                )
                yield Row(where, cells[image].strip(), _texts(texts, columns, where), empty)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read: {error}; save it as UTF-8") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except csv.Error as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        arrow, parquet = (
            importlib.import_module("pyarrow"),
            importlib.import_module("pyarrow.parquet"),
        )
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or write the listing as "
            "CSV"
        ) from None

    try:
        # which says what is no file
        os.close(local_files.open_file(path))
        file = parquet.ParquetFile(path)
        head = list(file.schema_arrow.names)
        image, label = _find(head, columns, path)
        number = 0

        for batch in file.iter_batches(
            1 << 14, columns=[head[i] for i in (image, label) if i is not None]
        ):
            images = batch.column(head[image]).to_pylist()
            labels = (
                [None] * len(images) if label is None else batch.column(head[label]).to_pylist()
            )

            for name, value in zip(images, labels, strict=True):
                where = f"{path}, row {number}"
                yield Row(
                    where,
                    str(name or ""),
                    _texts(value if isinstance(value, list) else [value], columns, where),
                )

                number += 1
    except (OSError, arrow.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read: "
            f"{getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from None


def _find(head: list[str], columns: Columns, path: Path) -> tuple[int, int | None]:
    """The columns of image and label; a column that was asked for must be there, and no
    name twice.
    """
    head = [name.strip() for name in head]
    image = next((n for n in ([columns.image] if columns.image else IMAGES) if n in head), None)
    label = next((n for n in ([columns.label] if columns.label else LABELS) if n in head), None)

    if image is None or (columns.label and label is None):
        option, name = (
            ("--image", columns.image or " or ".join(IMAGES))
            if image is None
            else ("--label", columns.label)
        )
        raise DataError(
            f"{path} has no column {name}, only {', '.join(head) or 'an empty first line'}; choose "
            f"with {option}"
        )

    if twice := next(
        (name for name in (image, label) if name is not None and head.count(name) > 1), None
    ):
        raise DataError(f"{path} has two columns {twice}; rename one of them")

    return head.index(image), None if label is None else head.index(label)


def _texts(values: list[Any], columns: Columns, where: str) -> list[str]:
    """Labels as text; nulls, -1 and words that say so are none. Tables with gaps keep whole numbers
    as 3.0.
    """
    texts = []

    for value in values:
        if value is None or value == -1 or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise DataError(
                f"{where}: a label of type {type(value).__name__}, which is neither a number nor a "
                "name"
            )

        texts.append(re.sub(r"^(\d+)\.0$", r"\1", str(value).strip()))

    return [text for text in texts if text not in ("", "-1", *columns.no_label)]
