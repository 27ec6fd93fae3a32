"""Maps of other shards are found by key in any order; what is missing, foreign or not unique is
named and counted.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from kit.data import add, encode, picture

from scaletrain.config.schema import DataConfig
from scaletrain.data.errors import DataError
from scaletrain.data.format import offsets
from scaletrain.data.reading.concat import shards_of
from scaletrain.data.reading.maps import MatchedMaps, match, open_maps
from scaletrain.data.reading.subset_shards import SubsetShards


def shards(folder: Path, *keys: Sequence[str]) -> Path:
    """One shard for each list of keys; the first pixel of an image is a number of its key."""
    folder.mkdir()
    for number, names in enumerate(keys):
        with tarfile.open(folder / f"s-{number}.tar", "w") as tar:
            for key in names:
                add(tar, f"{key}.png", encode(np.full((24, 30), int(key[1:]), np.uint8)))
    return folder


def opened(folder: Path, maps: Path, rows: Sequence[int] | None = None, **options: object):  # type: ignore[no-untyped-def]
    data = DataConfig(path=str(folder), maps=[{"path": str(maps), "kind": "classes", **options}])
    whole = shards_of(str(folder))
    (found,) = open_maps(data, whole if rows is None else SubsetShards(whole, np.array(rows)))
    return found


KEYS = [f"k{number}" for number in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shards(tmp_path / "data", KEYS[:5], KEYS[5:])


def test_reordered_maps_are_those_of_their_samples(folder: Path, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(KEYS).tolist()
    found = opened(folder, shards(tmp_path / "maps", order[:2], order[2:9], order[9:]))
    assert isinstance(found, MatchedMaps)
    assert [found.shards.name(row).partition("/")[2] for row in found.rows] == KEYS
    stored = found.samples.read(7)
    assert (found.read(7, stored, picture(0), 1000) == 7).all()


def test_missing_and_foreign_maps_are_named_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = shards(tmp_path / "maps", [*KEYS[:6], "x90", "x91"], ["x92", "x93"])
    with pytest.raises(DataError) as error:
        opened(folder, maps)
    assert str(error.value) == (
        f"6 of 12 samples have no map in {maps}, s-1.tar/k6, s-1.tar/k7, s-1.tar/k8 and 3 more; 4 "
        f"of 10 maps in {maps} belong to no sample, s-0.tar/x90, s-0.tar/x91, s-1.tar/x92 and 1 "
        "more: maps need the whole keys of their samples; write them with these, or accept what "
        "is there with data.maps.0.on_missing=none data.maps.0.on_foreign=ignore"
    )
    with pytest.raises(DataError, match="belong to no sample"):
        opened(folder, maps, on_missing="none")
    found = opened(folder, maps, on_missing="none", on_foreign="ignore")
    assert "6 of 12 samples have no map" in (said := capsys.readouterr().out)
    assert "4 of 10 maps" in said
    assert found.rows.tolist() == [0, 1, 2, 3, 4, 5, *[-1] * 6]
    assert found.read(6, found.samples.read(6), picture(0), 1000) is None


def test_samples_that_are_not_used_need_no_map(folder: Path, tmp_path: Path) -> None:
    maps = shards(tmp_path / "maps", KEYS[3:6])
    found = opened(folder, maps, rows=[3, 5])
    assert found.rows.tolist() == [0, 2]
    # the other map belongs to a sample that is not in use
    assert (found.read(1, found.samples.read(1), picture(0), 1000) == 5).all()
    with pytest.raises(DataError, match=r"1 of 2 samples have no map in .*, s-0.tar/k2: maps"):
        opened(folder, maps, rows=[2, 3])


def test_keys_that_are_not_unique_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = shards(tmp_path / "twice", KEYS, KEYS[4:6])
    for data, maps in ((folder, twice), (twice, folder)):
        with pytest.raises(
            DataError, match=r"2 keys are not unique.*: s-0.tar/k(4|5) and s-1.tar/k\1;"
        ):
            opened(data, maps)
    # two keys of one hash
    right = offsets.key_hash
    monkeypatch.setattr(offsets, "key_hash", lambda key: 7 if key in ("k3", "k9") else right(key))
    other = shards(tmp_path / "other", KEYS)
    with pytest.raises(DataError, match=r"or their hashes are not.*: s-0.tar/k3 and s-0.tar/k9;"):
        match(shards_of(str(other)), shards_of(str(folder)))


def test_a_grey_map_may_not_be_missing() -> None:
    with pytest.raises(ValueError, match="no grey value stands for a missing map"):
        DataConfig(maps=[{"kind": "grey", "on_missing": "none"}])
