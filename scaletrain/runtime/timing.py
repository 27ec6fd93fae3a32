"""Named parts of a training step, for whoever times them.

    with span("forward"):
        ...

While nobody listens, a mark does nothing.
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
    """A part of the step, from enter to exit; marks may be nested."""
    return _SILENT if _listener is None else _listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, `listener(name)` makes the context of every mark."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
