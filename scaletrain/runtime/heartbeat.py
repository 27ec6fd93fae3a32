"""Signs of life of a process that loads data. Those of a loader worker lie in memory that the main
process watches.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import current_thread, main_thread

import numpy as np
from numpy.typing import NDArray

Signs = NDArray[np.int64]

# the sample being read, or -1; signs of life so far; 1 while silence means trouble
SAMPLE, BEATS, WATCHED = range(3)
# numbers per worker: 64 bytes, so that no two workers write to one cache line
WIDTH = 8

_signs: Signs = np.zeros(WIDTH, np.int64)


def shared(workers: int) -> Signs:
    """[workers, WIDTH] in memory that is inherited by fork."""
    signs = np.frombuffer(mmap.mmap(-1, workers * WIDTH * 8), np.int64).reshape(workers, WIDTH)
    signs[:, SAMPLE] = -1
    return signs


def share(signs: Signs) -> None:
    """From now on, write into these [WIDTH]."""
    global _signs
    _signs = signs


def reading(sample: int) -> None:
    """To be called before each sample."""
    _signs[SAMPLE] = sample
    _signs[BEATS] += 1


def beat() -> None:
    """To be called while a sample takes long for a good reason, as when bytes arrive."""
    if _reads():
        _signs[BEATS] += 1


def watched() -> AbstractContextManager[None]:
    """Inside, silence means that this process is stuck."""
    return _set(1)


def unwatched() -> AbstractContextManager[None]:
    """Inside, silence is no trouble: in waits that have time limits of their own, or depend on
    other processes.
    """
    return _set(0) if _reads() else nullcontext()


def _reads() -> bool:
    """False in threads that fetch ahead: they may be well while the one that reads is stuck."""
    return current_thread() is main_thread()


@contextmanager
def _set(value: int) -> Iterator[None]:
    before, _signs[WATCHED] = _signs[WATCHED], value
    try:
        yield
    finally:
        _signs[WATCHED] = before
