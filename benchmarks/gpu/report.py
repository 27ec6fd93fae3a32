"""What the parts of the check on a GPU share: their settings, their results and their clocks."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

ROOT = Path(__file__).parents[2]
# made by prepare.py
PREPARED = ROOT / ".gpu"
# version that the wheels there are for
WHEELS_PYTHON = (3, 12)
# begins each line of a log that is a result
RESULT = "## "
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How a part is run."""

    device: torch.device
    # the smallest settings, which only show that the part itself works
    tiny: bool
    # shards and runs
    work: Path
    # archives of real images, if there are any
    data: Path
    # after which the part is stopped
    seconds: float

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.cuda:
            torch.cuda.synchronize()


def say(text: object) -> None:
    """Print a result."""
    print(f"{RESULT}{text}", flush=True)


def check(good: bool, text: str) -> None:
    """Print a result that is right or wrong."""
    say(f"{'ok  ' if good else 'FAIL'} {text}")


def attempt(name: str, work: Callable[[], T]) -> T | None:
    """What `work` returns; None if it fails, which is a result and does not end the other cases."""
    try:
        return work()
    except Exception as error:
        traceback.print_exc()
        say(f"FAIL {name}: {type(error).__name__}: {' '.join(str(error).split())[:220]}")
        return None


def median_seconds(settings: Settings, work: Callable[[], object], times: int = 10) -> float:
    """Median duration of a piece of work on the device."""
    for _ in range(3):
        work()
    settings.synchronize()

    durations = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        settings.synchronize()
        durations.append(time.perf_counter() - begin)

    return statistics.median(durations)


def python(words: Sequence[str], limit: float, stop: int | None = None) -> tuple[int, str]:
    """Exit code and output of `python WORDS` in the repository root.

    After `limit` seconds it gets the signal `stop`, if one is given, and 20 seconds to end.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    try:
        text, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        if stop is not None:
            process.send_signal(stop)
        try:
            text, _ = process.communicate(timeout=20 if stop is not None else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()

    print(text[-3000:], flush=True)
    return process.returncode, text
