"""Console progress and the throughput clock."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from scaletrain.core import Clock


def number(value: float) -> str:
    """A number with three significant digits, and no fewer than it has before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


class Pace:
    """Throughput of this session by wall-clock time; a resumed run starts from zero."""

    def __init__(self, batch: int) -> None:
        # global
        self._batch = batch
        self._begin = self._first = self._last = self._now = time.perf_counter()
        self._steps = self._recent = self._skipped = 0
        self._waited = 0.0

    def add(self, waited: float, skipped: bool) -> None:
        self._now = time.perf_counter()
        if self._steps == 0:
            self._first = self._now

        self._steps += 1
        self._recent += 1
        self._waited += waited
        self._skipped += skipped

    @property
    def seconds(self) -> float:
        """Duration of this session so far."""
        return self._now - self._begin

    @property
    def seconds_per_step(self) -> float:
        """Mean of this session without its first step, which also starts workers and compiles."""
        return (
            self._now - self._begin
            if self._steps < 2
            else (self._now - self._first) / (self._steps - 1)
        )

    def read(self) -> dict[str, float]:
        """Scalars of the interval since the last call.

        Without seconds per step if the interval's only step was the session's first.
        """
        elapsed = max(self._now - self._last, 1e-9)
        scalars = {
            "speed/images_per_second": self._recent * self._batch / elapsed,
            "speed/data_wait_share": min(1.0, self._waited / elapsed),
            "steps/skipped": float(self._skipped),
        }

        if steps := self._recent - (self._recent == self._steps):
            scalars["speed/seconds_per_step"] = (self._now - max(self._first, self._last)) / steps

        self._last, self._waited, self._recent, self._skipped = self._now, 0.0, 0, 0
        return scalars


class Screen:
    """A live progress bar on a terminal, else a line per record. A closed terminal is no error."""

    def __init__(self, total: int, epochs: int, start: int) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._total, self._epochs = total, epochs
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(bar_width=20), console=self._console
            )
            self._task = self._bar.add_task("starting", total=total, completed=start)
            self._bar.start()

    def advance(self, done: int) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, completed=done)

    def report(self, clock: Clock, scalars: Mapping[str, float], rate: float, left: float) -> None:
        line = (
            f"epoch {clock.epoch + 1}/{self._epochs} step {clock.step + 1}/{self._total} loss "
            f"{scalars['train/loss']:.4g} "
            f"lr {rate:.3g} img/s {scalars['speed/images_per_second']:.0f} data "
            f"{scalars['speed/data_wait_share']:.0%} "
            f"left {duration(left)}"
        )

        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.update(self._task, description=line)
        else:
            self.say(line)

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(text)

    def close(self) -> None:
        if self._bar:
            with contextlib.suppress(OSError):
                self._bar.stop()
