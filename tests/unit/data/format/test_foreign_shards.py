"""Archives that others wrote, img2dataset's for one: indexed once, beside them or in the user's
cache, and trained on.
"""

from __future__ import annotations

import json
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import add, encode, picture

from scaletrain.config.schema import DataConfig, View
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import index, offsets
from scaletrain.data.format.verify import verify
from scaletrain.data.loading.loader import open_stream
from scaletrain.data.reading.reader import Shards

SUFFIXES = ("jpg", "webp", "png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As img2dataset leaves it: KEY.jpg, KEY.json, KEY.txt, and tables and statistics beside the
    shards.
    """
    made = tmp_path / "laion"
    made.mkdir()
    for shard in range(3):
        with tarfile.open(made / f"{shard:05d}.tar", "w") as tar:
            for n in range(5):
                key = f"{shard:05d}{n:04d}"
                record = {
                    "url": "http://a.b/ö.jpg",
                    "caption": "a cat",
                    "key": key,
                    "status": "success",
                    "exif": "{}",
                }
                add(
                    tar,
                    f"{key}.{SUFFIXES[shard]}",
                    encode(picture(5 * shard + n), f".{SUFFIXES[shard]}"),
                )
                add(tar, f"{key}.json", json.dumps(record).encode())
                add(tar, f"{key}.txt", "a cat ö".encode())
                add(tar, f"{key}.npy", b"\x93NUMPY\1\0")
                add(tar, f"{key}.seg.png", b"not for us")
        (made / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (made / f"{shard:05d}_stats.json").write_text("{}")
    return made


def train_on(folder: Path) -> list[int]:
    data = DataConfig(path=str(folder), lanes=5, workers=2, views=(View(size=8),))
    stream = open_stream(data, seed=0, batch=5, rank=0, world=1, device=torch.device("cpu"))
    return sorted(int(i) for b in stream.batches(0, 3) for i in b.index)


def test_img2dataset_shards_train_after_one_pass(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_on(folder) == list(range(15))
    assert (
        f"{folder} has no index yet: reading every shard once to make it in {folder}"
        in capsys.readouterr().out
    )
    assert train_on(folder) == list(range(15))
    assert "no index" not in capsys.readouterr().out
    shards = Shards(folder)
    assert shards.read(2).image == encode(picture(2), ".jpg")
    assert [shards.read(i).label for i in range(15)] == [-1] * 15
    assert verify(folder, 10**6).faults == []


def test_what_is_no_sample_is_passed_over(tmp_path: Path) -> None:
    """As webdataset does: no dot, hidden files of macOS, `__meta__`."""
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "README", b"about")
        add(tar, "__meta__.json", b"[]")
        add(tar, "x/._a.jpg", b"Mac OS X")
        add(tar, "x/a.jpg", encode(picture(1), ".jpg"))
        add(tar, "x/a.cls", b"4")
    assert len(offsets.scan(tmp_path / "s.tar")[0]) == 1


def test_images_of_other_images_samples_are_named_and_counted(folder: Path, tmp_path: Path) -> None:
    """The samples stay those of WebDataset's rule, as they were before: `cat.v2.jpg` may as well be
    a map of `cat.jpg`.
    """
    (tmp_path / "d").mkdir()
    with tarfile.open(tmp_path / "d" / "s.tar", "w") as tar:
        for n, name in enumerate(
            (
                "cat.jpg",
                "cat.v2.jpg",
                "cat.v2.cls",
                "dog.jpg",
                "dog.v2.png",
                "dog.cls",
                "dog.mask.png",
            )
        ):
            add(tar, name, b"3" if name.endswith("cls") else encode(picture(n), Path(name).suffix))
    said: list[str] = []
    shards = Shards(tmp_path / "d", said.append)
    assert [shards.name(i) for i in range(len(shards))] == ["s.tar/cat", "s.tar/dog"]
    assert [shards.read(i).label for i in range(2)] == [-1, 3]
    assert "2 images are not used, since by WebDataset's rule" in said[-1]
    assert "such as s.tar/cat.v2.jpg" in said[-1]
    found = verify(tmp_path / "d", 10**6)
    assert (found.unused, found.first_unused, found.faults) == (2, "s.tar/cat.v2.jpg", [])


def by_the_first_dot(members: list[tuple[str, int]]) -> list[tuple[str, int, int, int]] | None:
    """(key, place of the image, of the mask, of the label) of each sample, by WebDataset's rule
    alone; None for a fault.
    """
    samples: dict[str, dict[str, int]] = {}
    last = ""
    for name, place in members:
        folder, slash, end = name.rpartition("/")
        stem, _, extension = end.partition(".")
        key = folder + slash + stem
        if not stem or not extension:
            continue
        kinds = samples.setdefault(key, {})
        image = extension in SUFFIXES and any(kind in SUFFIXES for kind in kinds)
        if (kinds and key != last) or extension in kinds or image:
            return None
        kinds[extension], last = place, key
    if not all(any(kind in SUFFIXES for kind in kinds) for kinds in samples.values()):
        return None
    places = [(next(kinds[s] for s in SUFFIXES if s in kinds), kinds) for kinds in samples.values()]
    return [
        (key, image, kinds.get("mask.png", 0), kinds.get("cls", kinds.get("json", 0)))
        for key, (image, kinds) in zip(samples, places, strict=True)
    ]


def test_what_was_indexed_before_is_indexed_alike(tmp_path: Path) -> None:
    """Whatever members a tar has: where WebDataset's rule gives every sample an image, it decides
    alone.
    """
    draw, compared = random.Random(5), 0
    extensions = (
        "jpg",
        "png",
        "webp",
        "cls",
        "json",
        "txt",
        "npy",
        "mask.png",
        "seg.png",
        "v2.jpg",
        "v2.cls",
        "v2.mask.png",
        "a.b.png",
    )
    for _ in range(600):
        names = []
        for key in draw.sample(["a", "b", "x/a", "x.y/b", "0001", "-"], draw.randrange(1, 5)):
            kinds = draw.sample(extensions, draw.randrange(1, 6))
            if draw.random() < 0.9:
                kinds = [draw.choice(SUFFIXES), *(kind for kind in kinds if kind not in SUFFIXES)]
            names += draw.sample([f"{key}.{kind}" for kind in kinds], len(kinds))
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            for name in names:
                add(tar, name, b"1")
        with tarfile.open(tmp_path / "s.tar") as tar:
            members = [(member.name, member.offset_data) for member in tar.getmembers()]
        if (wanted := by_the_first_dot(members)) is None:
            continue
        rows = offsets.scan(tmp_path / "s.tar")[0]
        assert [(row["key"], row["image"], row["mask"], row["target"]) for row in rows] == [
            (offsets.key_hash(key), *places) for key, *places in wanted
        ]
        compared += 1
    assert compared > 300


def test_images_whose_names_have_several_dots_are_samples(tmp_path: Path) -> None:
    """Where WebDataset's rule would leave a sample without an image; each has the label of the
    longest key that fits.
    """
    names = (
        "a.jpg",
        "img.1.jpg",
        "img.1.cls",
        "img.1.mask.png",
        "img.2.x.png",
        "img.2.json",
        "img.3.jpg",
        "img.cls",
        "img.txt",
    )
    contents = {"img.1.cls": b"1", "img.2.json": b'{"label": 2}', "img.cls": b"9", "img.txt": b"?"}
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for n, name in enumerate(names):
            add(tar, name, contents.get(name) or encode(picture(n), Path(name).suffix))
        add(tar, "b.jpg", encode(picture(20), ".jpg"))
        add(tar, "img.4.jpg", encode(picture(21), ".jpg"))  # names without an order
    shards = Shards(tmp_path)
    read = {shards.name(i).removeprefix("s.tar/"): shards.read(i).label for i in range(len(shards))}
    assert read == {"a": -1, "img.1": 1, "img.2.x": 2, "img.3": 9, "b": -1, "img.4": -1}
    assert shards.read(1, mask=True).mask == encode(picture(3))
    rows = offsets.scan(tmp_path / "s.tar")[0]
    assert rows["key"].tolist() == [offsets.key_hash(key) for key in read]
    for wrong, fault in (
        ("img.1.png", "key 'img.1' occurs twice"),
        ("img.5.pkl", "member 'img.5.pkl' is a pickle"),
    ):
        with tarfile.open(tmp_path / "s.tar", "a") as tar:
            add(tar, wrong, encode(picture(0)))
        faults: list[ShardError] = []
        assert len(offsets.scan(tmp_path / "s.tar", faults.append)[0]) == 6
        assert any(fault in str(one) for one in faults)


def test_what_a_label_holds_keeps_no_image_from_label_free_training(tmp_path: Path) -> None:
    odd = {
        **{
            "text.cls": b"tench",
            "float.cls": b"3.0",
            "empty.cls": b"",
            "low.cls": b"-3",
            "long.cls": b"9" * 5000,
        },
        **{
            "text.json": b'{"label": "cat"}',
            "list.json": b'{"label": [3]}',
            "many.json": b'{"labels": ["a", "b"]}',
        },
        **{
            "true.json": b'{"label": true}',
            "bare.json": b"[1, 2]",
            "none.json": b"",
            "deep.json": b"[" * 100_000,
        },
        **{
            "bytes.json": b'{"caption": "\xe9"}',
            "large.json": b'{"label": 1, "exif": "' + b"x" * (1 << 20) + b'"}',
        },
    }
    none = {
        "minus.cls": b"-1",
        "null.json": b'{"label": null}',
        "other.json": b'{"caption": NaN}',
        "two.json": b'{"labels": [1, 2]}',
    }
    good = {
        "one.cls": b" 5\n",
        "two_.json": b'{"label": 6, "x": "\xc3\xa9"}',
        "both.cls": b"7",
        "both.json": b'{"label": "cat"}',
    }
    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        for n, (name, data) in enumerate((odd | none | good).items()):
            add(tar, f"{n:02d}{name}" if "both" not in name else name, data)
            if name != "both.cls":
                key = f"{n:02d}{name}".partition(".")[0] if "both" not in name else "both"
                add(tar, f"{key}.png", encode(picture(n)))
    shards = Shards(folder)
    assert len(shards) == len(odd) + len(none) + len(good) - 1
    assert shards.labels().tolist() == [-1] * (len(odd) + len(none)) + [5, 6, 7]
    assert [shards.read(i).label for i in range(len(shards))] == shards.labels().tolist()
    assert offsets.scan(folder / "s.tar")[0]["label"].tolist() == [-2] * len(odd) + [-1] * len(
        none
    ) + [5, 6, 7]
    count = len(odd) + len(none)
    words = (
        "samples have no label, or several, or none that is a whole number, such as "
        "s.tar/00text with 'tench'"
    )
    assert shards.unlabelled() == f"{count} of {count + 3} {words}"
    assert shards.unlabelled(np.arange(5, 6)).endswith("such as s.tar/05text with 'cat'")
    assert shards.unlabelled(np.arange(13, 14)).endswith("1,048,600 bytes")
    assert (
        shards.unlabelled(np.array([14, count]))
        == "1 of 2 samples have no label, or several, such as s.tar/14minus"
    )
    assert shards.unlabelled(np.array([count, count + 2])) == ""
    found = verify(folder, 10**6)
    assert (found.labelled, found.unreadable, found.faults) == (3, len(odd), [])
    data = DataConfig(path=str(folder), lanes=3, workers=0, views=(View(size=8),))
    stream = open_stream(data, seed=0, batch=3, rank=0, world=1, device=torch.device("cpu"))
    assert sorted(int(i) for b in stream.batches(0, 7) for i in b.labels)[-3:] == [5, 6, 7]
    assert "with 'tench'" in stream.unlabelled()


def test_the_index_of_a_read_only_folder_lies_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != folder and right(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(folder.iterdir())
    assert train_on(folder) == list(range(15))
    assert sorted(folder.iterdir()) == before
    (place,) = (tmp_path / "cache" / "scaletrain" / "index").iterdir()
    assert sorted(p.name for p in place.iterdir()) == [
        "00000.tar.stidx",
        "00001.tar.stidx",
        "00002.tar.stidx",
        index.MANIFEST,
    ]
    said: list[str] = []
    assert len(Shards(folder, said.append)) == 15
    assert not said
    assert verify(folder, 10**6).faults == []
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(ShardError, match=r"00001.tar.*not the \d+ indexed.*--force"):
        Shards(folder).check()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        DataError,
        match=r"cannot be written, nor can .*: let its owner run .*, or set XDG_CACHE_HOME",
    ):
        Shards(folder)


def test_indexing_says_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.format.index.SILENCE", -1.0)
    said: list[str] = []
    Shards(folder, said.append)
    assert said[1:4] == [f"indexed {n} of 3 shards" for n in (1, 2, 3)]
