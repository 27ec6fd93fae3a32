"""Groups: a file with an integer for each sample of a data set, such as the cluster that a stage of
a pipeline has assigned it to.

It is a safetensors file with one tensor `groups` [N] int64 and the fingerprint of the data set,
which is the shards or the subset of them that a run trains on. It is refused with any other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialized

from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.reading.subset_shards import AnyShards
from scaletrain.data.sampling.plan import Ints
from scaletrain.runtime import local_files

# what says that a safetensors file is one of groups
FORMAT = "scaletrain groups 1"
# the group of a sample that is in none
NONE = -1


def save(path: Path, shards: AnyShards, groups: Ints, rule: str) -> None:
    """Write the groups [N] of all samples of `shards`, at least 0, or -1 for a sample in none.

    rule: how they were made, in words. Raises DataError for another number of samples.
    """
    if groups.shape != (len(shards),) or groups.min() < NONE:
        raise DataError(
            f"groups for {len(shards):,} samples must be as many integers of at least {NONE}, got "
            f"{list(groups.shape)}"
        )

    meta = {
        "format": FORMAT,
        "samples": str(len(shards)),
        "data": shards.fingerprint,
        "rule": rule,
    }
    index.atomic(path, serialized({"groups": groups.astype(np.int64)}, meta))


def load(path: Path, shards: AnyShards) -> Ints:
    """The groups [N] of all samples of `shards`. Raises DataError for a file that is damaged or was
    made for other samples.
    """
    try:
        # not a pipe or a device, which would be waited for
        local_files.reader(path).close()
        with safe_open(path, "numpy") as file:
            meta = file.metadata() or {}
            groups = file.get_tensor("groups") if meta.get("format") == FORMAT else None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError:
        groups = None

    if (
        groups is None
        or groups.dtype != np.int64
        or groups.ndim != 1
        or meta.get("samples") != str(groups.size)
    ):
        raise DataError(
            f"{path} is no whole file of groups; write it with scaletrain.data.reading.groups.save"
        )

    if meta.get("data") != shards.fingerprint:
        raise DataError(
            f"{path} has the groups of {groups.size:,} samples of another data set than the "
            f"{len(shards):,} in use, data.subset included; make it again for these"
        )

    whole: Ints = groups
    return whole
