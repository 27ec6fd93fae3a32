"""Data sets of torchvision: files are taken as they are, arrays become PNG, and nothing is fetched
unasked.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from kit.data import encode, picture
from kit.importing import contents, run, tree
from PIL import Image
from torchvision import datasets

from scaletrain.data.transforms import image
from scaletrain.importers import from_torchvision


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"dog": 3, "cat": 2}, ".jpg")
    said = run("from-torchvision", "ImageFolder", source, tmp_path / "out", "--workers", 3)
    assert "5 images in 2 classes" in said
    wanted = {
        path.read_bytes(): label
        for label, name in enumerate(("cat", "dog"))
        for path in (source / name).iterdir()
    }
    assert contents(tmp_path / "out") == wanted
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["cat", "dog"]
    assert Image.open.__module__ == "PIL.Image"  # as it was before


def test_files_that_shards_do_not_hold_become_png(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    Image.fromarray(picture(3)).save(tmp_path / "src" / "a" / "x.ppm")
    run("from-torchvision", "ImageFolder", tmp_path / "src", tmp_path / "out")
    data = next(iter(contents(tmp_path / "out")))
    assert image.kind(data) == "png"
    assert np.array_equal(image.decode(data, 10**6), picture(3))


def test_arrays_with_splits(tmp_path: Path) -> None:
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        pixels[prefix] = np.random.default_rng(n).integers(0, 256, (n, 28, 28), np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 2051, n, 28, 28) + pixels[prefix].tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, n) + bytes(i % 10 for i in range(n))
        )
    run("from-torchvision", "FashionMNIST", tmp_path / "root", tmp_path / "out")
    for split, prefix in (("train", "train"), ("test", "t10k")):
        found = {
            image.decode(d, 10**6)[..., 0].tobytes(): y
            for d, y in contents(tmp_path / "out" / split).items()
        }
        assert found == {p.tobytes(): i % 10 for i, p in enumerate(pixels[prefix])}
    run("from-torchvision", "FashionMNIST", tmp_path / "root", tmp_path / "one", "--split", "test")
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["test"]
    run(
        "from-torchvision",
        "FashionMNIST",
        tmp_path / "root",
        tmp_path / "two",
        "--split",
        "val",
        fails="are train and test",
    )


def test_named_splits_and_options(tmp_path: Path) -> None:
    """DTD keeps its files and split lists in folders, and takes `split` and `partition`."""
    data = tmp_path / "root" / "dtd" / "dtd"
    for kind in ("images", "labels"):
        (data / kind).mkdir(parents=True)
    for number, name in enumerate(("banded", "dotted", "woven")):
        (data / "images" / name).mkdir()
        (data / "images" / name / "a.jpg").write_bytes(encode(picture(number), ".jpg"))
    for split, names in (("train3", ("banded", "dotted")), ("val3", ("woven", "dotted"))):
        (data / "labels" / f"{split}.txt").write_text("\n".join(f"{name}/a.jpg" for name in names))
    run(
        "from-torchvision",
        "DTD",
        tmp_path / "root",
        tmp_path / "out",
        *("--split", "train", "--split", "val", "--option", "partition=3"),
    )
    assert contents(tmp_path / "out" / "train") == {encode(picture(i), ".jpg"): i for i in range(2)}
    run(
        "from-torchvision",
        "DTD",
        tmp_path / "root",
        tmp_path / "x",
        "--split",
        "dev",
        fails="Unknown value 'dev' for argument split",
    )
    run(
        "from-torchvision",
        "DTD",
        tmp_path / "root",
        tmp_path / "x",
        "--option",
        "speed=3",
        fails="DTD has no option 'speed', only",
    )
    run(
        "from-torchvision",
        "DTD",
        tmp_path / "root",
        tmp_path / "x",
        "--option",
        "speed",
        fails="write NAME=VALUE",
    )


def test_faults_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        "from-torchvision",
        "Imagenet1k",
        tmp_path,
        out,
        fails="torchvision.datasets has no data set 'Imagenet1k'",
    )
    run("from-torchvision", "DatasetFolder.x", tmp_path, out, fails="has no data set")
    run(
        "from-torchvision",
        "CIFAR10",
        tmp_path,
        out,
        fails="torchvision unpickles CIFAR10: take `scaletrain shards cifar10`",
    )
    run("from-torchvision", "Food101", tmp_path, out, fails="fetch it with --download")
    run(
        "from-torchvision",
        "ImageFolder",
        tmp_path,
        out,
        "--download",
        fails="torchvision cannot download ImageFolder",
    )
    run(
        "from-torchvision",
        "ImageFolder",
        tree(tmp_path / "a", {"a": 1}),
        out,
        "--split",
        "train",
        fails="ImageFolder has no splits",
    )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("target", [(1, 2), "dog", np.zeros(40), None, Image.new("L", (2, 2))])
def test_other_tasks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: object
) -> None:
    class Odd(datasets.VisionDataset):
        def __init__(self, root: str) -> None:
            super().__init__(root)

        def __len__(self) -> int:
            return 3

        def __getitem__(self, number: int) -> tuple[Image.Image, object]:
            return Image.new("RGB", (8, 8)), target

    monkeypatch.setattr(datasets, "Odd", Odd, raising=False)
    run("from-torchvision", "Odd", tmp_path, tmp_path / "out", fails="is no single label")


@pytest.mark.parametrize("labels", [[-1, -1, -1, -1], [1, -1, 0, -1]])
def test_a_target_of_minus_one_is_no_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int]
) -> None:
    class Partly(datasets.VisionDataset):
        """As STL10, whose splits are `unlabeled` and `train+unlabeled`."""

        classes = ("cat", "dog")

        def __init__(self, root: str, split: str) -> None:
            super().__init__(root)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, number: int) -> tuple[Image.Image, object]:
            return Image.fromarray(picture(number)), np.asarray(labels)[number]

    monkeypatch.setattr(datasets, "Partly", Partly, raising=False)
    said = run("from-torchvision", "Partly", tmp_path, tmp_path / "out", "--split", "unlabeled")
    unlabelled = (
        "without labels, 1 shard"
        if max(labels) < 0
        else "in 2 classes, 1 shard; without a label: 2"
    )
    assert f"4 images {unlabelled}" in said
    wanted = {picture(n).tobytes(): label for n, label in enumerate(labels)}
    assert {
        image.decode(d, 10**6).tobytes(): y
        for d, y in contents(tmp_path / "out" / "unlabeled").items()
    } == wanted
    assert json.loads((tmp_path / "out" / "unlabeled" / "classes.json").read_text()) == [
        "cat",
        "dog",
    ]


def test_damaged_files_are_bad_images(tmp_path: Path) -> None:
    source = tree(tmp_path / "src", {"a": 3, "b": 3}, ".jpg")
    (source / "b" / "im.1.jpg").write_bytes((source / "b" / "im.1.jpg").read_bytes()[:200])
    run(
        "from-torchvision",
        "ImageFolder",
        source,
        tmp_path / "out",
        fails="ImageFolder, sample 4: the image is damaged",
    )
    run("from-torchvision", "ImageFolder", source, tmp_path / "out", "--max-bad", 1)
    assert len(contents(tmp_path / "out")) == 5


def test_every_data_set_that_downloads_is_known() -> None:
    """The ones named in the help are there, under these names."""
    for name in ("Food101", "DTD", "STL10"):
        assert from_torchvision._class(name) is getattr(datasets, name)
