"""Subsets: files that list some samples of the shards of a folder, or of several folders.

A file of the kind `labels` lists labelled samples whose labels may be used: pretraining (SuNCEt),
training on a subset and evaluation read the same file, so that no other label leaks. A file of the
kind `samples` lists any samples, without saying anything about labels. The file contains the
checksum of the shards and is refused with other shards. It is made by `choose` (class-balanced;
nested for one seed), by `any_share` (regardless of labels, nested too) or from a list of names.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from scaletrain import rng
from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.format.names import slug
from scaletrain.data.reading.concat import ConcatShards
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.plan import Ints
from scaletrain.runtime import local_files

VERSION = 1
# files of earlier versions have no kind and list labels
Kind = Literal["labels", "samples"]


@dataclass(frozen=True)
class Subset:
    """The samples of a subset, in ascending order: `index` [n] into the shards."""

    index: Ints
    # how the subset was chosen, in words
    rule: str


@dataclass(frozen=True)
class LabelSubset(Subset):
    """A subset whose labels may be used: `labels` [n] of its samples."""

    labels: Ints


def choose(labels: Ints, total: int, seed: int) -> Ints:
    """`total` of the labelled samples in `labels` [N], equally many of each class -> their indices
    [total], ascending.

    If `total` is not a multiple of the number of classes, some classes have one more; a class that
    is too small gives all its samples and the others give more. With the same seed, a smaller
    choice is a subset of a larger one.
    """
    groups = _by_class(labels)
    # the order in which classes give one more
    order = rng.permutation(len(groups), seed, "subset classes").tolist()
    quota = _quotas(np.array([len(groups[i]) for i in order]), total)

    parts = [
        groups[i][
            rng.permutation(len(groups[i]), seed, "subset", int(labels[groups[i][0]])).numpy()[:n]
        ]
        for i, n in zip(order, quota, strict=True)
    ]

    return np.sort(np.concatenate(parts))


def by_share(labels: Ints, share: float, seed: int) -> Ints:
    """`share` of all labelled samples, rounded down (as SimCLR's lists: 12,811 of 1,281,167 are 1
    %). Raises DataError.
    """
    known = int((labels >= 0).sum())
    total, classes = int(share * known), len(np.unique(labels[labels >= 0]))
    if total < classes:
        raise DataError(
            f"{100 * share:g}% of {known:,} labelled samples are {total}, fewer than the {classes} "
            "classes; take a larger share"
        )

    return choose(labels, total, seed)


def any_share(samples: int, share: float, seed: int) -> Ints:
    """`share` of all samples, labelled or not, rounded down -> their indices, ascending. With the
    same seed, a smaller share is a subset of a larger one. Raises DataError.
    """
    total = int(share * samples)
    if not total:
        raise DataError(f"{100 * share:g}% of {samples:,} samples are none; take a larger share")

    return np.sort(rng.permutation(samples, seed, "subset samples").numpy()[:total])


def per_class(labels: Ints, count: int, seed: int) -> Ints:
    """`count` of each class. Raises DataError for a class that has fewer."""
    groups = _by_class(labels)
    short = next((group for group in groups if len(group) < count), None)
    if short is not None:
        raise DataError(f"class {int(labels[short[0]])} has {len(short)} samples, and not {count}")

    return choose(labels, count * len(groups), seed)


def by_name(shards: Shards | ConcatShards, names: Sequence[str]) -> Ints:
    """The samples made from the files `names`, which may lack folders and suffix, as in SimCLR's
    lists.

    A key ends in the path of its file, with `_` for `/` and other characters. Raises DataError for
    a name of no sample or of two.
    """
    wanted: dict[str, str] = {}

    for name in names:
        ending = slug(str(Path(name).with_suffix("")))
        if ending in wanted:
            raise DataError(f"{name} is listed twice, or its key is that of {wanted[ending]}")
        wanted[ending] = name

    samples: dict[str, int] = {}
    for sample in range(len(shards)):
        for ending in _endings(_key(shards, sample)):
            if ending in wanted:
                if ending in samples:
                    raise DataError(
                        f"{wanted[ending]} is the name of two samples of {place(shards)}; list "
                        "names with their folders"
                    )

                samples[ending] = sample

    missing = next((name for key, name in wanted.items() if key not in samples), None)
    if missing is not None:
        raise DataError(f"{missing} is the name of no sample of {place(shards)}")

    return np.sort(np.array(list(samples.values()), np.int64))


def save(
    path: Path, shards: Shards | ConcatShards, chosen: Ints, rule: str, kind: Kind = "labels"
) -> None:
    """Write a subset, the samples `chosen` [n] in ascending order, to `path`. Raises DataError if
    no sample is chosen, or for the kind `labels` one without a label.
    """
    labels = shards.labels()[chosen]
    if not len(chosen):
        raise DataError(f"{place(shards)}: no samples are chosen")
    if kind == "labels" and labels.min() < 0:
        raise DataError(
            f"{place(shards)}: sample '{_key(shards, int(chosen[labels.argmin()]))}' has no label; "
            "--kind samples lists samples without labels"
        )

    content = {
        "version": VERSION,
        "kind": kind,
        "shards": {
            "folder": ", ".join(folder.name for folder in _folders(shards)),
            "samples": len(shards),
            "sha256": shards.fingerprint,
        },
        "rule": rule,
        "index": chosen.tolist(),
        **({"label": labels.tolist()} if kind == "labels" else {}),
        "key": [_key(shards, int(sample)) for sample in chosen],
    }

    index.atomic(path, (json.dumps(content) + "\n").encode())


def load(path: Path, shards: Shards | ConcatShards) -> LabelSubset:
    """Read the label subset at `path`. Raises DataError if it lists samples without labels, is
    damaged or was made for other shards.
    """
    found = load_samples(path, shards)
    if not isinstance(found, LabelSubset):
        raise DataError(
            f"{path} lists samples and says nothing about their labels; make a label subset with "
            "scaletrain shards subset, without --kind samples"
        )

    return found


def load_samples(path: Path, shards: Shards | ConcatShards) -> Subset:
    """Read a subset of either kind; a LabelSubset if its labels may be used. Raises DataError if it
    is damaged or was made for other shards.
    """
    labels: Ints | None = None
    try:
        with local_files.reader(path) as file:
            raw = json.load(file)

        chosen = np.array(raw["index"], np.int64)
        if (kind := raw.get("kind", "labels")) == "labels":
            labels = np.array(raw["label"], np.int64)

        folder, samples, made_for = (raw["shards"][key] for key in ("folder", "samples", "sha256"))
        sound = (
            raw["version"] == VERSION
            and kind in get_args(Kind)
            and chosen.shape == (len(raw["key"]),)
            and (labels is None or labels.shape == chosen.shape)
            and len(chosen) > 0
        )
        sound = (
            sound and bool((np.diff(chosen) > 0).all()) and chosen[0] >= 0 and chosen[-1] < samples
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ):
        sound = False

    if not sound:
        raise DataError(f"{path} is no subset as scaletrain shards subset writes it")

    if made_for != shards.fingerprint:
        other = f"'{folder}' with {samples} samples"
        text = f"{path} was made for other shards ({other}) than {place(shards)} with {len(shards)}"
        raise DataError(f"{text}; make one with scaletrain shards subset")

    rule = str(raw["rule"])
    if labels is None:
        return Subset(chosen, rule)
    if not np.array_equal(shards.labels()[chosen], labels):
        raise DataError(f"{path} was altered: its labels are not those of {place(shards)}")

    return LabelSubset(chosen, rule, labels)


def place(shards: Shards | ConcatShards) -> str:
    """The folders of shards, for messages."""
    return ", ".join(map(str, _folders(shards)))


def _folders(shards: Shards | ConcatShards) -> list[Path]:
    parts = shards.parts if isinstance(shards, ConcatShards) else [shards]
    return [part.folder for part in parts]


def _by_class(labels: Ints) -> list[Ints]:
    """The samples of each class that has any, by ascending class."""
    order = np.argsort(labels, kind="stable")
    order = order[int((labels < 0).sum()) :]
    if not len(order):
        raise DataError("the shards have no labels")

    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _quotas(sizes: Ints, total: int) -> list[int]:
    """How many samples each class gives: as equal as possible, with the remainder taken from the
    first classes that have more.
    """
    level = (
        bisect_right(
            range(int(sizes.max()) + 1), total, key=lambda n: int(np.minimum(sizes, n).sum())
        )
        - 1
    )

    quota = np.minimum(sizes, level)
    more = np.flatnonzero(sizes > level)[: total - int(quota.sum())]
    quota[more] += 1
    return [int(n) for n in quota]


def _key(shards: Shards | ConcatShards, sample: int) -> str:
    if isinstance(shards, ConcatShards):
        return shards.key(sample)
    return shards.name(sample).partition("/")[2]


def _endings(key: str) -> list[str]:
    """The names by which a key may be listed: `000000012-n01440764_n01440764_18` ->
    `n01440764_n01440764_18`, `n01440764_18`, `18`.
    """
    words = slug(re.sub(r"^\d{9}-", "", key)).split("_")
    return ["_".join(words[i:]) for i in range(len(words))]
