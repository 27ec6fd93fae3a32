"""Streams whose loader workers do something of their own, and how such a stream ends."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kit.data import children
from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import LoaderError
from scaletrain.data.loading.dataset import Failure, Images, RawBatch
from scaletrain.data.loading.loader import Stream, open_stream

CPU = torch.device("cpu")


def stream(
    folder: Path, rank: int = 0, world: int = 1, workers: int = 0, **options: object
) -> Stream:
    given = {
        "path": str(folder),
        "lanes": 2,
        "window": 2,
        "workers": workers,
        "views": (View(size=8),),
        **options,
    }
    data = DataConfig(**given)
    return open_stream(data, seed=1, batch=12, rank=rank, world=world, device=CPU)


class _Acting(Images):
    """Does something to the worker that makes a batch, before and after."""

    before = staticmethod(lambda step: None)
    after = staticmethod(lambda step, raw: raw)

    def __getitem__(self, at: tuple[int, int]) -> RawBatch | Failure:
        self.before(at[1])
        return self.after(at[1], super().__getitem__(at))


def acting(folder: Path, workers: int = 3, **options: object) -> Stream:
    acts = {
        name: staticmethod(options.pop(name)) for name in ("before", "after") if name in options
    }
    s = stream(folder, workers=workers, **options)
    s.dataset.__class__ = type("Acting", (_Acting,), acts)
    return s


def at_step(step: int, act: Callable[[], object]) -> Callable[[int], None]:
    return lambda now: act() if now == step else None  # type: ignore[func-returns-value, return-value]


def signalled(how: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), how)


def failure(batches: Iterator[Batch], within: float = 10.0) -> str:
    """The error in which the rest of the batches ends. It is one line, comes soon, and leaves no
    worker behind.
    """
    begin = time.monotonic()
    with pytest.raises(LoaderError) as error:
        list(batches)
    assert time.monotonic() - begin < within
    assert not children()
    assert error.value.exit_code == 75
    text = str(error.value)
    assert "\n" not in text
    return text
