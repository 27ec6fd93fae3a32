"""One numbering of the classes for training and test set, matched by name where classes have names.

Classes are numbered by first appearance in the training set. So numbers are dense whatever the
labels are, and no metric depends on how a dataset numbers its classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scaletrain.data.format import selection
from scaletrain.data.format.names import CLASSES
from scaletrain.data.reading.concat import classes as read_classes
from scaletrain.data.sampling.plan import Ints
from scaletrain.evals.errors import EvalError

# Classes that an error lists.
_SHOWN = 5


@dataclass(frozen=True)
class LabelledSet:
    """A labelled training or test set.

    path: its folder or address. source: the file or folder that the labels [N] come from. sha256:
    of its shards. names: of the classes by label; None where they have none, or where numbers are
    to count. unlabelled: a sentence on samples without a label, if any.
    """

    path: str
    source: str
    labels: Ints
    sha256: str
    names: Sequence[str] | None = None
    unlabelled: str = ""


@dataclass(frozen=True)
class Classes:
    """Labels of the training set [N] and of the test set [Q], both in 0 .. count - 1."""

    train: Tensor
    test: Tensor
    count: int
    # The label of each class in the files of the training set.
    numbers: Tensor  # [count] int64
    # How the two sets were matched, for people.
    matched: str
    # Of the names that were matched.
    sha256: str | None


def match(train: LabelledSet, test: LabelledSet, same_numbers: bool = False) -> Classes:
    """Number the classes of both sets alike. same_numbers: the user asserts that their labels are
    so already.

    Raises EvalError, naming folder and classes, where samples have no label, where the meaning of
    labels is unknown, and where the test set has a class that the training set lacks.
    """
    for part in (train, test):
        labelled(part)

    ours, theirs = (None, None) if same_numbers else (train.names, test.names)
    labels, matched, sha256 = test.labels, "by number", None
    if same_numbers:
        matched = "by number, as --same-numbers says"
    elif ours is not None and theirs is not None:
        labels = _renamed(train, test, ours, theirs)
        matched = (
            "by name"
            if np.array_equal(labels, test.labels)
            else "by name: the test set numbers them differently"
        )
        sha256 = names_digest(ours, theirs)
    elif (ours is None) != (theirs is None) and train.sha256 != test.sha256:
        has, bare = (train, test) if theirs is None else (test, train)
        raise EvalError(
            f"{has.path} has a {CLASSES} and {bare.path} has none, so it is unknown whether "
            "label 0 means the same class in "
            "both; import both alike, or say --same-numbers if you know that they number their "
            "classes alike"
        )

    numbering = Numbering(train.labels)
    if len(strange := np.setdiff1d(labels, numbering.known)):
        raise EvalError(
            f"{test.path} has classes of which {train.source} has no sample: "
            f"{listed(_called(strange, ours))}; "
            "give the right sets with --train, --test and --labels"
        )

    ours_dense, theirs_dense = (
        torch.from_numpy(numbering.dense(part)) for part in (train.labels, labels)
    )
    count = len(numbering.known)
    return Classes(ours_dense, theirs_dense, count, numbering.numbers, matched, sha256)


class Numbering:
    """The classes of labels [N], numbered 0, 1, ... by first appearance.

    known: the labels that occur, ascending. numbers [C]: the label of each class.
    """

    def __init__(self, labels: Ints) -> None:
        self.known, first = np.unique(labels, return_index=True)
        order = first.argsort()
        self._place = np.empty(len(order), np.int64)
        self._place[order] = np.arange(len(order))
        self.numbers = torch.from_numpy(self.known[order])

    def dense(self, labels: Ints) -> Ints:
        """The classes of labels, all of which are known."""
        return self._place[self.known.searchsorted(labels)]


def names_digest(ours: Sequence[str], theirs: Sequence[str]) -> str:
    """sha256 of the names of both sets."""
    return hashlib.sha256(json.dumps([list(ours), list(theirs)]).encode()).hexdigest()


def read_names(folder: selection.Paths) -> list[str] | None:
    """The class names of a dataset in order of label; None without classes.json. Raises EvalError
    or DataError.
    """
    raw = read_classes(folder)
    if raw is None:
        return None

    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError):
        found = None

    if not isinstance(found, list) or not found or not all(isinstance(name, str) for name in found):
        raise EvalError(
            f"{selection.one_folder(folder).folder}/{CLASSES} is not a list of the classes' names, "
            "as the importers write it; restore it, or say --same-numbers if both sets number "
            "their classes alike"
        )

    return found


def labelled(part: LabelledSet) -> None:
    """Raise EvalError unless every sample has one label."""
    if bare := int((part.labels < 0).sum()):
        text = (
            part.unlabelled or f"{bare:,} of {len(part.labels):,} samples have no label, or several"
        )
        raise EvalError(
            f"{part.source}: {text}; evaluation needs one for each sample. Of a training set, "
            "--labels FILE takes the "
            "labelled samples only, which scaletrain shards subset writes"
        )


def named(part: LabelledSet, names: Sequence[str]) -> None:
    """Raise EvalError for a label without a name."""
    if (top := int(part.labels.max())) >= len(names):
        raise EvalError(
            f"{part.source}: label {top} has no name in {part.path}/{CLASSES}, which lists "
            f"{len(names):,}"
        )


def _renamed(
    train: LabelledSet, test: LabelledSet, ours: Sequence[str], theirs: Sequence[str]
) -> Ints:
    """The labels of the test set in the numbering of the training set, matched by name."""
    for part, names in ((train, ours), (test, theirs)):
        named(part, names)

    if list(ours) == list(theirs):
        return test.labels

    for part, names in ((train, ours), (test, theirs)):
        if len(set(names)) < len(names):
            raise EvalError(
                f"{part.path}/{CLASSES} names a class twice, so {train.path} and {test.path} "
                "cannot be matched by name"
            )

    place = {name: number for number, name in enumerate(ours)}
    used = np.unique(test.labels)
    if lacking := [theirs[label] for label in used if theirs[label] not in place]:
        raise EvalError(
            f"{test.path} has classes that {train.path}/{CLASSES} does not name: "
            f"{listed(lacking)}; "
            "give the right sets with --train and --test, or say --same-numbers if only the "
            "spelling differs"
        )

    numbers = np.array([place[theirs[label]] for label in used], np.int64)
    return numbers[used.searchsorted(test.labels)]


def _called(labels: Ints, listed: Sequence[str] | None) -> list[str]:
    return [str(label) if listed is None else listed[label] for label in labels.tolist()]


def listed(called: Sequence[str]) -> str:
    """The first of some classes, for messages."""
    more = f" and {len(called) - _SHOWN:,} more" if len(called) > _SHOWN else ""
    return ", ".join(repr(name) for name in called[:_SHOWN]) + more
