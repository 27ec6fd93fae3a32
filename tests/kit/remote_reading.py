"""Streams over shards that a local server offers, and what tests of them share."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from scaletrain.config.schema import CacheConfig, DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading.reader import Shards

CPU = torch.device("cpu")


VIEWS = (View(size=16, count=2), View(size=8))


COUNTS = (11, 3, 20, 14)


def cache(place: Path, size: int = 10_000_000, stage: bool = False) -> CacheConfig:
    return CacheConfig(path=str(place), bytes=size, stage=stage)


def stream(
    path: str | Path, held: CacheConfig, rank: int = 0, world: int = 1, **options: object
) -> Stream:
    data = DataConfig(
        path=str(path),
        cache=held,
        **{"lanes": 4, "window": 2, "workers": 0, "views": VIEWS, **options},
    )
    return open_stream(data, seed=5, batch=12, rank=rank, world=world, device=CPU)


def taken(source: Stream, start: int, stop: int) -> list[Batch]:
    batches = list(source.batches(start, stop))
    source.close()
    return batches


def same(a: Batch, b: Batch) -> None:
    assert torch.equal(a.index, b.index)
    assert torch.equal(a.keys, b.keys)
    assert torch.equal(a.labels, b.labels)
    assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def shards_of(url: str, place: Path, **options: int) -> Shards:
    return Shards(url, cache=cache(place, **options))


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)
