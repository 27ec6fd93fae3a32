"""Test sets whose classes are some of the training set's, or groups of them, such as ImageNet-R and
ObjectNet.

A classifier of the training set's C classes gives scores [Q, C]. A class of the test set that means
several of them gets the best of their scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scaletrain.data.format.names import CLASSES
from scaletrain.data.sampling.plan import Ints
from scaletrain.evals.classes import (
    Classes,
    LabelledSet,
    Numbering,
    labelled,
    listed,
    named,
    names_digest,
)
from scaletrain.evals.errors import EvalError

# Class names of a test set, each with the names of the training set's classes that it means.
LabelMap = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ClassGroups:
    """Which of the training set's classes make which class of the test set.

    group [C] int64: the group of each training class, -1 where it does not count. count: of the
    groups; the first ones are the test set's classes.
    """

    group: Tensor
    count: int

    def best(self, scores: Tensor) -> Tensor:
        """[Q, C] -> [Q, count]: the highest score within each group."""
        group = self.group.to(scores.device)
        used = (group >= 0).nonzero().flatten()
        places = group[used].expand(len(scores), -1)
        empty = scores.new_zeros(len(scores), self.count)

        return empty.scatter_reduce(1, places, scores[:, used], "amax", include_self=False)


@dataclass(frozen=True)
class Grouped:
    """The classes of both sets under a label map, with the labels [K] of the test samples `rows`
    [K] whose class it contains.
    """

    classes: Classes
    rows: Ints
    groups: ClassGroups


def group(
    train: LabelledSet, test: LabelledSet, label_map: LabelMap | None, restrict: bool
) -> Grouped:
    """Number the classes of a test set by a label map, or by its own names where that is None.

    restrict: training classes that the map does not contain cannot be predicted; otherwise each of
    them is a wrong answer. Raises EvalError for a name that a set does not have, and for a training
    class that two classes contain or that has no sample.
    """
    for part in (train, test):
        labelled(part)

    ours, theirs = train.names, test.names
    if ours is None or theirs is None:
        bare = test if theirs is None else train
        raise EvalError(
            f"{bare.path} has no {CLASSES}, and a label map or restrict is about the names of "
            "classes; import it with an importer that writes them"
        )

    named(train, ours)
    named(test, theirs)
    chosen = {name: (name,) for name in theirs} if label_map is None else label_map
    if unknown := [name for name in chosen if name not in theirs]:
        raise EvalError(
            f"the label map has classes that {test.path}/{CLASSES} does not name: {listed(unknown)}"
        )

    numbering = Numbering(train.labels)
    groups = np.full(len(numbering.known), -1)
    for number, (name, members) in enumerate(chosen.items()):
        for member in members:
            groups[_class_of(member, name, train, ours, numbering, groups)] = number

    count = len(chosen)
    if not restrict:
        others = np.flatnonzero(groups < 0)
        groups[others] = count + np.arange(len(others))
        count += len(others)

    place = {name: number for number, name in enumerate(chosen)}
    by_label = np.array([place.get(name, -1) for name in theirs])
    rows = np.flatnonzero(by_label[test.labels] >= 0)
    if not len(rows):
        raise EvalError(f"{test.path} has no sample of a class of the label map")

    classes = Classes(
        torch.from_numpy(numbering.dense(train.labels)),
        torch.from_numpy(by_label[test.labels[rows]]),
        len(numbering.known),
        numbering.numbers,
        f"by name, {len(chosen):,} classes of the test set"
        + (" and no other can be predicted" if restrict else ""),
        names_digest(ours, theirs),
    )
    return Grouped(classes, rows, ClassGroups(torch.from_numpy(groups), count))


def by_number(train: LabelledSet, test: LabelledSet) -> list[str]:
    """The names of the test set's classes where its own are numbers of the training set's, such as
    ImageNet-V2's folders 0 to 999. Raises EvalError.
    """
    ours, theirs = train.names, test.names
    if ours is None or theirs is None:
        bare = test if theirs is None else train
        raise EvalError(f"{bare.path} has no {CLASSES}, which names its classes; import it again")

    for name in theirs:
        if not (name.isascii() and name.isdecimal() and int(name) < len(ours)):
            raise EvalError(
                f"{test.path}/{CLASSES}: '{name}' is no number of the {len(ours):,} classes of "
                f"{train.path}"
            )

    return [ours[int(name)] for name in theirs]


def _class_of(
    member: str,
    name: str,
    train: LabelledSet,
    ours: Sequence[str],
    numbering: Numbering,
    groups: Ints,
) -> int:
    """The number of a training class that has no group so far."""
    labels = [label for label, known in enumerate(ours) if known == member]
    if len(labels) != 1:
        what = "names twice" if labels else "does not name"
        raise EvalError(
            f"the label map gives class '{member}' to '{name}', which {train.path}/{CLASSES} {what}"
        )

    if labels[0] not in numbering.known:
        raise EvalError(
            f"the label map gives class '{member}' to '{name}', and {train.source} has no sample "
            "of it"
        )

    (number,) = numbering.dense(np.array(labels)).tolist()
    if groups[number] >= 0:
        raise EvalError(f"the label map gives class '{member}' to two classes, '{name}' is one")

    return int(number)
