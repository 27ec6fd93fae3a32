"""A TensorBoard writer that never ends a run: files that cannot be written cause one warning."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("scaletrain")


class Board:
    """Writes events below `folder`, and hides those of an earlier start at or after step `purge`.

    After a failure nothing is written until the next flush(), which begins a new file.
    """

    def __init__(self, folder: Path, purge: int) -> None:
        self._folder = folder
        self._purge: int | None = purge
        self._failed = False
        self._writer: Any = None
        self._hook = threading.excepthook
        threading.excepthook = _quietly(self._hook)

        self._open()

    def scalar(self, name: str, value: float, step: int) -> None:
        self._try(lambda: self._writer.add_scalar(name, value, step))

    def text(self, name: str, text: str, step: int) -> None:
        self._try(lambda: self._writer.add_text(name, text, step))

    def image(self, name: str, picture: Tensor, step: int) -> None:
        self._try(lambda: self._writer.add_image(name, picture, step))

    def flush(self) -> None:
        if self._writer is None:
            self._open()
        self._try(lambda: self._writer.flush())

    def close(self) -> None:
        self._try(lambda: self._writer.close())
        self._writer = None
        threading.excepthook = self._hook

    def _open(self) -> None:
        def begin() -> None:
            self._writer = SummaryWriter(self._folder, purge_step=self._purge)
            # Only events of earlier starts are hidden.
            self._purge = None

        self._guard(begin)

    def _try(self, work: Callable[[], None]) -> None:
        if self._writer is not None:
            self._guard(work)

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except (
            OSError,
            ValueError,
        ) as error:  # ValueError: its file was closed by an earlier failure
            if not self._failed:
                log.warning(
                    "%s cannot be written (%s); the run continues and will try again",
                    self._folder,
                    error,
                )

            self._failed, self._writer = True, None


def _quietly(before: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A thread hook that prints no traceback of TensorBoard's thread: the next call raises its
    errors.
    """

    def hook(what: threading.ExceptHookArgs) -> None:
        if type(what.thread).__name__ != "_AsyncWriterThread":
            before(what)

    return hook
