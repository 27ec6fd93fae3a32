"""Heartbeats of a process that loads data. Those of a loader worker are in memory shared with the
main process, which watches them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import current_thread, main_thread

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int64]

# Columns: the sample being read, or -1; number of heartbeats; 1 while heartbeats are expected.
SAMPLE, BEATS, WATCHED = range(3)
# Numbers per worker: 64 bytes, so that no two workers write to the same cache line.
WIDTH = 8

_signs: Signs = np.zeros(WIDTH, np.int64)


def shared(workers: int) -> Signs:
    """[workers, WIDTH] int64 in memory that forked processes share."""
    signs = np.frombuffer(mmap.mmap(-1, workers * WIDTH * 8), np.int64).reshape(workers, WIDTH)
    signs[:, SAMPLE] = -1
    return signs


def share(signs: Signs) -> None:
    """Write this process's heartbeats to `signs` [WIDTH] from now on."""
    global _signs
    _signs = signs


def reading(sample: int) -> None:
    """Record that a sample is about to be read."""
    _signs[SAMPLE] = sample
    _signs[BEATS] += 1


def beat() -> None:
    """Record a heartbeat while a sample takes long for a good reason, e.g. bytes are arriving."""
    if _reads():
        _signs[BEATS] += 1


def watched() -> AbstractContextManager[None]:
    """Context in which this process is stuck if there are no heartbeats."""
    return _set(1)


def unwatched() -> AbstractContextManager[None]:
    """Context in which no heartbeats are expected: waits that have their own time limit, or depend
    on other processes.
    """
    return _set(0) if _reads() else nullcontext()


def _reads() -> bool:
    """Whether this is the thread that reads samples; prefetching threads may run while it is
    stuck.
    """
    return current_thread() is main_thread()


@contextmanager
def _set(value: int) -> Iterator[None]:
    before, _signs[WATCHED] = _signs[WATCHED], value
    try:
        yield
    finally:
        _signs[WATCHED] = before
