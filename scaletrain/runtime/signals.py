"""Requests to stop a run. A signal only sets a flag; all ranks agree on it at the end of a step,
save and exit together.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scaletrain import dist
from scaletrain.runtime import durable

# SLURM's warning before a time limit or preemption, kill's default, a closed terminal, Ctrl-C.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# Variables of the launcher: the file in which a run notes that it stopped on request, ...
STOPPED_FILE = "SCALETRAIN_STOPPED_FILE"
# ... and the file for what was saved last, a line such as `step 123`.
PROGRESS_FILE = "SCALETRAIN_PROGRESS_FILE"


class Stopped(Exception):
    """The run stopped on request and can be resumed."""

    def __init__(self, number: int, step: int, saved: bool) -> None:
        where = (
            "saved; rerun the same command to resume"
            if saved
            else "in a pass between steps: back to the last checkpoint"
        )
        super().__init__(f"stopped at step {step} on {signal.Signals(number).name}, {where}")

        self.number, self.step = number, step


class Interrupt:
    """Context that catches the signals. Enter it on every rank, in the main thread, before any
    loader worker starts.
    """

    def __init__(self) -> None:
        self._received, self._since, self._interrupts, self._training = 0, 0.0, 0, False
        self._asked: Callable[[], int] = lambda: 0

    def __enter__(self) -> Interrupt:
        # Ignored signals stay ignored, as nohup wants.
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in caught}
        # A launcher may have blocked them, so that none is lost or fatal while Python starts.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._interrupts += number == signal.SIGINT
        # Ctrl-C reaches a rank from the terminal and again from its launcher.
        insisted = number == signal.SIGINT and (
            self._interrupts > 1 or time.monotonic() > self._since + 1
        )

        # Before training there is nothing to save.
        if self._received and (insisted or not self._training):
            os._exit(128 + number)

        if not self._received:
            self._received, self._since = number, time.monotonic()

    def agreed(self) -> int:
        """The signal on which all ranks stop now, or 0. Every rank calls it after every step.

        With several ranks the answer is one step late: the exchange runs during the step and costs
        no time.
        """
        self._training = True

        if dist.world() == 1:
            return self._received

        before, self._asked = self._asked(), dist.max_later(self._received)
        return before


def announce(stop: Stopped) -> None:
    """Wait until no rank has anything more to save, and note the stop for the launcher."""
    # A scheduler ends every rank as soon as one has left.
    dist.barrier()

    if dist.main() and (place := os.environ.get(STOPPED_FILE)):
        durable.write(Path(place), signal.Signals(stop.number).name)

    dist.barrier()
    dist.leave()


@contextlib.contextmanager
def ending_at_once(*, resumable: bool = False) -> Iterator[None]:
    """Context for commands that have nothing to save: a signal ends them, after their cleanup, with
    the exit code 128 + its number.

    resumable: they go on from what they have stored, so the stop is noted for the launcher.
    """

    def end(number: int, _: Any) -> None:
        if resumable and (place := os.environ.get(STOPPED_FILE)):
            # By every rank, since the first one that ends takes the others with it.
            with contextlib.suppress(OSError):
                Path(place).write_text(signal.Signals(number).name)

        raise SystemExit(128 + number)

    with contextlib.ExitStack() as restored:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                restored.callback(signal.signal, number, signal.signal(number, end))

        # A launcher may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


def note_progress(text: str) -> None:
    """Note for the launcher what was saved last, e.g. `step 123`; for one rank.

    The launcher gives up after several crashes without progress.
    """
    if place := os.environ.get(PROGRESS_FILE):
        # Without the note, one crash too many is counted.
        with contextlib.suppress(OSError):
            durable.write(Path(place), f"{text}\n")
