"""Opened datasets: splits as rows of shards, one numbering of classes, and their identity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.evals import shards

from scaletrain.data.reading import subset
from scaletrain.data.reading.concat import shards_of
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.evals.datasets import BenchmarkDataset, SplitConfig
from scaletrain.evals.errors import EvalError
from scaletrain.evals.held_out import held_out
from scaletrain.evals.open_dataset import OpenDataset, open_dataset

NAMES = ("cat", "dog", "emu")


def folder(
    root: Path, name: str, labels: Sequence[int], names: Sequence[str] = NAMES, seed: int = 0
) -> str:
    place = shards(root / name, labels, seed)
    if names:
        (place / "classes.json").write_text(json.dumps(list(names)))
    return str(place)


def described(train: Any, test: Any, val: Any = None, **changes: Any) -> BenchmarkDataset:
    return BenchmarkDataset.model_validate(
        {"name": "toy", "train": train, "val": val, "test": test, **changes}
    )


@pytest.fixture
def toy(tmp_path: Path) -> BenchmarkDataset:
    train = folder(tmp_path, "train", [i % 3 for i in range(30)])
    return described(train, folder(tmp_path, "test", [2, 0, 1, 0], seed=1))


def rows(actual: OpenDataset, *splits: Any) -> list[list[int]]:
    return [actual.part(split).rows.tolist() for split in splits]


def test_validation_images_are_held_out(toy: BenchmarkDataset) -> None:
    actual = open_dataset(toy)
    train, val, both = (actual.part(split) for split in ("train", "val", "trainval"))
    assert val.rows.equal(held_out(30))
    assert sorted([*train.rows.tolist(), *val.rows.tolist()]) == both.rows.tolist() == [*range(30)]
    assert train.shards is val.shards is both.shards is both.selected
    assert isinstance(val.selected, SubsetShards)
    assert val.selected.rows.tolist() == val.rows.tolist()
    assert train.labels.tolist() == [n % 3 for n in train.rows.tolist()]
    assert actual.part("test").labels.tolist() == [2, 0, 1, 0]
    assert (actual.classes, actual.scored, actual.metric, actual.border) == (3, 3, "top1", 0)


def test_no_file_stays_open(toy: BenchmarkDataset) -> None:
    """A fleet has many datasets open, and a process may have a thousand files."""
    files = Path("/proc/self/fd")
    before = len([*files.iterdir()])
    actual = open_dataset(toy)
    assert len([*files.iterdir()]) == before
    assert actual.part("test").shards.read(1).image


def test_the_descriptor_says_how_many_are_held_out(toy: BenchmarkDataset) -> None:
    few = open_dataset(toy.model_copy(update={"held_out": 7}))
    each = open_dataset(toy.model_copy(update={"held_out_per_class": 4}))
    assert len(few.part("val").rows) == 7
    assert each.part("val").labels.bincount().tolist() == [4, 4, 4]
    assert len(each.part("train").rows) == 18


def test_what_cannot_be_read_belongs_to_no_split(toy: BenchmarkDataset) -> None:
    """The others are split as if they were all."""
    actual, bad = open_dataset(toy), [0, 7, 8, 9]
    good = torch.tensor([n for n in range(30) if n not in bad])
    val = actual.part("val", bad)
    assert val.rows.equal(good[held_out(26)])
    assert actual.part("trainval", bad).rows.equal(good)
    assert actual.part("train", torch.tensor(bad)).labels.tolist() == [
        n % 3 for n in good.tolist() if n not in val.rows
    ]
    assert actual.part("test", [1]).labels.tolist() == [2, 1, 0]


def test_official_validation_images_follow_the_training_images(tmp_path: Path) -> None:
    """Both folders are one list of samples, in which each class has one number."""
    train = folder(tmp_path, "train", [1, 0, 1, 0])
    val = folder(tmp_path, "val", [0, 1, 2], ("dog", "emu", "cat"), seed=1)
    test = folder(tmp_path, "test", [2, 1], seed=2)
    actual = open_dataset(described(train, test, val))
    assert rows(actual, "train", "val", "trainval") == [[0, 1, 2, 3], [4, 5, 6], [*range(7)]]
    part = actual.part("trainval")
    assert part.path == f"[{train}, {val}]"
    assert part.labels.tolist() == [0, 1, 0, 1, 0, 2, 1]  # dog, cat and emu by appearance
    assert actual.part("test").labels.tolist() == [2, 0]
    image = part.shards.read(5).image
    assert image == Shards(val).read(1).image
    assert actual.provenance()["train"] == {
        "path": part.path,
        "samples": 7,
        "sha256": part.shards.fingerprint,
    }


def test_folders_of_one_split_are_matched_by_name(tmp_path: Path) -> None:
    first = folder(tmp_path, "a", [0, 1])
    turned = folder(tmp_path, "b", [0, 1], ("emu", "cat"), seed=1)
    bare = folder(tmp_path, "c", [0, 1], (), seed=2)
    test = folder(tmp_path, "test", [0, 1, 2], seed=3)
    actual = open_dataset(described([first, turned], test))
    assert actual.part("trainval").labels.tolist() == [0, 1, 2, 0]
    assert actual.part("test").labels.tolist() == [0, 1, 2]
    with pytest.raises(EvalError, match=r"c has no classes\.json, and other folders"):
        open_dataset(described([first, bare], test))
    again = folder(tmp_path, "d", [0, 1], (), seed=4)
    with pytest.raises(EvalError, match=r"c and 1 more folders have no classes\.json"):
        open_dataset(described([bare, again], test))
    stated = open_dataset(described([bare, again], first, same_numbers=True))
    assert stated.part("trainval").labels.tolist() == [0, 1, 0, 1]


def test_a_split_by_files_of_one_folder(tmp_path: Path) -> None:
    """As of Caltech-101: what is not in the training file is for the test."""
    whole = folder(tmp_path, "all", [i % 3 for i in range(24)])
    file, chosen = tmp_path / "train.json", [0, 1, 2, 5, 9, 10, 11, 20]
    subset.save(file, Shards(whole), np.array(chosen), "by hand")
    train, test = {"shards": whole, "subset": str(file)}, {"shards": whole, "without": str(file)}
    actual = open_dataset(described(train, test, held_out_per_class=1))
    part = actual.part("trainval")
    assert part.rows.tolist() == [*range(8)]
    assert part.index.tolist() == chosen
    assert actual.part("test").index.tolist() == [n for n in range(24) if n not in chosen]
    assert actual.part("val").labels.bincount().tolist() == [1, 1, 1]
    assert actual.leaks() == []
    data = actual.provenance()
    assert (data["train"]["samples"], data["train"]["used"], data["test"]["used"]) == (24, 8, 16)
    assert data["labels"]["samples"] == 8
    assert data["labels"]["rule"] == "by hand"
    overlapping = described(train, test, {"shards": whole, "subset": str(file)})
    with pytest.raises(EvalError, match="toy: 8 images are training and validation images"):
        open_dataset(overlapping)


def test_a_label_map_chooses_the_test_images(tmp_path: Path) -> None:
    train = folder(tmp_path, "train", [0, 1, 2, 0])
    test = folder(tmp_path, "test", [0, 1, 2, 1], ("bird", "pet", "rock"), seed=1)
    meant = {"label_map": {"pet": ["cat", "dog"], "bird": "emu"}, "restrict": True}
    actual = open_dataset(described(train, test, **meant))
    part = actual.part("test")
    assert (part.index.tolist(), part.labels.tolist()) == ([0, 1, 3], [1, 0, 0])
    assert (actual.classes, actual.scored) == (3, 2)
    assert actual.best(torch.tensor([[1.0, 5.0, 3.0]])).tolist() == [[5.0, 3.0]]
    plain = open_dataset(described(train, train))
    assert plain.best(torch.tensor([[1.0, 5.0, 3.0]])).tolist() == [[1.0, 5.0, 3.0]]
    numbers = folder(tmp_path, "v2", [1, 0], ("0", "2"), seed=2)
    renumbered = open_dataset(described(train, numbers, names_are_numbers=True))
    assert renumbered.part("test").labels.tolist() == [2, 0]


def test_all_that_defines_the_samples_is_in_the_identity(tmp_path: Path) -> None:
    train = folder(tmp_path, "train", [i % 3 for i in range(30)])
    test = folder(tmp_path, "test", [0, 1, 2, 0], seed=1)
    other = folder(tmp_path, "other", [0, 1, 2, 0], seed=2)  # as many, and other images
    turned = shutil.copytree(test, tmp_path / "turned")
    (turned / "classes.json").write_text(json.dumps(NAMES[::-1]))
    files = {}
    for name, count in (("few", 20), ("fewer", 19)):
        files[name] = str(tmp_path / f"{name}.json")
        subset.save(Path(files[name]), Shards(train), np.arange(count), "by hand")
    plain = {"train": train, "test": test}
    half = {"shards": train, "subset": files["few"]}
    rest = {"shards": train, "without": files["few"]}
    less = {"shards": train, "without": files["fewer"]}
    kinds: list[dict[str, Any]] = [
        plain,
        {**plain, "train": other},
        {**plain, "train": [train, other]},
        {**plain, "train": [other, train]},
        {**plain, "train": half},
        {**plain, "train": half, "val": rest},
        {**plain, "train": {"shards": train, "subset": files["fewer"]}, "val": less},
        {**plain, "test": other},
        {**plain, "test": str(turned)},
        {"train": half, "test": rest},
        {"train": half, "test": less},
        {**plain, "same_numbers": True},
        {**plain, "metric": "per_class"},
        {**plain, "held_out": 5},
        {**plain, "held_out_per_class": 5},
        {**plain, "restrict": True},
        {**plain, "border": 1},
        {**plain, "label_map": {"cat": "cat"}},
        {**plain, "label_map": {"cat": ["cat", "dog"]}},
    ]
    actual = [json.dumps(open_dataset(described(**kind)).identity) for kind in kinds]
    assert len(set(actual)) == len(kinds)
    moved = shutil.copytree(train, tmp_path / "moved")
    elsewhere = described(str(moved), test, name="renamed", how="make")
    assert json.dumps(open_dataset(elsewhere).identity) == actual[0]


def test_test_images_that_were_seen_are_said(toy: BenchmarkDataset, tmp_path: Path) -> None:
    assert toy.train is not None
    actual = open_dataset(toy)
    train, test = Shards(toy.train.shards).fingerprint, Shards(toy.test.shards).fingerprint
    assert actual.leaks([train]) == []
    assert actual.leaks([test]) == [
        f"the encoder, or what it started from, was trained on the images of {toy.test.shards}"
    ]
    both = shards_of(f"[{toy.train.shards}, {toy.test.shards}]")
    mixed = open_dataset(described([toy.train.shards, toy.test.shards], toy.test.shards))
    assert mixed.leaks() == [
        f"4 of 4 test images of {toy.test.shards} are training images of dataset toy too"
    ]
    assert len(open_dataset(described(toy.train.shards, toy.train.shards)).leaks()) == 1
    wide = open_dataset(described(toy.train, SplitConfig(shards=mixed.part("trainval").path)))
    assert wide.leaks([both.fingerprint])[1].startswith("the encoder")
    assert wide.leaks()[0].startswith("30 of 34 test images")


def test_images_are_the_same_wherever_their_shards_are(
    toy: BenchmarkDataset, tmp_path: Path
) -> None:
    """A shard in another folder, or chosen by another pattern."""
    assert toy.train is not None
    train = toy.train.shards
    copy = shutil.copytree(train, tmp_path / "copy")
    (copy / "s-0.tar").unlink()
    (seen,) = open_dataset(described(train, str(copy))).leaks()
    assert seen.startswith("15 of 15 test images")
    (seen,) = open_dataset(described(f"{train}/s-*.tar", f"{train}/s-0.tar")).leaks()
    assert seen.startswith("15 of 15 test images")
    with pytest.raises(EvalError, match="toy: 15 images are training and validation images"):
        open_dataset(described(f"{train}/s-*.tar", toy.test.shards, f"{train}/s-1.tar"))
    halves = described(f"{train}/s-0.tar", toy.test.shards, f"{train}/s-1.tar")
    assert rows(open_dataset(halves), "train", "val") == [[*range(15)], [*range(15, 30)]]


def test_data_of_another_set_are_refused(toy: BenchmarkDataset, tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"train has samples of 3 classes, and dataset toy has 4"):
        open_dataset(toy.model_copy(update={"classes": 4}))
    missing = described(
        str(tmp_path / "none"), toy.test, how="scaletrain shards A\nscaletrain shards B\n"
    )
    with pytest.raises(
        EvalError,
        match=r"there is no folder .*none; its shards are written by `scaletrain shards A && "
        r"scaletrain shards B`; say where they are with --data-root or SCALETRAIN_DATA_ROOT",
    ):
        open_dataset(missing)
