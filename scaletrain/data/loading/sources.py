"""What a recipe reads: its shards, their identity and the order of their samples."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError
from scaletrain.data.loading.dataset import synthetic_counts
from scaletrain.data.reading import groups, subset
from scaletrain.data.reading.concat import ConcatShards, shards_of
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.replacement import admit
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.data.sampling.mixture import Mixture, MixtureSource
from scaletrain.data.sampling.plan import Batches, Ints, Plan

SYNTHETIC = "synthetic"


def open_shards(data: DataConfig) -> AnyShards | None:
    """Open the shards that a recipe names, or its subset of them; None for synthetic data. Raises
    DataError.
    """
    if data.path == SYNTHETIC:
        for key in ("subset", "groups"):
            if getattr(data, key):
                raise DataError(
                    f"data.{key} is of the samples of shards, and synthetic data has none: clear "
                    f"it with data.{key}=''"
                )

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
    if not data.subset:
        return shards
    return SubsetShards(shards, subset.load_samples(Path(data.subset), shards).index)


def open_groups(data: DataConfig, shards: AnyShards | None) -> Ints | None:
    """The integer of each sample [N] of `shards`, as `open_shards` returns them, from data.groups;
    None without that file. Raises DataError.
    """
    if shards is None or not data.groups:
        return None
    return groups.load(Path(data.groups), shards)


def stored_groups(listed: Ints | None, shards: AnyShards | None) -> Ints | None:
    """The groups of all stored samples, -1 for those that are not in use, from those `listed` [N]
    of `shards`.
    """
    if listed is None or not isinstance(shards, SubsetShards):
        return listed

    found = np.full(len(shards.shards), groups.NONE)
    found[shards.rows] = listed
    return found


def open_plan(data: DataConfig, *, seed: int, batch: int) -> Batches:
    """The order in which a recipe's samples are drawn, without reading any sample.

    Raises DataError where shards, subset or groups cannot be used or do not fit batch and lanes.
    """
    shards = open_shards(data)
    open_groups(data, shards)
    return plan_batches(data, shards, seed=seed, batch=batch)


def plan_batches(data: DataConfig, shards: AnyShards | None, *, seed: int, batch: int) -> Batches:
    """The order in which the samples of `shards`, as `open_shards` returns them, are drawn. Raises
    DataError where batch, lanes and data do not fit together.
    """
    if data.mixture and not isinstance(shards, Shards | None):
        sources = [
            MixtureSource(part.path, counts, part.weight)
            for part, counts in zip(data.mixture, shards.folder_counts, strict=True)
        ]
    else:
        counts = synthetic_counts(data.synthetic_samples) if shards is None else shards.counts
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


def identity(path: str, shards: Shards | SubsetShards) -> dict[str, Any]:
    """The identity of a data set as a checkpoint stores it: path, number of samples, sha256."""
    return {"path": path, "samples": len(shards), "sha256": shards.fingerprint}


def identities(data: DataConfig, shards: AnyShards | None) -> list[dict[str, Any]]:
    """The identity of each data set of a recipe, with its weight in a mixture; of a subset that of
    the whole data sets.
    """
    if isinstance(shards, SubsetShards):
        shards = shards.shards
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


def list_identities(
    data: DataConfig, shards: AnyShards | None, listed: Ints | None
) -> dict[str, dict[str, Any]]:
    """The identity of the files that list the samples of a recipe, `subset`, and their `groups`,
    which are `listed` [N].
    """
    found: dict[str, dict[str, Any]] = {}
    if isinstance(shards, SubsetShards):
        found["subset"] = identity(data.subset, shards)
    if listed is not None:
        sha256 = hashlib.sha256(listed.tobytes()).hexdigest()
        found["groups"] = {"path": data.groups, "samples": len(listed), "sha256": sha256}

    return found
