"""Descriptors of datasets for evaluation: which shards are the training, validation and test
images, and what is measured on them.

Descriptors are YAML files, by path or by the name of a file in configs/datasets. Their shards are
below a data root. `given` describes the folders of a command line in the same way. Nothing is
opened here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from scaletrain.config import recipe
from scaletrain.config.recipe import ConfigError, brief, nearest
from scaletrain.config.schema import Frozen, Natural, absolute
from scaletrain.config.validation import explain
from scaletrain.data.format import selection
from scaletrain.data.format.names import is_remote
from scaletrain.evals import folders
from scaletrain.evals.errors import EvalError

ROOT_VARIABLE = "SCALETRAIN_DATA_ROOT"
# Where shards are looked for, unless the variable or an option says otherwise.
ROOT = "data"
FOLDER = "datasets/"
Metric = Literal["top1", "per_class", "map11", "map"]


class SplitConfig(Frozen):
    """The samples of a split. A single path or a list of them is short for `shards`."""

    shards: Annotated[str, BeforeValidator(recipe.shards), Field(min_length=1)]
    """Folder, pattern or address, or a list of them; relative to the data root."""

    subset: str = ""
    """File of `scaletrain shards subset` with the samples to take; relative to the data root."""

    without: str = ""
    """Such a file with samples to leave out, all others being taken."""

    @model_validator(mode="after")
    def _one(self) -> SplitConfig:
        if self.subset and self.without:
            raise ValueError("give subset or without, not both")
        return self

    def below(self, root: Path) -> SplitConfig:
        """The same split with absolute paths."""
        paths = [_below(path, root) for path in recipe.listed(self.shards)]
        files = {
            key: _below(path, root)
            for key, path in (("subset", self.subset), ("without", self.without))
            if path
        }
        return SplitConfig(shards=paths[0] if len(paths) == 1 else recipe.shards(paths), **files)

    @property
    def file(self) -> str:
        """The file of a subset, if any."""
        return self.subset or self.without


def _split(value: Any) -> Any:
    return {"shards": value} if isinstance(value, str | list) else value


def _names(value: Any) -> Any:
    """`bench: n03891251` in a label map is short for `bench: [n03891251]`."""
    if not isinstance(value, Mapping):
        return value
    return {
        name: [members] if isinstance(members, str) else members for name, members in value.items()
    }


Split = Annotated[SplitConfig, BeforeValidator(_split)]
ClassName = Annotated[str, Field(min_length=1)]


class BenchmarkDataset(Frozen):
    """A dataset for evaluation."""

    name: Annotated[str, Field(pattern=r"^\w+$", max_length=64)]
    """Name in results and tables."""

    train: Split | None = None
    """Training images."""

    val: Split | None = None
    """Official validation images; by default some training images are held out."""

    test: Split
    """Test images, which are scored once."""

    train_from: str = ""
    """Name of the dataset whose training and validation images serve for this one, a set of test
    images.
    """

    may_train: bool = True
    """Whether the licence or protocol of the test images allows to train on images of this set."""

    metric: Metric = "top1"
    """The main metric: accuracy, mean accuracy per class, 11-point or full average precision."""

    classes: Natural = 0
    """Number of classes of the training images, which is checked; 0: any."""

    held_out: Natural = 0
    """Number of training images that are held out where there is no `val`; 0: a tenth, at most
    10,009.
    """

    held_out_per_class: Natural = 0
    """Number of images of each class that are held out instead."""

    label_map: (
        Annotated[
            dict[ClassName, Annotated[tuple[ClassName, ...], Field(min_length=1)]],
            BeforeValidator(_names),
            Field(min_length=1),
        ]
        | None
    ) = None
    """Names of test classes, each with one or several names of training classes that it means. Test
    images of other classes are left out; a class that means several has the best of their scores.
    """

    restrict: bool = False
    """Only the classes of the test set can be predicted, as for ImageNet-R; otherwise all classes
    of the training set.
    """

    names_are_numbers: bool = False
    """The names of the test set's classes are numbers of the training set's, counted from 0, as the
    folders of ImageNet-V2.
    """

    border: Natural = 0
    """Pixels cut from each side of a test image before anything else."""

    same_numbers: bool = False
    """Both sets number their classes alike, whatever their classes.json say."""

    how: str = ""
    """Commands that write the shards, a line each, for the error where they are missing."""

    @model_validator(mode="after")
    def _fitting(self) -> BenchmarkDataset:
        if self.train is None and not self.train_from:
            raise ValueError("needs `train`, or `train_from` for a set of test images alone")
        if self.val is not None and self.train is None:
            raise ValueError("val: the training images come from another set, and so must these")
        if not self.may_train and not self.train_from:
            raise ValueError("may_train is false: name the dataset to train on with `train_from`")
        if self.held_out and self.held_out_per_class:
            raise ValueError("give held_out or held_out_per_class, not both")
        if self.val is not None and (self.held_out or self.held_out_per_class):
            raise ValueError("held_out: nothing is held out where there is `val`")
        if self.same_numbers and (self.label_map or self.restrict or self.names_are_numbers):
            raise ValueError(
                "same_numbers matches classes by number; label_map, restrict and "
                "names_are_numbers by name"
            )
        if self.label_map is not None and self.names_are_numbers:
            raise ValueError("give label_map or names_are_numbers, not both")
        return self

    def labelled(self, subset: Path) -> BenchmarkDataset:
        """The same dataset with the samples of a label subset as its training images."""
        assert self.train is not None, "load has filled it in"
        if self.train.subset or self.train.without:
            raise EvalError(
                f"--labels {subset}: the training images of dataset {self.name} are a subset "
                "already; write a descriptor of your own"
            )
        train = SplitConfig(shards=self.train.shards, subset=str(subset.absolute()))
        return self.model_copy(update={"train": train})


def names() -> list[str]:
    """Names of the descriptors in configs/datasets."""
    return [key.removeprefix(FOLDER) for key in recipe.shipped() if key.startswith(FOLDER)]


def data_root(root: str | Path | None = None) -> Path:
    """The folder that shards are relative to: `root`, else $SCALETRAIN_DATA_ROOT, else `data`."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or ROOT).expanduser().absolute()


def load(name: str | Path, root: str | Path | None = None) -> BenchmarkDataset:
    """The descriptor of this name or file, with absolute paths below the data root and the training
    images of `train_from` filled in. Raises ConfigError.
    """
    own = _read(name)
    place = data_root(root)
    splits = {
        key: split.below(place)
        for key in ("train", "val", "test")
        if (split := getattr(own, key)) is not None
    }
    if not own.train_from:
        return own.model_copy(update=splits)

    if own.train is not None:
        raise ConfigError(f"{name}: give train or train_from, not both")

    other = load_source(own.train_from, name, root)
    taken = ("train", "val", "classes", "held_out", "held_out_per_class")
    if own.classes or own.held_out or own.held_out_per_class:
        raise ConfigError(f"{name}: classes and held_out are those of {own.train_from}; leave out")

    how = f"{other.how.strip()}\n{own.how}".strip()
    return own.model_copy(
        update={**splits, **{key: getattr(other, key) for key in taken}, "how": how}
    )


def load_source(source: str, name: str | Path, root: str | Path | None) -> BenchmarkDataset:
    """The dataset that another one trains on. Raises ConfigError."""
    # read first: it may name itself
    if further := _read(source).train_from:
        raise ConfigError(
            f"{name}: train_from: {source} has no training images of its own, take '{further}'"
        )
    return load(source, root)


def missing(dataset: BenchmarkDataset) -> list[str]:
    """The local folders of its shards that are not there."""
    splits = [split for split in (dataset.train, dataset.val, dataset.test) if split is not None]
    places = (place.folder for split in splits for place in selection.by_folder(split.shards))
    return [
        folder
        for folder in dict.fromkeys(places)
        if not is_remote(folder) and not Path(folder).is_dir()
    ]


def given(
    train: str | Path,
    test: str | Path | None = None,
    *,
    labels: Path | None = None,
    same_numbers: bool = False,
    source: object = "",
) -> BenchmarkDataset:
    """The dataset of --train, --test, --labels and --same-numbers. Without `test`, the test images
    are the folder `test` or `val` next to the training shards.

    train: shards, "" or "synthetic" where there are none. source: the encoder's, for messages.
    Raises EvalError.
    """
    place = absolute(str(train))
    if place in ("", "synthetic"):
        raise EvalError(
            f"{source}: its data.path '{place}' has no labels to evaluate with; give "
            "--dataset, or --train and --test"
        )

    return BenchmarkDataset(
        name=_name(place),
        train=SplitConfig(shards=place, subset="" if labels is None else str(labels.absolute())),
        test=SplitConfig(shards=_next_to(place) if test is None else absolute(str(test))),
        same_numbers=same_numbers,
    )


def _next_to(train: str) -> str:
    if is_remote(train):
        raise EvalError(
            f"no test set: {train} is remote; give its labelled test shards with --test"
        )

    siblings = folders.next_to(train)
    for folder in siblings:
        if folder.is_dir():
            return str(folder)

    raise EvalError(
        f"no test set: neither {siblings[0]} nor {siblings[1]} is a folder; give one with --test"
    )


def _name(train: str) -> str:
    """A name for results, from the first folder: `data/cifar10/train` -> `cifar10`."""
    parts = [part for part in re.split(r"[/\\]", selection.by_folder(train)[0].folder) if part]
    words = [part for part in parts if part.lower().encode() not in selection.SPLITS]
    return re.sub(r"\W+", "_", words[-1] if words else "data")[-64:]


def _below(path: str, root: Path) -> str:
    return path if is_remote(path) else str(root / Path(path).expanduser())


def _read(name: str | Path) -> BenchmarkDataset:
    path = _find(name)
    raw = recipe.read(path)
    try:
        return BenchmarkDataset.model_validate({"name": path.stem, **raw})
    except ValidationError as error:
        hint = explain(error, lambda loc: _hint(loc), "")
        raise ConfigError(f"{path}: {hint}") from None


def _hint(loc: tuple[int | str, ...]) -> str:
    model = SplitConfig if len(loc) > 1 and loc[0] in ("train", "val", "test") else BenchmarkDataset
    return nearest(str(loc[-1]), model.model_fields)


def _find(name: str | Path) -> Path:
    """The file of a descriptor. A file at the path wins. Raises ConfigError for an unknown name."""
    path = Path(name)
    short = str(name).removesuffix(".yaml").removeprefix(FOLDER)
    if path.is_file() or path.suffix:
        return path
    if (shipped := recipe.shipped().get(FOLDER + short)) is not None:
        return shipped

    raise ConfigError(
        f"there is neither a file nor a dataset named '{brief(str(name))}'"
        f"{nearest(short, names())}; available: {', '.join(names())}"
    )
