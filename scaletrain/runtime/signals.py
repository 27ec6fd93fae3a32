"""Requests to stop. A signal only sets a flag; all ranks agree on it at a step boundary, save
together and end together.
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

# SLURM's warning before time-out and preemption, a plain request to end, a closed terminal, its
# Ctrl-C
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# the variable by which a launcher says where to note that a run stopped on request
STOPPED_FILE = "SCALETRAIN_STOPPED_FILE"
# ... and where to note what was saved last, one line such as `step 123`
PROGRESS_FILE = "SCALETRAIN_PROGRESS_FILE"


class Stopped(Exception):
    """The run was asked to stop and can go on."""

    def __init__(self, number: int, step: int, saved: bool) -> None:
        where = (
            "saved; rerun the same command to resume"
            if saved
            else "in a pass between steps: back to the last checkpoint"
        )
        super().__init__(f"stopped at step {step} on {signal.Signals(number).name}, {where}")

        self.number, self.step = number, step


class Interrupt:
    """Context that catches the signals. Enter it on every rank, in the main thread, before loader
    workers start.
    """

    def __init__(self) -> None:
        self._received, self._since, self._interrupts, self._training = 0, 0.0, 0, False
        self._asked: Callable[[], int] = lambda: 0

    def __enter__(self) -> Interrupt:
        # what is ignored stays so: nohup asks for it
        caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in caught}
        # a launcher may have blocked them, so that none is lost or deadly while Python starts
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._interrupts += number == signal.SIGINT
        # Ctrl-C reaches a rank from the terminal and, as another signal, from its launcher
        insisted = number == signal.SIGINT and (
            self._interrupts > 1 or time.monotonic() > self._since + 1
        )

        # before training there is nothing to save
        if self._received and (insisted or not self._training):
            os._exit(128 + number)

        if not self._received:
            self._received, self._since = number, time.monotonic()

    def agreed(self) -> int:
        """0, or the signal on which all ranks stop now. Called by every rank after every step.

        With several ranks the answer is that of one step ago: the ranks' exchange runs beside the
        step and costs no waiting.
        """
        self._training = True

        if dist.world() == 1:
            return self._received

        before, self._asked = self._asked(), dist.max_later(self._received)
        return before


def announce(stop: Stopped) -> None:
    """Once this rank has nothing more to save: no rank returns before that holds for all and the
    launcher has been told.
    """
    # a scheduler ends every rank as soon as one has left
    dist.barrier()

    if dist.main() and (place := os.environ.get(STOPPED_FILE)):
        durable.write(Path(place), signal.Signals(stop.number).name)

    dist.barrier()
    dist.leave()


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """For commands that have nothing to save: a signal ends them with the exit code 128 + its
    number, through their cleanup.
    """

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    with contextlib.ExitStack() as restored:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                restored.callback(signal.signal, number, signal.signal(number, end))

        # a launcher may have blocked them
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield


def note_progress(text: str) -> None:
    """Tell the launcher what this process has just saved for good, e.g. `step 123`; for one rank.

    By it the launcher knows a crash at one and the same place, at which it gives up after some,
    from one that came further.
    """
    if place := os.environ.get(PROGRESS_FILE):
        # a crash too many is then counted, no more
        with contextlib.suppress(OSError):
            durable.write(Path(place), f"{text}\n")
