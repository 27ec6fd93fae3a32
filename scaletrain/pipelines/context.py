"""What a computation may use of its pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class StageContext:
    """Where a computation writes, and how it reports."""

    # An empty folder, which gets the stage's name once the computation has returned.
    output: Path
    # Prints a line.
    say: Callable[[str], None]
