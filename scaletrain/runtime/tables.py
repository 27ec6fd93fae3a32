"""Plain-text tables for terminals of any width, pipes and log files."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

# Between columns.
GAP = "  "
# A number, perhaps with a unit.
NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?( \S+)?")


def show(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
) -> None:
    """Print a table; arguments as for render."""
    print(render(columns, rows, title=title, notes=notes, width=width()))


def width() -> int | None:
    """Width of a line by COLUMNS or the terminal; None for pipes and files, whose lines may have
    any length.
    """
    if os.environ.get("COLUMNS", "").isdecimal() or sys.stdout.isatty():
        return shutil.get_terminal_size().columns

    return None


def render(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str = "",
    notes: Sequence[str] = (),
    width: int | None = None,
) -> str:
    """A table as text: headings, a line per row, `title` above and `notes` below; an empty row is
    an empty line.

    Columns of numbers are right-aligned. If lines would be longer than `width`, each row becomes a
    block: its first cell, then a line per column. Nothing is cut off.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    lines = _lines([list(columns), *cells])

    if width is not None and max(map(len, lines), default=0) > width:
        lines = _blocks(columns, cells, width)

    return "\n".join(
        [*([wrap(title, width)] if title else []), *lines, *(wrap(note, width) for note in notes)]
    )


def wrap(text: str, width: int | None, indent: int = 0) -> str:
    """Wrap text into lines of at most `width` characters, the later ones indented; words are not
    broken.
    """
    if width is None or len(text) <= width:
        return text

    hang = " " * min(indent, width // 2)
    return textwrap.fill(
        text, width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False
    )


def plural(count: int, noun: str) -> str:
    """A count with its noun in singular or plural: `1 shard`, `1,000 processes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def _lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """Align cells in columns. The first row has the headings, all of which may be empty."""
    head, *rows = cells
    columns = list(zip(*(row for row in cells if row), strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [
        all(NUMBER.fullmatch(cell) for cell in column[1:] if cell not in ("", "-"))
        for column in columns
    ]

    def line(row: Sequence[str]) -> str:
        places = zip(row, widths, right, strict=True) if row else ()
        return GAP.join(
            cell.rjust(wide) if number else cell.ljust(wide) for cell, wide, number in places
        ).rstrip()

    return [*([line(head)] if any(head) else []), *map(line, rows)]


def _blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Write each row as a block: its first cell, and below it the others by name."""
    wide = max(len(name) for name in columns[1:]) if len(columns) > 1 else 0
    lines: list[str] = []
    for first, *others in filter(None, rows):
        lines.append(wrap(first, width, len(GAP)))
        for name, cell in zip(columns[1:], others, strict=True):
            text = f"{GAP}{name.ljust(wide)}{GAP}{cell}" if name else f"{GAP}{cell}"
            lines += [wrap(text, width, len(GAP) * 2 + wide)] if cell else []

    return lines
