"""Makes the batches of a data set one after another, in this process or by loader workers."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch

from scaletrain.data.errors import DataError
from scaletrain.data.loading.dataset import BatchDataset, Failure, Images, RawBatch, Sampler
from scaletrain.data.loading.eval_images import EvalImages
from scaletrain.data.loading.workers import WorkerPool
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.runtime.timing import COPY, span

T = TypeVar("T")
# called with the number of a step and the draws that were replaced in it
OnReplaced = Callable[[int, Sequence[Replaced]], None]


def ignore_replaced(step: int, replaced: Sequence[Replaced]) -> None:
    """The OnReplaced of passes over the data that are not steps of training."""


class EpochSteps:
    """A Sampler: (epoch, step of the epoch) of each global step in start .. stop - 1."""

    def __init__(self, start: int, stop: int, steps_per_epoch: int) -> None:
        self.range, self.steps_per_epoch = range(start, stop), steps_per_epoch

    def __len__(self) -> int:
        return len(self.range)

    def __getitem__(self, number: int) -> tuple[int, int]:
        return divmod(self.range[number], self.steps_per_epoch)


def load(
    dataset: BatchDataset,
    sampler: Sampler,
    convert: Callable[[RawBatch], T],
    device: torch.device,
    *,
    workers: int,
    prefetch: int,
    timeout: float,
    liveness: float,
) -> Generator[tuple[T, Sequence[Replaced]], None, None]:
    """Yield convert(raw batch) for each item of the sampler, in its order, with the draws that were
    replaced in that batch.

    Batches are made by `workers` processes, or in this process if `workers` is 0. `convert` must
    copy what it keeps, since the memory of the raw batch is reused. Raises DataError, also for
    workers that die or hang.
    """
    workers = min(workers, len(sampler))

    if not workers:
        for number in range(len(sampler)):
            raw = _checked(dataset[sampler[number]])
            with span(COPY):
                item = convert(raw)
            yield item, raw.replaced

        return

    pool = WorkerPool(
        dataset,
        sampler,
        partial(sample_name, dataset),
        device,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
        liveness=liveness,
    )

    try:
        for remaining in reversed(range(len(sampler))):
            raw = _checked(pool.take())
            with span(COPY):
                item = convert(raw)

            pool.release()
            if not remaining:
                # the workers are not needed while the caller uses the last batch
                pool.close()

            yield item, raw.replaced
    finally:
        pool.close()


def sample_name(dataset: BatchDataset, sample: int) -> str:
    """Where a sample is stored: SHARD.tar/KEY, or its number if the data is synthetic or can no
    longer be read.
    """
    with suppress(DataError, OSError):
        if isinstance(dataset, Images | EvalImages):
            return dataset.shards.name(sample)
    return str(sample)


def _checked(made: RawBatch | Failure) -> RawBatch:
    if isinstance(made, Failure):
        raise made.error
    return made
