"""A row of the table of figures, and what a table says of the machine and of the versions that it
was made with.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HEAD = (
    "| figure | ours | peer | the peer's | ratio or share: median (lowest - highest) | target | "
    "met |\n"
    "|---|---|---|---|---|---|---|"
)


class Row(NamedTuple):
    figure: str
    ours: str
    peer: str
    theirs: str
    ratio: str
    target: str
    met: bool

    def __str__(self) -> str:
        cells = (*self[:6], "yes" if self.met else "MISSED")
        return f"| {' | '.join(cells)} |"


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median (lowest - highest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} - {max(values):{form}})"


def versions(names: Iterable[str], folders: Sequence[str] = ()) -> str:
    """Installed versions, also of peers in folders of their own."""
    found = (
        {d.name.lower(): d.version for d in importlib.metadata.distributions(path=list(folders))}
        if folders
        else {}
    )

    return ", ".join(
        f"{name} {found.get(name) or importlib.metadata.version(name)}" for name in names
    )


def machine() -> str:
    info = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    names = {key.strip(): value.strip() for key, value in info.items()}
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    cores = int(names.get("processor", "0")) + 1

    return (
        f"{names.get('model name', platform.machine())}, {cores} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}"
    )
