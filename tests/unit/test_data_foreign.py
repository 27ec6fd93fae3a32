"""Archives that others wrote, img2dataset's for one: indexed once, beside them or in the user's cache, and trained on."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from data_kit import add, encode, picture

from scaletrain.config import Data, View
from scaletrain.data import index, table
from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.loader import Stream
from scaletrain.data.reader import Shards
from scaletrain.data.verify import verify

SUFFIXES = ("jpg", "webp", "png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As img2dataset leaves it: KEY.jpg, KEY.json, KEY.txt, and tables and statistics beside the shards."""
    made = tmp_path / "laion"
    made.mkdir()
    for shard in range(3):
        with tarfile.open(made / f"{shard:05d}.tar", "w") as tar:
            for n in range(5):
                key = f"{shard:05d}{n:04d}"
                record = {"url": "http://a.b/ö.jpg", "caption": "a cat", "key": key, "status": "success", "exif": "{}"}
                add(tar, f"{key}.{SUFFIXES[shard]}", encode(picture(5 * shard + n), f".{SUFFIXES[shard]}"))
                add(tar, f"{key}.json", json.dumps(record).encode())
                add(tar, f"{key}.txt", "a cat ö".encode())
                add(tar, f"{key}.npy", b"\x93NUMPY\1\0")
                add(tar, f"{key}.seg.png", b"not for us")
        (made / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (made / f"{shard:05d}_stats.json").write_text("{}")
    return made


def train_on(folder: Path) -> list[int]:
    data = Data(path=str(folder), lanes=5, workers=2, views=(View(size=8),))
    stream = Stream(data, seed=0, batch=5, rank=0, world=1, device=torch.device("cpu"))
    return sorted(int(i) for b in stream.batches(0, 3) for i in b.index)


def test_img2dataset_shards_train_after_one_pass(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_on(folder) == list(range(15))
    assert f"{folder} has no index yet: reading every shard once to make it in {folder}" in capsys.readouterr().out
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
    assert len(table.scan(tmp_path / "s.tar")[0]) == 1


def test_images_with_names_that_are_not_read_are_not_lost_silently(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.jpg", encode(picture(1), ".jpg"))
        add(tar, "photo.2021.jpg", encode(picture(2), ".jpg"))
    with pytest.raises(ShardError, match=r"sample 'photo' has no image \(jpg, jpeg, png, webp\) but 2021.jpg"):
        table.scan(tmp_path / "s.tar")


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
    assert sorted(p.name for p in place.iterdir()) == ["00000.tar.idx", "00001.tar.idx", "00002.tar.idx", index.MANIFEST]
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
    with pytest.raises(DataError, match=r"cannot be written, nor can .*: let its owner run .*, or set XDG_CACHE_HOME"):
        Shards(folder)


def test_indexing_says_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.index.SILENCE", -1.0)
    said: list[str] = []
    Shards(folder, said.append)
    assert said[1:] == [f"indexed {n} of 3 shards" for n in (1, 2, 3)]
