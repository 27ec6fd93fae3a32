"""Label subsets: files that list the few samples of a folder of shards whose labels may be used.

Pretraining (SuNCEt) and evaluation read the same file, so that no other label leaks. The file
contains the checksum of the shards and is refused with other shards. It is made by `choose`
(class-balanced; nested for one seed) or from a list of names.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaletrain import rng
from scaletrain.data.errors import DataError
from scaletrain.data.format import index
from scaletrain.data.format.names import slug
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.plan import Ints
from scaletrain.runtime import local_files

VERSION = 1


@dataclass(frozen=True)
class LabelSubset:
    """The samples of a subset, in ascending order: `index` [n] into the shards, `labels` [n] of
    them.
    """

    index: Ints
    labels: Ints
    # how the subset was chosen, in words
    rule: str


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


def per_class(labels: Ints, count: int, seed: int) -> Ints:
    """`count` of each class. Raises DataError for a class that has fewer."""
    groups = _by_class(labels)
    short = next((group for group in groups if len(group) < count), None)
    if short is not None:
        raise DataError(f"class {int(labels[short[0]])} has {len(short)} samples, and not {count}")

    return choose(labels, count * len(groups), seed)


def by_name(shards: Shards, names: Sequence[str]) -> Ints:
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
                        f"{wanted[ending]} is the name of two samples of {shards.folder}; list "
                        "names with their folders"
                    )

                samples[ending] = sample

    missing = next((name for key, name in wanted.items() if key not in samples), None)
    if missing is not None:
        raise DataError(f"{missing} is the name of no sample of {shards.folder}")

    return np.sort(np.array(list(samples.values()), np.int64))


def save(path: Path, shards: Shards, chosen: Ints, rule: str) -> LabelSubset:
    """Write a subset to `path`. Raises DataError if a chosen sample has no label."""
    labels = shards.labels()[chosen]
    if not len(chosen) or labels.min() < 0:
        what = (
            f"sample '{_key(shards, int(chosen[labels.argmin()]))}' has no label"
            if len(chosen)
            else "no samples are chosen"
        )
        raise DataError(f"{shards.folder}: {what}")

    content = {
        "version": VERSION,
        "shards": {
            "folder": shards.folder.name,
            "samples": len(shards),
            "sha256": shards.fingerprint,
        },
        "rule": rule,
        "index": chosen.tolist(),
        "label": labels.tolist(),
        "key": [_key(shards, int(sample)) for sample in chosen],
    }

    index.atomic(path, (json.dumps(content) + "\n").encode())
    return LabelSubset(chosen, labels, rule)


def load(path: Path, shards: Shards) -> LabelSubset:
    """Read the subset at `path`. Raises DataError if it is damaged or was made for other shards."""
    try:
        with local_files.reader(path) as file:
            raw = json.load(file)

        chosen, labels = np.array(raw["index"], np.int64), np.array(raw["label"], np.int64)
        folder, samples, made_for = (raw["shards"][key] for key in ("folder", "samples", "sha256"))
        sound = (
            raw["version"] == VERSION
            and chosen.shape == labels.shape == (len(raw["key"]),)
            and len(chosen) > 0
        )
        sound = (
            sound and bool((np.diff(chosen) > 0).all()) and chosen[0] >= 0 and chosen[-1] < samples
        )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        sound = False

    if not sound:
        raise DataError(f"{path} is no file of labels as scaletrain shards subset writes it")

    if made_for != shards.fingerprint:
        other = f"'{folder}' with {samples} samples"
        text = f"{path} was made for other shards ({other}) than {shards.folder} with {len(shards)}"
        raise DataError(f"{text}; make one with scaletrain shards subset")

    if not np.array_equal(shards.labels()[chosen], labels):
        raise DataError(f"{path} was altered: its labels are not those of {shards.folder}")

    return LabelSubset(chosen, labels, str(raw["rule"]))


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


def _key(shards: Shards, sample: int) -> str:
    return shards.name(sample).partition("/")[2]


def _endings(key: str) -> list[str]:
    """The names by which a key may be listed: `000000012-n01440764_n01440764_18` ->
    `n01440764_n01440764_18`, `n01440764_18`, `18`.
    """
    words = slug(re.sub(r"^\d{9}-", "", key)).split("_")
    return ["_".join(words[i:]) for i in range(len(words))]
