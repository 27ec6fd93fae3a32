"""Labelled samples that accompany every batch for an auxiliary loss (SuNCEt).

They are class-balanced and a pure function of (seed, epoch, step): the classes take turns in
rounds, each round in an order of its own, and so do the samples of a class. So every world size and
number of workers sees the same batches, and the step is the whole state.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaletrain import rng
from scaletrain.config.schema import DataConfig, SupportConfig
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.loading import sources
from scaletrain.data.loading.batches import EpochSteps, load
from scaletrain.data.loading.dataset import (
    BatchDataset,
    Failure,
    Images,
    RawBatch,
    SyntheticImages,
)
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.reading import subset
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.balanced import Balanced
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.sampling.substitutes import Replaced


class SupportLoader:
    """Makes the labelled samples of one rank for the first `until` steps of a run.

    `data` is that of the whole run; its `support` must be set. Labelled samples are chosen from all
    that are stored, whatever data.subset is, and are numbered among them. `groups` [N]: those of
    all samples stored in data.path. Raises DataError.
    """

    def __init__(
        self,
        data: DataConfig,
        support: SupportConfig,
        *,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        device: torch.device,
        steps_per_epoch: int,
        groups: Ints | None = None,
    ) -> None:
        if data.mixture and not support.path:
            raise DataError(
                "data.support needs a folder of its own when data.mixture is used; set "
                "data.support.path"
            )

        own = _own_data(data, support)
        shards = sources.open_shards(own)
        if not isinstance(shards, Shards | None):
            raise DataError(
                "data.support needs the shards of one folder, not of a list of several; set "
                "data.support.path"
            )

        index, labels = _allowed(own, support, shards)
        self.sources = [] if shards is None else [_identity(own, support, shards, len(index))]

        # a seed of its own, or a sample would be cropped in the same way in both batches
        seed = int(rng.hash64(seed, "support"))
        self.plan = Balanced(
            index,
            labels,
            seed=seed,
            classes=support.classes,
            per_class=support.per_class,
            steps_per_epoch=steps_per_epoch,
        )

        self.until = round(support.epochs * steps_per_epoch)
        lo, hi = self.plan.part(rank, world)
        self._dataset: BatchDataset = (
            SyntheticImages(own, self.plan, lo, hi, support.classes)
            if shards is None
            else LabelledImages(
                own, shards, self.plan, lo, hi, groups if own.path == data.path else None
            )
        )

        # as large a share of the workers as these samples have of the pixels
        views = sum(spec.count for spec in data.views)
        self._workers = math.ceil(data.workers * self.plan.size / (batch * views))
        self._limits = data.model_dump(include={"prefetch", "timeout", "liveness"})
        self._to_device, self._device = ToDevice(device, seed, data.mean, data.std), device

    def mixing(self) -> str:
        """What comes with each batch, in words."""
        return f"{self.plan.mixing()} with each of the first {self.until:,} steps"

    def batches(
        self, start: int, stop: int
    ) -> Generator[tuple[Batch, Sequence[Replaced]], None, None]:
        """The labelled samples of the global steps start .. stop - 1 that come before `until`."""
        steps = EpochSteps(start, max(start, min(stop, self.until)), self.plan.steps_per_epoch)
        return load(
            self._dataset,
            steps,
            self._to_device,
            self._device,
            workers=self._workers,
            **self._limits,
        )


class LabelledImages(Images):
    """Images whose substitutes for bad samples have no label, since a substitute may lie outside
    the label subset.
    """

    def __getitem__(self, at: tuple[int, int]) -> RawBatch | Failure:
        raw = super().__getitem__(at)
        if isinstance(raw, RawBatch) and raw.planned is not None:
            raw.labels[raw.samples != raw.planned] = -1
        return raw


def _own_data(data: DataConfig, support: SupportConfig) -> DataConfig:
    """The data configuration of the labelled samples: one view of each, as in SuNCEt."""
    first = next(view for view in data.views if view.count)
    views = (first.model_copy(update={"count": 1}),)
    return data.plain(path=support.path or data.path, mixture=(), subset="", groups="", views=views)


def _allowed(data: DataConfig, support: SupportConfig, shards: Shards | None) -> tuple[Ints, Ints]:
    """Numbers and labels of the samples whose labels may be used. Raises DataError."""
    if shards is None:
        index = np.arange(data.synthetic_samples)
        return index, index % support.classes

    if support.labels:
        chosen = subset.load(Path(support.labels), shards)
        return chosen.index, chosen.labels

    if not support.path:
        raise DataError(
            "data.support.labels is empty: add data.support.labels=FILE, a label subset that "
            "scaletrain shards subset writes"
        )

    labels = shards.labels()
    index = np.flatnonzero(labels >= 0)
    return index, labels[index]


def _identity(
    data: DataConfig, support: SupportConfig, shards: Shards, samples: int
) -> dict[str, Any]:
    """The identity of the labelled samples, with the checksum of the file that lists them."""
    listed = (
        {"labels": hashlib.sha256(Path(support.labels).read_bytes()).hexdigest()}
        if support.labels
        else {}
    )
    return {**sources.identity(data.path, shards), "samples": samples, **listed}
