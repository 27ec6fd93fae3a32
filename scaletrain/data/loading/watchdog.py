"""Watches the loader workers, so that one that was killed, stopped or hangs soon ends the run with
an error that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Protocol

import numpy as np

from scaletrain.data.errors import LoaderError
from scaletrain.runtime.heartbeat import BEATS, SAMPLE, WATCHED, Signs

# seconds between two checks of the workers while a batch is awaited
CHECK = 1.0
# seconds after which a stopped worker is an error: the processes of a resumed job are continued one
# by one
STOPPED = 5.0
# seconds to look up where a sample is stored: that storage may be what hangs
NAMING = 5.0


class WatchedProcess(Protocol):
    """What the watchdog needs of a worker."""

    pid: int

    def ended(self) -> str | None:
        """How the process ended, and what may help; None while it runs."""
        ...


class Watchdog:
    """Checks the workers while the main process waits for a batch. All methods raise LoaderError.

    `signs` [workers, WIDTH] as in heartbeat.py; name(sample) returns where a sample is stored. Time
    in which the main process was itself stopped does not count.
    """

    def __init__(
        self,
        workers: Sequence[WatchedProcess],
        signs: Signs,
        name: Callable[[int], str],
        *,
        timeout: float,
        liveness: float,
    ) -> None:
        self._workers, self._signs, self._name = workers, signs, name
        self._timeout, self._liveness = timeout, liveness
        self.begin()

    def begin(self) -> None:
        """Must be called when a wait for a batch begins."""
        self._waited, self._beats = 0.0, self._signs[:, BEATS].copy()
        self._stopped, self._silent = np.zeros((2, len(self._signs)))

    def look(self, owing: int, seconds: float) -> None:
        """Must be called after every further `seconds`, at most CHECK, of waiting for a batch of
        the worker `owing`.
        """
        self.alive()

        states = [_state(worker.pid) for worker in self._workers]
        stopped = np.array([state == "T" for state in states])
        self._stopped = np.where(stopped, self._stopped + seconds, 0.0)
        if (self._stopped > STOPPED).any():
            raise LoaderError(
                f"loader {self._who(int(self._stopped.argmax()))} is stopped (SIGSTOP); start the "
                "run again"
            )

        beats = self._signs[:, BEATS].copy()
        silent = (beats == self._beats) & (self._signs[:, WATCHED] == 1) & ~stopped
        self._beats, self._silent = beats, np.where(silent, self._silent + seconds, 0.0)
        if (self._silent > self._liveness).any():
            number = int(self._silent.argmax())
            what = (
                "storage hangs (it waits in the kernel)"
                if states[number] == "D"
                else "storage or that process hangs"
            )

            raise LoaderError(
                f"loader {self._who(number)} is stuck: no sign of life for {self._liveness:g} s; "
                f"{what}; raise data.liveness if it is only slow"
            )

        self._waited += seconds
        if self._waited > self._timeout:
            raise LoaderError(
                f"no batch for {self._timeout:g} s: loader {self._who(owing)} owes one; storage or "
                "that process hangs; "
                "raise data.timeout if it is only slow"
            )

    def alive(self) -> None:
        """Raise LoaderError if a worker has ended, which none does without a fault."""
        for number, worker in enumerate(self._workers):
            if how := worker.ended():
                raise LoaderError(f"loader {self._who(number)} {how}")

    def _who(self, number: int) -> str:
        sample = int(self._signs[number, SAMPLE])
        read = f", last reading {self._where(sample)}," if sample >= 0 else ""
        return f"worker {number} (pid {self._workers[number].pid}){read}"

    def _where(self, sample: int) -> str:
        names = [str(sample)]
        thread = Thread(target=lambda: names.append(self._name(sample)), daemon=True)
        thread.start()
        thread.join(NAMING)
        return names[-1]


def _state(pid: int) -> str:
    """The state of a process as in proc_pid_stat(5), T if stopped by a signal; "" where it cannot
    be read.
    """
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    return ""
