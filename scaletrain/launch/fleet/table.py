"""The table of a fleet: a row for each step, a column for each benchmark and dataset."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from scaletrain.launch.fleet.cells import Cell, Status
from scaletrain.launch.fleet.fleet import Fleet
from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural


def lines(fleet: Fleet) -> list[str]:
    """The tables of all runs, why results are missing, and a summary."""
    text: list[str] = []
    for plan in fleet.plans:
        training = plan.training()
        text.append(f"{plan.run}{f': training, {training}' if training else ''}")
        cells = {cell: fleet.statuses[cell] for cell in plan.cells if cell in fleet.statuses}
        if cells:
            text += [*_table(cells), ""]
        elif plan.measures:
            text += ["no step to evaluate yet", ""]
        else:
            text.append(f"{plural(fleet.drawn(plan.run), 'result')} in its curves in TensorBoard")

    texts = {status.text for status in fleet.statuses.values() if status.state == "failed"}
    text += [*(f"failed: {one}" for one in sorted(texts)), *([""] if texts else [])]
    counts = [
        (fleet.count(state), state)
        for state in ("measured", "running", "pending", "missing", "failed")
    ]
    summary = ", ".join(f"{count:,} {state}" for count, state in counts if count)
    return [*text, *([summary] if summary else [])]


def _table(cells: dict[Cell, Status]) -> list[str]:
    several = len({cell.dataset for cell in cells}) > 1
    columns = list(dict.fromkeys(_column(cell, several) for cell in cells))
    rows: dict[int, dict[str, str]] = {}
    for cell, status in cells.items():
        rows.setdefault(cell.step, {})[_column(cell, several)] = _short(status)

    table = [[f"{step:,}", *(row.get(name, "") for name in columns)] for step, row in rows.items()]
    return tables.render(("step", *columns), table, width=tables.width()).splitlines()


def _column(cell: Cell, several: bool) -> str:
    return f"{cell.benchmark}@{cell.dataset}" if several else cell.benchmark


def _short(status: Status) -> str:
    if status.state == "measured":
        return status.text
    return "-" if status.state == "missing" else status.state


def _last(text: Sequence[str], columns: int, height: int) -> list[str]:
    """The lines as they are broken on a terminal, as many as it can show: those that have left its
    screen can no longer be replaced.
    """
    lines = [
        line[at : at + columns] for line in text for at in range(0, max(1, len(line)), columns)
    ]
    # and the line of the cursor
    most = max(2, height - 1)
    if len(lines) > most:
        lines = [f"... {len(lines) - most + 1:,} lines above", *lines[1 - most :]]

    return lines


class Screen:
    """Lines on a terminal that take the place of the ones before; elsewhere only `close` prints."""

    def __init__(self) -> None:
        self._live, self._height = sys.stdout.isatty(), 0

    def show(self, text: Sequence[str]) -> None:
        if self._live:
            self.clear()
            text = _last(text, *shutil.get_terminal_size())
            print("\n".join(text), flush=True)
            self._height = len(text)

    def say(self, text: str) -> None:
        """Print a line above."""
        self.clear()
        print(text, flush=True)

    def close(self, text: Sequence[str]) -> None:
        self.clear()
        print("\n".join(text), flush=True)

    def clear(self) -> None:
        if self._height:
            # To the first of the lines, and erase from there.
            print(f"\033[{self._height}F\033[J", end="")
        self._height = 0
