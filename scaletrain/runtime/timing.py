"""Named spans of a training step, for timers and profilers.

    with span("forward"):
        ...

A span does nothing unless there is a listener.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

WAIT, COPY, FORWARD, BACKWARD, UPDATE = (
    "waiting for data",
    "host to device",
    "forward",
    "backward",
    "optimizer + EMA",
)

Listener = Callable[[str], AbstractContextManager[None]]

_SILENT = nullcontext()
_listener: Listener | None = None


def span(name: str) -> AbstractContextManager[None]:
    """Context of a named part of the step; spans may be nested."""
    return _SILENT if _listener is None else _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Context in which `listener(name)` makes the context of every span."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
