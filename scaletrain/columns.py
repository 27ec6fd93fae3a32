"""Tables as plain text for consoles of any width and for pipes."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence


def lines(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None = None) -> list[str]:
    """The columns to the right, but a first one of words to the left; no cell is ever cut or broken.

    A table that is wider than the console continues below itself, with the first column repeated.
    """
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    room = (width or shutil.get_terminal_size().columns) - widths[0]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if blocks[-1] and sum(widths[c] + 2 for c in (*blocks[-1], column)) > room:
            blocks.append([])
        blocks[-1].append(column)
    words = not all(row[0].isdigit() for row in table[1:])
    text: list[str] = []
    for block in blocks:
        text += [""] if text else []
        for row in table:
            first = row[0].ljust(widths[0]) if words else row[0].rjust(widths[0])
            text.append("  ".join((first, *(row[c].rjust(widths[c]) for c in block))).rstrip())
    return text
