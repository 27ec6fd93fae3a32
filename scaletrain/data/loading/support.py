"""Labelled samples beside every batch, for an auxiliary: class-balanced, a pure function of (seed,
epoch, step).

The classes take turns in rounds, each in an order of its own; the samples of a class take turns in
passes likewise. So every world size and number of workers sees the same batches, and there is no
state but the step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaletrain import rng
from scaletrain.config.schema import Data, Support
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.loading.dataset import BatchDataset, Failure, Images, Raw, Synthetic
from scaletrain.data.loading.loader import Steps, Stream, load, opened, source
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.data.reading import subset
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.balanced import Balanced
from scaletrain.data.sampling.plan import Ints
from scaletrain.data.sampling.substitutes import Replaced


def stream(
    data: Data, *, seed: int, batch: int, rank: int, world: int, device: torch.device
) -> Stream:
    """The training data of one rank, with the labelled samples that the recipe asks for. Raises
    DataError.
    """
    kind = Stream if data.support is None else Supported
    return kind(data, seed=seed, batch=batch, rank=rank, world=world, device=device)


class Labelled(Images):
    """As Images; a substitute of a bad sample has no label, for it may lie outside the label
    subset.
    """

    def __getitem__(self, at: tuple[int, int]) -> Raw | Failure:
        raw = super().__getitem__(at)
        if isinstance(raw, Raw) and raw.planned is not None:
            raw.labels[raw.samples != raw.planned] = -1
        return raw


class Supported(Stream):
    """A stream whose batches carry `support`, until the epochs of data.support are over."""

    def __init__(
        self, data: Data, *, seed: int, batch: int, rank: int, world: int, device: torch.device
    ) -> None:
        super().__init__(data, seed=seed, batch=batch, rank=rank, world=world, device=device)
        asked = data.support
        assert asked is not None
        if data.mixture and not asked.path:
            raise DataError(
                "data.support needs a folder of its own beside data.mixture; set data.support.path"
            )

        first = next(view for view in data.views if view.count)
        # SuNCEt's labelled images are single views
        one = first.model_copy(update={"count": 1})
        update = {
            "path": asked.path or data.path,
            "mixture": (),
            "support": None,
            "masks": False,
            "good_crops": 0.0,
            "views": (one,),
        }

        own = data.model_copy(update=update)
        shards = opened(own)
        if isinstance(shards, ConcatShards):
            raise DataError(
                "data.support needs the shards of one folder, not of a list of several; set "
                "data.support.path"
            )

        index, labels = _allowed(own, asked, shards)
        listed = (
            {"labels": hashlib.sha256(Path(asked.labels).read_bytes()).hexdigest()}
            if asked.labels
            else {}
        )
        self._sources = (
            []
            if shards is None
            else [{**source(own.path, shards), "samples": len(index), **listed}]
        )

        # or a sample would be cropped alike in both
        seed = int(rng.hash64(seed, "support"))
        steps = self.steps_per_epoch
        self.beside = Balanced(
            index,
            labels,
            seed=seed,
            classes=asked.classes,
            per_class=asked.per_class,
            steps_per_epoch=steps,
        )

        self.until = round(asked.epochs * steps)
        lo, hi = self.beside.part(rank, world)
        self._labelled: BatchDataset = (
            Synthetic(own, self.beside, lo, hi, asked.classes)
            if shards is None
            else Labelled(own, shards, self.beside, lo, hi)
        )
        views = sum(spec.count for spec in data.views)
        # a share as large as that of the pixels
        self._workers = math.ceil(data.workers * self.beside.size / (batch * views))

        self._labelled_to_device = ToDevice(device, seed, data.mean, data.std)

    def support_sources(self) -> list[dict[str, Any]]:
        return self._sources

    def mixing(self) -> str:
        return (
            f"{super().mixing()}; beside it {self.beside.mixing()} in the first {self.until:,} "
            "steps"
        )

    def _batches(
        self, start: int, stop: int, lost: Callable[[int, Sequence[Replaced]], None]
    ) -> Generator[Batch, None, None]:
        steps = Steps(start, max(start, min(stop, self.until)), self.steps_per_epoch)
        options = {"workers": self._workers, **self._limits()}
        with closing(
            load(self._labelled, steps, self._labelled_to_device, self.device, **options)
        ) as labelled:
            for step, batch in enumerate(super()._batches(start, stop, lost), start):
                if step < self.until:
                    support, replaced = next(labelled)
                    lost(step, replaced)
                    batch = replace(batch, support=support)
                yield batch


def _allowed(data: Data, asked: Support, shards: Shards | None) -> tuple[Ints, Ints]:
    """Numbers and labels of the samples whose labels may be used. Raises DataError."""
    if shards is None:
        index = np.arange(data.synthetic_samples)
        return index, index % asked.classes

    if asked.labels:
        found = subset.load(Path(asked.labels), shards)
        return found.index, found.labels

    if not asked.path:
        raise DataError(
            "data.support.labels is empty: add data.support.labels=FILE, a label subset that "
            "shards/subset.py writes"
        )

    labels = shards.labels()
    index = np.flatnonzero(labels >= 0)
    return index, labels[index]
