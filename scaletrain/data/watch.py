"""Watches loader workers: one that was killed, stopped or cannot hand over its batch ends the run within seconds, by name."""

from __future__ import annotations

import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from scaletrain.data.errors import LoaderError

CHECK = 5.0  # seconds without a batch before the workers are looked at
UNSENT = 70  # EX_SOFTWARE of sysexits.h


class Watch:
    """`running`: torch's iterator over workers, made with timeout=CHECK. `reading` [workers]: the sample each reads, or -1."""

    def __init__(self, running: Any, reading: Tensor, name: Callable[[int], str], timeout: float) -> None:
        self._running, self._reading, self._name, self._timeout = running, reading, name, timeout
        self._workers: Sequence[BaseProcess] = running._workers
        # else torch raises from a signal handler, wherever the main process happens to be, and names no worker
        torch._C._remove_worker_pids(id(running))
        running._worker_pids_set = False

    def next(self) -> Any:
        """The next item, None at the end. Raises LoaderError."""
        begin, seen = monotonic(), set[int]()
        while True:
            try:
                return next(self._running, None)
            except RuntimeError as error:
                text = str(error)
                if "Caught" in text or not ("timed out" in text or "DataLoader worker" in text):
                    raise
            self._dead()
            stopped = {number for number, worker in enumerate(self._workers) if _state(worker.pid) == "T"}
            if held := sorted(stopped & seen):  # seen twice: when a whole job is continued, its processes are so one by one
                raise LoaderError(f"loader {self._who(held[0])} is stopped (SIGSTOP); continue or kill it, and start again")
            seen = stopped
            if monotonic() - begin > self._timeout:
                number = self._running._task_info[self._running._rcvd_idx][0]
                raise LoaderError(
                    f"no batch for {self._timeout:g} s: loader {self._who(number)}; storage or that process hangs; "
                    "raise data.timeout if it is only slow"
                )

    def _dead(self) -> None:
        for number, worker in enumerate(self._workers):
            code = worker.exitcode
            if code == UNSENT:
                raise LoaderError(f"loader {self._who(number)} cannot hand over its batch: see its message above")
            if code is not None:
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                cure = "; shared memory ran out: enlarge /dev/shm or lower data.prefetch" if code == -signal.SIGBUS else ""
                cure = cure or "; if memory ran out, lower data.workers or data.prefetch"
                raise LoaderError(f"loader {self._who(number)} {how}{cure}")

    def _who(self, number: int) -> str:
        sample = int(self._reading[number])
        read = f", last reading {self._name(sample)}," if sample >= 0 else ""
        return f"worker {number} (pid {self._workers[number].pid}){read}"


def in_worker(reading: Tensor, number: int, dataset: Any) -> None:
    """To be called in a worker before its first batch."""
    dataset.reading = reading.numpy()[number : number + 1]
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_unsent)  # type: ignore[attr-defined]


def nothing_read(workers: int) -> Tensor:
    """[workers] in memory that they share."""
    reading = torch.full((workers,), -1, dtype=torch.int64)
    reading.share_memory_()
    return reading


def _unsent(error: Exception, _: Any) -> None:
    """Python would print this, drop the batch, and leave the main process waiting for it."""
    print(f"a batch cannot be handed over: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(UNSENT)


def _state(pid: int | None) -> str:
    """The process's state as in proc_pid_stat(5), T for stopped by a signal; "" where that cannot be read."""
    with suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
