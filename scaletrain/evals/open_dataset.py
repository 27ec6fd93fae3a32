"""An opened dataset for evaluation: its images and their classes, split by split.

    dataset = datasets.load("pets", root) or datasets.given(train, test, labels=..., ...)
    opened = open_dataset(dataset, cache=data.cache, skip=skip, max_bad=max_bad)
    part = opened.part("train")

A split is a selection of the rows of its shards. Training, validation and all of both ("trainval")
are rows of the same shards, so that these are encoded once, and a split takes
`features[part.rows]`. Where only few rows are wanted of many, as for the held-out images of a probe
on augmented images, `part.selected` are the shards of these rows alone.

Samples that cannot be read are known after a pass over `part.shards` only. They belong to no split:
`opened.part("train", unreadable)`, with their numbers in `part.shards`, leaves them out and holds
out others.

Labels are the classes of the training images, numbered by first appearance, except those of the
test images under a label map (`opened.groups` is not None): there `opened.best(scores)` turns
scores of training classes [Q, classes] into those of test classes [Q, scored], to be ranked against
the labels of "test". Without a map it changes nothing, so a benchmark may always call it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from scaletrain.config.schema import CacheConfig
from scaletrain.data.reading.reader import DEFAULT_CACHE
from scaletrain.data.reading.subset_shards import AnyShards, SubsetShards
from scaletrain.evals.classes import Classes, match
from scaletrain.evals.datasets import ROOT_VARIABLE, BenchmarkDataset, missing
from scaletrain.evals.errors import EvalError
from scaletrain.evals.held_out import held_out
from scaletrain.evals.label_maps import ClassGroups, by_number, group
from scaletrain.evals.split_images import Opener, SplitImages

SplitName = Literal["train", "val", "trainval", "test"]


@dataclass(frozen=True)
class Part:
    """The samples of a split.

    path: of the shards, for people. shards: all that are encoded together. rows [K] int64: the
    samples of the split, as ascending numbers in `shards`. labels [K] int64.
    """

    path: str
    shards: AnyShards
    rows: Tensor
    labels: Tensor

    @property
    def selected(self) -> AnyShards:
        """The shards of these rows alone."""
        if len(self.rows) == len(self.shards):
            return self.shards
        return SubsetShards(self.shards, self.rows.numpy())

    @property
    def index(self) -> Tensor:
        """Numbers [K] of the samples in the folder or folders of the split."""
        if isinstance(self.shards, SubsetShards):
            return torch.from_numpy(self.shards.rows)[self.rows]
        return self.rows


class OpenDataset:
    """A dataset whose shards are open and whose classes are matched; see the module's text.

    matched: the classes. groups: of them, which a label map makes the classes of the test set.
    """

    def __init__(
        self,
        dataset: BenchmarkDataset,
        train: SplitImages,
        test: SplitImages,
        matched: Classes,
        groups: ClassGroups | None,
        skip: bool,
    ) -> None:
        self.dataset, self.matched, self.groups, self.skip = dataset, matched, groups, skip
        self._train, self._test = train, test

    @property
    def name(self) -> str:
        """Name of the dataset in results."""
        return self.dataset.name

    @property
    def metric(self) -> str:
        """The main metric of this dataset, as in BenchmarkDataset."""
        return self.dataset.metric

    @property
    def border(self) -> int:
        """Pixels that the test transform cuts from each side of a test image; none of others."""
        return self.dataset.border

    @property
    def classes(self) -> int:
        """Number of classes of the training images, which a head tells apart."""
        return self.matched.count

    @property
    def scored(self) -> int:
        """Number of classes that a prediction chooses from; `classes` without a label map."""
        return self.matched.count if self.groups is None else self.groups.count

    def best(self, scores: Tensor) -> Tensor:
        """Scores [Q, classes] of the training images' classes as those of the classes to choose
        from [Q, scored].
        """
        return scores if self.groups is None else self.groups.best(scores)

    def part(self, split: SplitName, unreadable: Sequence[int] | Tensor = ()) -> Part:
        """The samples of a split. unreadable: numbers in its shards that belong to no split. Raises
        EvalError where the training images cannot be split.
        """
        images = self._test if split == "test" else self._train
        labels = self.matched.test if split == "test" else self.matched.train
        rows = torch.arange(len(images.shards))
        if len(unreadable):
            rows = rows[~torch.isin(rows, torch.as_tensor(unreadable, dtype=torch.int64))]

        if split in ("train", "val"):
            val = self._validation(rows, labels[rows])
            rows = rows[val if split == "val" else ~val]

        return Part(images.path, images.shards, rows, labels[rows])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that defines the samples, their splits and their classes, as far as it is known
        before a sample is read. Paths and names do not belong to it.
        """
        dataset, train, test = self.dataset, self._train, self._test
        val = None if train.val is None else hashlib.sha256(train.val.numpy().tobytes()).hexdigest()
        further = {
            "val": val,
            "held_out": dataset.held_out or None,
            "held_out_per_class": dataset.held_out_per_class or None,
            "test_subset": test.chosen,
            "border": dataset.border or None,
            "label_map": dataset.label_map,
            "restrict": dataset.restrict or None,
        }

        return {
            "train": train.base.fingerprint,
            "test": test.base.fingerprint,
            "labels": train.chosen,
            "classes": {"matched": self.matched.matched, "sha256": self.matched.sha256},
            "metric": dataset.metric,
            **{key: value for key, value in further.items() if value is not None},
        }

    def provenance(self) -> dict[str, Any]:
        """The data as written in results: of training and test images the path, the number of
        samples and the sha256 of their shards; the classes; the subset that was trained on.
        """
        data: dict[str, Any] = {}
        for name, images in (("train", self._train), ("test", self._test)):
            base = images.base
            data[name] = {
                "path": images.path,
                "samples": len(base),
                "sha256": base.fingerprint,
            }
            if self.skip:
                data[name]["left_out_of_index"] = sum(loss.samples for loss in base.losses)
            if len(images.shards) < len(base):
                data[name]["used"] = len(images.shards)

        data["classes"] = {"count": self.classes, "matched": self.matched.matched}
        subset = self._train.subset
        return data | ({} if subset is None else {"labels": subset})

    def leaks(self, trained_on: Collection[str] = ()) -> list[str]:
        """Sentences on test images that are training images: of this dataset, or of the encoder.

        trained_on: sha256 of the datasets of the encoder's training.
        """
        train, test, matches = self._train, self._test, []
        seen = test.common(test.rows, train, train.rows)
        if seen:
            matches.append(
                f"{seen:,} of {len(test.shards):,} test images of {test.path} are training images "
                f"of dataset {self.name} too"
            )

        known = {test.base.fingerprint, *(part.fingerprint for part in test.parts)}
        if known & set(trained_on):
            matches.append(
                f"the encoder, or what it started from, was trained on the images of {test.path}"
            )

        return matches

    def _validation(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Which training images [N] choose settings: the official ones, or held-out ones."""
        dataset, images = self.dataset, self._train
        if images.val is not None:
            return images.val[rows]

        few = images.subset is not None or dataset.held_out_per_class > 0
        out = held_out(
            len(rows),
            labels if few else None,
            count=dataset.held_out,
            per_class=dataset.held_out_per_class,
        )
        return torch.zeros(len(rows), dtype=torch.bool).index_fill(0, out, True)


def open_dataset(
    dataset: BenchmarkDataset,
    *,
    cache: CacheConfig = DEFAULT_CACHE,
    skip: bool = False,
    max_bad: float = 0.0,
) -> OpenDataset:
    """Open the shards of a dataset, as `datasets.load` or `datasets.given` describe it.

    skip: samples that cannot be read will be left out, and up to the share `max_bad` of those that
    indexing left out is accepted here. Raises EvalError where labels do not fit together, DataError
    for a folder without shards or a subset of other shards.
    """
    if dataset.how and (lacking := missing(dataset)):
        commands = " && ".join(dataset.how.strip().splitlines())
        raise EvalError(
            f"dataset {dataset.name}: there is no folder {lacking[0]}; its shards are written by "
            f"`{commands}`; say where they are with --data-root or {ROOT_VARIABLE}"
        )

    opener = Opener(dataset, cache, skip, max_bad)
    assert dataset.train is not None, "load has filled it in"
    train, ours = opener.images(dataset.train, dataset.val)
    test, theirs = opener.images(dataset.test)

    if dataset.names_are_numbers:
        theirs = replace(theirs, names=by_number(ours, theirs))

    groups: ClassGroups | None = None
    if dataset.label_map is None and not dataset.restrict:
        matched = match(ours, theirs, dataset.same_numbers)
    else:
        matches = group(ours, theirs, dataset.label_map, dataset.restrict)
        matched, groups = matches.classes, matches.groups
        if len(matches.rows) < len(test.shards):
            test = replace(test, shards=SubsetShards(test.shards, matches.rows))

    if dataset.classes and matched.count != dataset.classes:
        raise EvalError(
            f"{train.path} has samples of {matched.count:,} classes, and dataset {dataset.name} "
            f"has {dataset.classes:,}; import it again, or correct `classes` in its descriptor"
        )

    # The files were opened for their labels; a fleet has many datasets open.
    opener.close()
    return OpenDataset(dataset, train, test, matched, groups, skip)
