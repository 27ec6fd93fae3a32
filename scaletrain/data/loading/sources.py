"""What a recipe reads: its shards, their identity and the order of their samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError
from scaletrain.data.loading.dataset import synthetic_counts
from scaletrain.data.reading.concat import ConcatShards, shards_of
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import admit
from scaletrain.data.sampling.mixture import Mixture, MixtureSource
from scaletrain.data.sampling.plan import Batches, Ints, Plan

SYNTHETIC = "synthetic"


def open_shards(data: DataConfig) -> Shards | ConcatShards | None:
    """Open the shards that a recipe names; None for synthetic data. Raises DataError."""
    if data.path == SYNTHETIC:
        return None
    if not data.path and not data.mixture:
        raise DataError(
            "data.path is empty: add data.path=FOLDER, a folder of shards such as scaletrain "
            "shards folder "
            "writes, or data.path=synthetic"
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


def open_plan(data: DataConfig, *, seed: int, batch: int) -> Batches:
    """The order in which a recipe's samples are drawn, without reading any sample.

    Raises DataError where the shards cannot be used or do not fit batch and lanes.
    """
    return plan_batches(data, open_shards(data), seed=seed, batch=batch)


def plan_batches(
    data: DataConfig,
    shards: Shards | ConcatShards | None,
    *,
    seed: int,
    batch: int,
    rows: Ints | None = None,
) -> Batches:
    """The order in which the samples of `shards`, as `open_shards` returns them, are drawn.

    `rows` [N] restricts the plan to these samples. Raises DataError where batch, lanes and data do
    not fit together.
    """
    if data.mixture and isinstance(shards, ConcatShards):
        sources = [
            MixtureSource(part.path, source.counts, part.weight)
            for part, source in zip(data.mixture, shards.parts, strict=True)
        ]
    else:
        counts = synthetic_counts(data.synthetic_samples) if shards is None else shards.counts
        counts = counts if rows is None else np.array([len(rows)])
        sources = [MixtureSource(data.path, counts, 1.0)]
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


def identity(path: str, shards: Shards) -> dict[str, Any]:
    """The identity of a data set as a checkpoint stores it: path, number of samples, sha256."""
    return {"path": path, "samples": len(shards), "sha256": shards.fingerprint}


def identities(data: DataConfig, shards: Shards | ConcatShards | None) -> list[dict[str, Any]]:
    """The identity of each data set of a recipe, with its weight in a mixture."""
    if shards is None:
        return [{"path": SYNTHETIC, "samples": data.synthetic_samples}]
    if isinstance(shards, Shards):
        return [identity(data.path, shards)]
    if not data.mixture:
        return [identity(str(part.folder), part) for part in shards.parts]

    return [
        {**identity(part.path, source), "weight": part.weight}
        for part, source in zip(data.mixture, shards.parts, strict=True)
    ]
