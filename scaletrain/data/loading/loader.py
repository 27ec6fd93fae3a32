"""Streams of batches on the device. The number of the next step is the whole state of a stream."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch

from scaletrain import dist
from scaletrain.config.schema import CacheConfig, DataConfig
from scaletrain.core import Batch
from scaletrain.data.loading.batches import (
    EpochSteps,
    OnReplaced,
    ignore_replaced,
    load,
    sample_name,
)
from scaletrain.data.loading.dataset import BatchDataset, Images, SyntheticImages
from scaletrain.data.loading.eval_images import EvalImages, EvalTransform
from scaletrain.data.loading.sources import (
    identities,
    list_identities,
    open_groups,
    open_shards,
    plan_batches,
    stored_groups,
)
from scaletrain.data.loading.support import SupportLoader
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.maps import identities as map_identities
from scaletrain.data.reading.maps import open_maps
from scaletrain.data.reading.reader import DEFAULT_CACHE, Shards
from scaletrain.data.reading.replacement import admit, left_out
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.plan import Batches, Ints


def open_stream(
    data: DataConfig,
    *,
    seed: int,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    every: bool = False,
) -> Stream:
    """Open the training data of one rank. `batch` is the size of the global batch.

    `every`: epochs have all samples, see plan.EverySample. Raises DataError where batch, lanes,
    world size and data set do not fit together.
    """
    shards = open_shards(data)
    options = {"seed": seed, "batch": batch, "rank": rank, "world": world}
    return stream_of(data, shards, **options, device=device, every=every)


def stream_of(
    data: DataConfig,
    shards: AnyShards | None,
    *,
    seed: int,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    every: bool = False,
) -> Stream:
    """As open_stream, of shards that are open: those of `data.path` or a subset of them."""
    groups = open_groups(data, shards)
    plan = plan_batches(data, shards, seed=seed, batch=batch)
    plan = plan.every() if every else plan
    lo, hi = plan.part(rank, world)
    maps = [] if shards is None else open_maps(data, shards)

    for source in () if shards is None else (shards, *maps):
        # one rank is enough here, since every rank checks the shards that it opens
        if rank == 0:
            source.check()
        source.fits(-(-plan.in_use()[1] * dist.local_world() // world))

    support = None
    if data.support is not None:
        support = SupportLoader(
            data,
            data.support,
            seed=seed,
            batch=batch,
            rank=rank,
            world=world,
            device=device,
            steps_per_epoch=plan.steps_per_epoch,
            groups=stored_groups(groups, shards),
        )

    dataset: BatchDataset = (
        SyntheticImages(data, plan, lo, hi)
        if shards is None
        else Images(data, shards, plan, lo, hi, groups, maps)
    )
    kinds = [config.kind for config in data.all_maps]
    to_device = ToDevice(device, seed, data.mean, data.std, kinds)
    found = map_identities(data, maps)
    return Stream(data, shards, plan, dataset, support, to_device, groups, found)


class Stream:
    """The training data of one rank: the same global batches at every world size and number of
    workers. Made by `open_stream`.

    `samples`, `steps_per_epoch`: of the whole data set in use, which may be a subset. `missing`:
    the share of samples that indexing left out. `maps`: the identity of each map of the samples.
    """

    def __init__(
        self,
        data: DataConfig,
        shards: AnyShards | None,
        plan: Batches,
        dataset: BatchDataset,
        support: SupportLoader | None,
        to_device: ToDevice,
        groups: Ints | None = None,
        maps: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.data, self.plan, self.dataset, self.support = data, plan, dataset, support
        self.maps = maps
        self.samples, self.steps_per_epoch = plan.samples, plan.steps_per_epoch
        self.missing = 0.0 if shards is None else left_out(shards.losses)
        self._shards, self._to_device, self._groups = shards, to_device, groups
        self._running: list[Generator[Batch, None, None]] = []

    def batches(
        self, start: int, stop: int, lost: OnReplaced = ignore_replaced
    ) -> Generator[Batch, None, None]:
        """Batches of the global steps start .. stop - 1, across the ends of epochs without a pause.

        lost(step, replaced) is called for each batch before it is yielded.
        """
        running = self._batches(start, stop, lost)
        self._running = [
            *(r for r in self._running if inspect.getgeneratorstate(r) != inspect.GEN_CLOSED),
            running,
        ]

        return running

    def mixing(self) -> str:
        """One line on what a batch is drawn from, how well it mixes and the cache it needs."""
        shards = self._shards
        text = self.plan.mixing(0.0 if shards is None else shards.shard_bytes)
        if isinstance(shards, SubsetShards):
            shards = shards.shards
            text += f"; data.subset selects {self.samples:,} of {len(shards):,} samples"
        if isinstance(shards, ConcatShards) and not shards.labelled:
            text += "; labels are not used: the parts differ in classes.json, or lack it"

        return text if self.support is None else f"{text}; plus {self.support.mixing()}"

    def labels(self) -> Ints | None:
        """The labels of all samples [N], -1 where unknown; None for synthetic data, whose labels
        are made up.
        """
        return None if self._shards is None else self._shards.labels()

    def unlabelled(self) -> str:
        """How many samples have no known label, in words; "" if all have one."""
        return "" if self._shards is None else self._shards.unlabelled()

    def sources(self) -> list[dict[str, Any]]:
        """For each data set its path, number of samples, weight in a mixture, and a sha256 of all
        its shards.
        """
        return identities(self.data, self._shards)

    def list_sources(self) -> dict[str, dict[str, Any]]:
        """The same for the files data.subset and data.groups, as far as they are used."""
        return list_identities(self.data, self._shards, self._groups)

    def support_sources(self) -> list[dict[str, Any]]:
        """The same for the labelled samples that accompany the batches."""
        return [] if self.support is None else self.support.sources

    def name(self, sample: int) -> str:
        """Where a sample is stored: SHARD.tar/KEY, or its number if the data is synthetic or can no
        longer be read.
        """
        return sample_name(self.dataset, sample)

    def close(self) -> None:
        """Stop the workers of every iterator that is still open."""
        while self._running:
            self._running.pop().close()

    def _batches(self, start: int, stop: int, lost: OnReplaced) -> Generator[Batch, None, None]:
        batches = load(
            self.dataset,
            EpochSteps(start, stop, self.steps_per_epoch),
            self._to_device,
            self._to_device.device,
            **self.data.model_dump(include={"workers", "prefetch", "timeout", "liveness"}),
        )
        support = None if self.support is None else self.support.batches(start, stop)

        try:
            for step, (batch, replaced) in enumerate(batches, start):
                lost(step, replaced)
                if self.support is not None and support is not None and step < self.support.until:
                    labelled, replaced = next(support)
                    lost(step, replaced)
                    batch = replace(batch, support=labelled)

                yield batch
        finally:
            batches.close()
            if support is not None:
                support.close()


def eval_batches(
    source: str | AnyShards,
    *,
    transform: EvalTransform,
    parts: Sequence[tuple[int, int]] | None = None,
    batch: int = 256,
    workers: int = 0,
    device: torch.device,
    mean: Sequence[float],
    std: Sequence[float],
    max_pixels: int = 50_000_000,
    timeout: float = 300.0,
    liveness: float = 60.0,
    cache: CacheConfig = DEFAULT_CACHE,
    skip: bool = False,
    lost: OnReplaced = ignore_replaced,
) -> Iterator[Batch]:
    """Every sample once, in the order of the shards, as one view [1, B, 3, size, size].

    `source` is a folder, pattern or address, or shards that are open; these are released after the
    pass and can be read again. `parts`: the ranges [lo, hi) of samples to read, ascending; a batch
    ends where its part does, so that it may be shorter than `batch`. By default all samples are one
    part. With `skip`, samples that cannot be used are left out, and the batch may be empty.
    lost(number of the batch, samples left out of it) is called for each batch before it is yielded.
    """
    shards = Shards(source, cache=cache, skip=skip) if isinstance(source, str) else source
    if not skip:
        admit(shards.losses)

    parts = [(0, len(shards))] if parts is None else parts
    ranges = [(at, min(at + batch, hi)) for lo, hi in parts for at in range(lo, hi, batch)]
    dataset = EvalImages(shards, transform, ranges, max_pixels, skip)
    to_device = ToDevice(device, 0, mean, std)

    def batches() -> Iterator[Batch]:
        loaded = load(
            dataset,
            ranges,
            to_device,
            device,
            workers=workers,
            prefetch=2,
            timeout=timeout,
            liveness=liveness,
        )

        with closing(shards), closing(loaded):
            for number, (batch, left_out) in enumerate(loaded):
                lost(number, left_out)
                yield batch

    return batches()
