"""Watches loader workers: one that was killed, stopped or is stuck ends the run soon, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Protocol

import numpy as np

from scaletrain.data.errors import LoaderError
from scaletrain.runtime.heartbeat import BEATS, SAMPLE, WATCHED, Signs

# seconds of waiting for a batch between two looks at the workers
CHECK = 1.0
# seconds after which a stopped worker counts: the processes of a job that is continued are so one
# by one
STOPPED = 5.0
# seconds to find out where a sample lies: the storage that would say may be what hangs
NAMING = 5.0


class WatchedProcess(Protocol):
    pid: int

    def ended(self) -> str | None:
        """How, and what may help; None while it lives."""
        ...


class Watchdog:
    """`signs` [workers, WIDTH], as in heartbeat.py; `name` says where a sample lies. All methods
    raise LoaderError.

    Time counts while the main process waits and looks, so not while it is itself stopped.
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
        """To be called at the begin of a wait for a batch."""
        self._waited, self._beats = 0.0, self._signs[:, BEATS].copy()
        self._stopped, self._silent = np.zeros((2, len(self._signs)))

    def look(self, owing: int, seconds: float) -> None:
        """To be called after `seconds` more of waiting, at most CHECK, for a batch of the worker
        `owing`.
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
                f"{what}; "
                "raise data.liveness if it is only slow"
            )

        self._waited += seconds
        if self._waited > self._timeout:
            raise LoaderError(
                f"no batch for {self._timeout:g} s: loader {self._who(owing)} owes one; storage or "
                "that process hangs; "
                "raise data.timeout if it is only slow"
            )

    def alive(self) -> None:
        """Raise for a worker that has ended: none does so by itself."""
        for number, worker in enumerate(self._workers):
            if how := worker.ended():
                raise LoaderError(f"loader {self._who(number)} {how}")

    def _who(self, number: int) -> str:
        sample = int(self._signs[number, SAMPLE])
        read = f", last reading {self._place(sample)}," if sample >= 0 else ""
        return f"worker {number} (pid {self._workers[number].pid}){read}"

    def _place(self, sample: int) -> str:
        found = [str(sample)]
        thread = Thread(target=lambda: found.append(self._name(sample)), daemon=True)
        thread.start()
        thread.join(NAMING)
        return found[-1]


def _state(pid: int) -> str:
    """The process's state as in proc_pid_stat(5), T for stopped by a signal; "" where that cannot
    be read.
    """
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    return ""
