"""Streams of batches on the device. The whole state of the pipeline is the number of the
next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from scaletrain import dist
from scaletrain.config.schema import Cache, Data
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.loading.dataset import (
    BatchDataset,
    Failure,
    Images,
    Raw,
    Synthetic,
    Whole,
    synthetic_counts,
)
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.loading.workers import Pool, Sampler
from scaletrain.data.reading.concat import ConcatShards, shards_of
from scaletrain.data.reading.reader import NODE, Shards
from scaletrain.data.reading.replacement import admit, left_out
from scaletrain.data.sampling.mixture import Mixture, Source
from scaletrain.data.sampling.plan import Batches, Ints, Plan
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.runtime.timing import COPY, span

T = TypeVar("T")
SYNTHETIC = "synthetic"


def _unnoted(step: int, replaced: Sequence[Replaced]) -> None:
    """For passes over the data that are no steps of training."""


class Stream:
    """The training data of one rank: the same global batches at every world size and number of
    workers.

    Raises DataError when batch, lanes, world or the data set do not fit together. `rows` [N]: of
    these samples only.
    """

    def __init__(
        self,
        data: Data,
        *,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        device: torch.device,
        rows: Ints | None = None,
    ) -> None:
        self.data, self.device = data, device
        shards = opened(data)
        self.missing = 0.0 if shards is None else left_out(shards.losses)
        self.plan = planned(data, shards, seed=seed, batch=batch, rows=rows)
        lo, hi = self.plan.part(rank, world)

        if shards is None:
            self.dataset: BatchDataset = Synthetic(data, self.plan, lo, hi)
        else:
            # once is enough; every rank checks again what it opens
            if rank == 0:
                shards.check()
            shards.fits(-(-self.plan.in_use()[1] * dist.local_world() // world))
            self.dataset = Images(data, shards, self.plan, lo, hi, rows)

        self.samples, self.steps_per_epoch = self.plan.samples, self.plan.steps_per_epoch
        self._to_device = ToDevice(device, seed, data.mean, data.std)
        self._running: list[Generator[Batch, None, None]] = []

    def batches(
        self, start: int, stop: int, lost: Callable[[int, Sequence[Replaced]], None] = _unnoted
    ) -> Iterator[Batch]:
        """Batches of the global steps start .. stop - 1, through epoch ends without a pause.

        lost(step, replaced) is called for each before it is handed out.
        """
        running = self._batches(start, stop, lost)
        self._running = [
            *(r for r in self._running if inspect.getgeneratorstate(r) != inspect.GEN_CLOSED),
            running,
        ]

        return running

    def mixing(self) -> str:
        """What a batch is drawn from, how well that mixes and the cache that it asks for, in a
        line.
        """
        if not isinstance(self.dataset, Images):
            return self.plan.mixing()

        shards = self.dataset.shards
        hidden = isinstance(shards, ConcatShards) and not shards.labelled
        labels = (
            "; labels are not used: the parts differ in classes.json, or lack it" if hidden else ""
        )

        return self.plan.mixing(shards.shard_bytes) + labels

    def labels(self) -> Ints | None:
        """Of all samples [N], -1 where unknown; None for synthetic data, whose labels are
        made up.
        """
        return self.dataset.shards.labels() if isinstance(self.dataset, Images) else None

    def unlabelled(self) -> str:
        """Of how many samples no label is known, in words; "" if of none."""
        return self.dataset.shards.unlabelled() if isinstance(self.dataset, Images) else ""

    def sources(self) -> list[dict[str, Any]]:
        """Of each data set its path, samples, weight in a mixture, and a sha256 of the bytes of all
        its shards.
        """
        if not isinstance(self.dataset, Images):
            return [{"path": SYNTHETIC, "samples": self.samples}]

        shards = self.dataset.shards
        if isinstance(shards, Shards):
            return [source(self.data.path, shards)]
        if not self.data.mixture:
            return [source(str(held.folder), held) for held in shards.parts]

        parts = zip(self.data.mixture, shards.parts, strict=True)
        return [{**source(part.path, held), "weight": part.weight} for part, held in parts]

    def support_sources(self) -> list[dict[str, Any]]:
        """The same of the labelled samples that come with the batches."""
        return []

    def name(self, sample: int) -> str:
        """Where to find a sample: SHARD.tar/KEY, or its number if the data is synthetic or cannot
        be read any more.
        """
        return _name(self.dataset, sample)

    def close(self) -> None:
        """Stop the workers of every iterator that is still open."""
        while self._running:
            self._running.pop().close()

    def _batches(
        self, start: int, stop: int, lost: Callable[[int, Sequence[Replaced]], None]
    ) -> Generator[Batch, None, None]:
        steps = Steps(start, stop, self.steps_per_epoch)
        found = load(
            self.dataset,
            steps,
            self._to_device,
            self.device,
            workers=self.data.workers,
            **self._limits(),
        )

        with closing(found):
            for step, (batch, replaced) in enumerate(found, start):
                lost(step, replaced)
                yield batch

    def _limits(self) -> dict[str, Any]:
        """Of loading, as `load` takes them."""
        return self.data.model_dump(include={"prefetch", "timeout", "liveness"})


def source(path: str, shards: Shards) -> dict[str, Any]:
    """The identity of a data set, as a checkpoint keeps it."""
    return {"path": path, "samples": len(shards), "sha256": shards.fingerprint}


def opened(data: Data) -> Shards | ConcatShards | None:
    """The shards that a recipe names; None for synthetic data. Raises DataError."""
    if data.path == SYNTHETIC:
        return None
    if not data.path and not data.mixture:
        raise DataError(
            "data.path is empty: add data.path=FOLDER, a folder of shards such as shards/folder.py "
            "writes, "
            "or data.path=synthetic"
        )

    skip = data.on_bad == "skip"
    if data.mixture:
        shards: Shards | ConcatShards = ConcatShards(
            [part.path for part in data.mixture], cache=data.cache, skip=skip
        )
    else:
        shards = shards_of(data.path, cache=data.cache, skip=skip)

    admit(shards.losses, data.on_bad, data.max_bad)
    return shards


def planned(
    data: Data,
    shards: Shards | ConcatShards | None,
    *,
    seed: int,
    batch: int,
    rows: Ints | None = None,
) -> Batches:
    """The order of the samples of `opened`, or of its `rows` [N]. Raises DataError where batch,
    lanes and data do not fit.
    """
    if data.mixture and isinstance(shards, ConcatShards):
        weighted = zip(data.mixture, shards.parts, strict=True)
        sources = [Source(part.path, held.counts, part.weight) for part, held in weighted]
    else:
        counts = synthetic_counts(data.synthetic_samples) if shards is None else shards.counts
        counts = counts if rows is None else np.array([len(rows)])
        sources = [Source(data.path, counts, 1.0)]
        if not data.epoch_samples:
            return Plan(counts, seed=seed, batch=batch, lanes=data.lanes, window=data.window)

    return Mixture(
        sources,
        seed=seed,
        batch=batch,
        lanes=data.lanes,
        window=data.window,
        epoch_samples=data.epoch_samples,
    )


def plain(
    path: str,
    *,
    size: int,
    resize: str = "tv",
    batch: int = 256,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    max_pixels: int = 50_000_000,
    timeout: float = 300.0,
    liveness: float = 60.0,
    rows: Ints | None = None,
    cache: Cache = NODE,
    skip: bool = False,
    lost: Callable[[int, Sequence[Replaced]], None] = _unnoted,
) -> Iterator[Batch]:
    """Every sample once, in its own order, as one view [1, B, 3, size, size]; the last batch may be
    short.

    `resize` is a protocol of crop.evaluate: tv, byol or none. Ranks take contiguous parts that
    differ by at most one sample. `rows` [N], ascending: these samples only. `skip`: samples that
    cannot be used are left out; lost(number of the batch, what it lacks) is called for each batch
    before it is handed out, also for one of which nothing is left, which is not.
    """
    if resize not in ("tv", "byol", "none"):
        raise DataError(f"there is no resize protocol '{resize}'; known: tv, byol, none")

    shards = Shards(path, cache=cache, skip=skip)
    if not skip:
        admit(shards.losses)

    samples = len(shards) if rows is None else len(rows)
    lo, hi = rank * samples // world, (rank + 1) * samples // world
    ranges = [(at, min(at + batch, hi)) for at in range(lo, hi, batch)]
    dataset = Whole(shards, size, resize, max_pixels, rows, skip)
    to_device = ToDevice(device, 0, mean, std)

    def batches() -> Iterator[Batch]:
        found = load(
            dataset,
            ranges,
            to_device,
            device,
            workers=workers,
            prefetch=2,
            timeout=timeout,
            liveness=liveness,
        )

        with closing(found):
            for number, (batch, replaced) in enumerate(found):
                lost(number, replaced)
                if len(batch):
                    yield batch

    return batches()


class Steps:
    """The (epoch, step of the epoch) of the global steps start .. stop - 1."""

    def __init__(self, start: int, stop: int, steps_per_epoch: int) -> None:
        self.range, self.steps_per_epoch = range(start, stop), steps_per_epoch

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, number: int) -> tuple[int, int]:
        return divmod(self.range[number], self.steps_per_epoch)


def load(
    dataset: BatchDataset,
    sampler: Sampler,
    convert: Callable[[Raw], T],
    device: torch.device,
    *,
    workers: int,
    prefetch: int,
    timeout: float,
    liveness: float,
) -> Generator[tuple[T, Sequence[Replaced]], None, None]:
    """What `convert` makes of each batch, in the sampler's order, and the samples that were
    replaced in it.

    Batches are made by worker processes, without any in this one. `convert` keeps no memory of the
    raw batch, which is used again. Raises DataError, also for workers that die or hang.
    """
    workers = min(workers, len(sampler))

    if not workers:
        for number in range(len(sampler)):
            raw = _sound(dataset[sampler[number]])
            with span(COPY):
                item = convert(raw)
            yield item, raw.replaced

        return

    name = partial(_name, dataset)
    pool = Pool(
        dataset,
        sampler,
        name,
        device,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
        liveness=liveness,
    )

    try:
        for left in reversed(range(len(sampler))):
            raw = _sound(pool.take())
            with span(COPY):
                item = convert(raw)

            pool.release()
            if not left:
                # nobody needs workers during the last step
                pool.close()

            yield item, raw.replaced
    finally:
        pool.close()


def _sound(found: Raw | Failure) -> Raw:
    if isinstance(found, Failure):
        raise found.error
    return found


def _name(dataset: BatchDataset, sample: int) -> str:
    with suppress(DataError, OSError):
        if isinstance(dataset, Images | Whole):
            return dataset.shards.name(sample)
    return str(sample)
