"""Descriptors of datasets: files of configs/datasets and of the user, and folders of a command
line.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from scaletrain.config.recipe import ConfigError
from scaletrain.evals import datasets
from scaletrain.evals.errors import EvalError


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_all_shipped_descriptors_are_complete() -> None:
    """Each can be loaded, says how its shards are made, and how many classes it has."""
    for name in datasets.names():
        actual = datasets.load(name, "/data")
        assert actual.name == name
        assert actual.train is not None
        assert actual.classes
        shards = actual.how.replace("$d", actual.test.shards.rpartition("/")[2])
        for place in datasets.missing(actual):
            parent = str(Path(place).parent).removeprefix("/")
            assert place.removeprefix("/") in shards or parent in shards, (name, place)


def test_the_map_of_objectnet() -> None:
    """113 classes mean 125 different ones of ImageNet; and its images never train."""
    actual = datasets.load("objectnet", "/data")
    assert actual.label_map is not None
    meant = [name for members in actual.label_map.values() for name in members]
    assert (len(actual.label_map), len(meant), len(set(meant))) == (113, 125, 125)
    assert actual.label_map["chair"] == ("n02791124", "n03376595", "n04099969")
    assert (actual.may_train, actual.restrict, actual.border) == (False, True, 2)
    assert actual.train == datasets.load("imagenet", "/data").train


def test_the_descriptor_of_the_guide(tmp_path: Path) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "evaluation.md").read_text()
    text = guide.partition("```yaml\n")[2].partition("```")[0]
    actual = datasets.load(write(tmp_path, text), "/data")
    assert (actual.test.shards, actual.test.without) == ("/data/birds/all", "/data/birds/seen.json")


def test_paths_are_below_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "train: {shards: [a, /there/b], subset: few.json}\nval: c/val-*.tar\n"
        "test: https://host/test\nmetric: per_class\n"
    )
    file = write(tmp_path, text)
    actual = datasets.load(file, tmp_path)
    assert actual.name == "mine"
    assert actual.train == datasets.SplitConfig(
        shards=f"[{tmp_path}/a, /there/b]", subset=str(tmp_path / "few.json")
    )
    assert actual.val is not None
    assert (actual.val.shards, actual.test.shards) == (
        f"{tmp_path}/c/val-*.tar",
        "https://host/test",
    )
    monkeypatch.setenv(datasets.ROOT_VARIABLE, str(tmp_path))
    assert datasets.load(file) == actual
    monkeypatch.delenv(datasets.ROOT_VARIABLE)
    monkeypatch.chdir(tmp_path)
    assert datasets.data_root() == tmp_path / "data"


def test_a_test_set_trains_on_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train: a\nval: v\ntest: b\nclasses: 3\n", "base.yaml")
    base, file = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    write(tmp_path, f"train_from: {base}\ntest: c\nmay_train: false\n")
    actual = datasets.load(file, "/data")
    assert actual.train is not None
    assert actual.val is not None
    assert (actual.train.shards, actual.val.shards, actual.test.shards, actual.classes) == (
        "/data/a",
        "/data/v",
        "/data/c",
        3,
    )
    write(tmp_path, f"train_from: {file}\ntest: d\n", "next.yaml")
    write(tmp_path, "train_from: itself.yaml\ntest: d\n", "itself.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"itself\.yaml has no training images of its own"):
        datasets.load("itself.yaml", "/data")
    with pytest.raises(ConfigError, match=r"mine\.yaml has no training images of its own, take"):
        datasets.load(tmp_path / "next.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("test: a\n", r"needs `train`, or `train_from`"),
        ("train: a\n", r"test: Field required"),
        ("train: a\ntest: b\nmay_train: false\n", r"may_train is false: name the dataset"),
        ("train: a\ntest: b\ntrain_from: cifar10\n", r"give train or train_from, not both"),
        ("test: b\ntrain_from: cifar10\nclasses: 3\n", r"classes and held_out are those of"),
        ("train: a\nval: b\ntest: c\nheld_out: 5\n", r"nothing is held out where there is `val`"),
        ("train: a\ntest: c\nheld_out: 5\nheld_out_per_class: 1\n", r"not both"),
        ("train: {shards: a, subset: b, without: c}\ntest: c\n", r"subset or without, not both"),
        ("train: a\ntest: c\nmetrik: map\n", r"unknown key 'metrik'; did you mean 'metric'"),
        ("train: {shard: a}\ntest: c\n", r"unknown key 'train\.shard'; did you mean 'shards'"),
        ("train: a\ntest: c\nmetric: top\n", r"metric: Input should be 'top1'"),
        ("train: a\ntest: c\nlabel_map: {x: []}\n", r"label_map\.x"),
        ("train: a\ntest: c\nname: ../x\n", r"name: "),
        ("train: a\ntest: c\nsame_numbers: true\nrestrict: true\n", r"same_numbers matches"),
        ("- a\n", r"a recipe is a mapping"),
    ],
)
def test_descriptors_that_cannot_be_used(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.yaml: .*{words}"):
        datasets.load(write(tmp_path, text))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"named 'cifar'; did you mean 'cifar10'\?; available: "):
        datasets.load("cifar")


def test_folders_of_a_command_line(tmp_path: Path) -> None:
    train, val = tmp_path / "flowers" / "train", tmp_path / "flowers" / "val"
    for folder in (train, val):
        folder.mkdir(parents=True)
    actual = datasets.given(train, labels=tmp_path / "few.json", same_numbers=True)
    assert (actual.name, actual.test.shards) == ("flowers", str(val))
    assert actual.train == datasets.SplitConfig(
        shards=str(train), subset=str(tmp_path / "few.json")
    )
    assert actual.same_numbers
    names = {
        "/x/my photos/train-*.tar": "my_photos",
        "/data/pets": "pets",
        "/train": "data",
        "https://host/a.b/train": "a_b",
    }
    assert {path: datasets.given(path, "/t").name for path in names} == names


def test_folders_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"RUN: its data\.path 'synthetic' has no labels"):
        datasets.given("synthetic", source="RUN")
    with pytest.raises(EvalError, match=r"neither .*/test nor .*/val is a folder; give one with"):
        datasets.given(tmp_path / "train")
    with pytest.raises(EvalError, match=r"https://host/train is remote; give its labelled"):
        datasets.given("https://host/train")


def test_a_label_subset_of_a_descriptor(tmp_path: Path) -> None:
    actual = datasets.load("cifar10", "/data").labelled(tmp_path / "few.json")
    assert actual.train is not None
    assert actual.train.subset == str(tmp_path / "few.json")
    with pytest.raises(EvalError, match=r"of dataset caltech101 are a subset already"):
        datasets.load("caltech101").labelled(tmp_path / "few.json")
