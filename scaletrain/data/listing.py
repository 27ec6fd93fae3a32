"""Images named by a listing: CSV or Parquet, one row an image, with its path or web address and no, one or many labels.

The listing is read once, row by row, into a table in an unnamed temporary file, as large as the image and label columns.
Memory is 8 bytes a row for the table's offsets and up to 40 for the shuffle of `write`: 15 GB for 300 million rows.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import math
import os
import re
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from scaletrain.data.errors import DataError
from scaletrain.data.sources import read
from scaletrain.data.write import Entry

IMAGES = ("path", "url", "image", "file")  # names that a column of images may have
LABELS = ("label", "labels")
MOST_CLASSES = 1_000_000  # more are a sign of the wrong column


class Columns(NamedTuple):
    image: str = ""  # "": the first of IMAGES
    label: str = ""  # "": the first of LABELS, if any
    separator: str = ";"  # between the labels of a CSV cell


class Row(NamedTuple):
    where: str  # file and row, for errors
    image: str
    labels: list[str]


class Listing:
    """Samples in the order of the rows. Labels are whole numbers, or names, numbered by `classes` or else sorted."""

    def __init__(
        self,
        source: Path,
        columns: Columns,
        fetch: Callable[[str], bytes],
        *,
        root: Path,
        scratch: Path,
        classes: tuple[str, ...] = (),
    ) -> None:
        self.root, self.fetch = root, fetch
        self._offsets = array("Q", [0])
        self._hash = hashlib.sha256()
        self._table = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 -- without a name: it goes however the process ends
        weakref.finalize(self, self._table.close)
        seen: dict[str, int] = {}  # labels as written, in the order met
        for row in _rows(source, columns):
            self._add(row, seen)
        self._table.flush()
        if not len(self):
            raise DataError(f"{source} lists no images")
        self.labelled = bool(seen)
        self.classes, self._numbers = _numbered(list(seen), classes, source)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def where(self, number: int) -> str:
        image = self._row(number)[0]
        return image if "://" in image else str(self.root / image)

    def load(self, number: int) -> Entry:
        image, found = self._row(number)
        labels = tuple(sorted(self._numbers[label] for label in found))
        if "://" in image:
            return Entry(PurePosixPath(urlsplit(image).path).stem, self.fetch(image), labels)
        return Entry(str(Path(image).with_suffix("")), read(self.root / image), labels)

    def digest(self) -> str:
        return hashlib.sha256(self._hash.digest() + json.dumps([self.classes, list(self._numbers)]).encode()).hexdigest()

    def _add(self, row: Row, seen: dict[str, int]) -> None:
        if not row.image:
            raise DataError(f"{row.where}: no path or address")
        labels = sorted({seen.setdefault(label, len(seen)) for label in row.labels})
        if len(seen) > MOST_CLASSES:
            raise DataError(f"{row.where}: more than {MOST_CLASSES:,} different labels; name the right column with --label")
        data = json.dumps([row.image, labels]).encode()
        self._table.write(data)
        self._hash.update(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def _row(self, number: int) -> tuple[str, list[int]]:
        begin, end = self._offsets[number], self._offsets[number + 1]
        image, labels = json.loads(os.pread(self._table.fileno(), end - begin, begin))
        return image, labels


def _numbered(seen: list[str], classes: tuple[str, ...], source: Path) -> tuple[tuple[str, ...], array[int]]:
    """The names of the classes, and the number of each label met."""
    if all(re.fullmatch(r"\d{1,18}", label) for label in seen):
        numbers = array("q", map(int, seen))
        if classes and seen and max(numbers) >= len(classes):
            raise DataError(f"{source}: label {max(numbers)} is outside the {len(classes)} classes of --classes")
        return classes, numbers
    names = classes or tuple(sorted(seen))
    if len(set(names)) != len(names):
        raise DataError("--classes names a class twice")
    order = {name: number for number, name in enumerate(names)}
    missing = next((label for label in seen if label not in order), None)
    if missing is not None:
        raise DataError(f"{source}: label '{missing}' is not in --classes")
    return names, array("q", [order[label] for label in seen])


def _rows(source: Path, columns: Columns) -> Iterator[Row]:
    """Of one file, or of all .csv and .parquet files of a folder by name."""
    parts = sorted(p for p in source.iterdir() if p.suffix in (".csv", ".parquet")) if source.is_dir() else [source]
    if not parts:
        raise DataError(f"{source} holds neither .csv nor .parquet files")
    for part in parts:
        yield from _parquet(part, columns) if part.suffix == ".parquet" else _csv(part, columns)


def _csv(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            head = next(lines, [])
            image, label = _find(head, columns, path)
            for cells in lines:
                if not cells:
                    continue
                where = f"{path}, line {lines.line_num}"
                if len(cells) != len(head):
                    raise DataError(f"{where}: {len(cells)} cells, and {len(head)} columns in the first line")
                texts = [] if label is None else cells[label].split(columns.separator or None)
                yield Row(where, cells[image].strip(), _texts(texts, where))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None


def _parquet(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow, or write the listing as CSV") from None
    try:
        file = parquet.ParquetFile(path)
        head = list(file.schema_arrow.names)
        image, label = _find(head, columns, path)
        number = 0
        for batch in file.iter_batches(1 << 14, columns=[head[i] for i in (image, label) if i is not None]):
            images = batch.column(head[image]).to_pylist()
            labels = [None] * len(images) if label is None else batch.column(head[label]).to_pylist()
            for name, value in zip(images, labels, strict=True):
                where = f"{path}, row {number}"
                yield Row(where, str(name or ""), _texts(value if isinstance(value, list) else [value], where))
                number += 1
    except (OSError, arrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _find(head: list[str], columns: Columns, path: Path) -> tuple[int, int | None]:
    """The columns of image and label; a column that was asked for must be there."""
    image = next((n for n in ([columns.image] if columns.image else IMAGES) if n in head), None)
    label = next((n for n in ([columns.label] if columns.label else LABELS) if n in head), None)
    if image is None or (columns.label and label is None):
        option, name = ("--image", columns.image or " or ".join(IMAGES)) if image is None else ("--label", columns.label)
        raise DataError(f"{path} has no column {name}, only {', '.join(head) or 'an empty first line'}; choose with {option}")
    return head.index(image), None if label is None else head.index(label)


def _texts(values: list[Any], where: str) -> list[str]:
    """Labels as text; empty cells, nulls and -1 are none. Tables with gaps keep whole numbers as 3.0."""
    texts = []
    for value in values:
        if value is None or value == -1 or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, int | float | str) or isinstance(value, bool):
            raise DataError(f"{where}: a label of type {type(value).__name__}, which is neither a number nor a name")
        texts.append(re.sub(r"^(\d+)\.0$", r"\1", str(value).strip()))
    return [text for text in texts if text not in ("", "-1")]
