"""Files of groups: an integer for each sample of the data set in use, and of no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kit.data import write_shards

from scaletrain.data.errors import DataError
from scaletrain.data.reading import groups
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(write_shards(tmp_path / "train", (6, 4)))


def test_groups_are_of_one_data_set(shards: Shards, tmp_path: Path) -> None:
    file, chosen = tmp_path / "groups.safetensors", np.array([0, 3, 4])
    some = SubsetShards(shards, chosen)
    groups.save(file, some, np.array([2, -1, 0]), "by hand")
    assert groups.load(file, some).tolist() == [2, -1, 0]
    others = Shards(write_shards(tmp_path / "other", (4, 6)))
    for other in (shards, SubsetShards(shards, chosen + 1), SubsetShards(others, chosen)):
        with pytest.raises(DataError, match=r"groups\.safetensors has the groups of 3 samples of"):
            groups.load(file, other)


def test_what_is_no_file_of_groups_is_refused(shards: Shards, tmp_path: Path) -> None:
    file = tmp_path / "groups.safetensors"
    for wrong in (np.arange(9), np.arange(10) - 2):
        with pytest.raises(DataError, match="groups for 10 samples must be as many integers of at"):
            groups.save(file, shards, wrong, "by hand")
    with pytest.raises(DataError, match=r"groups\.safetensors cannot be read: No such file"):
        groups.load(file, shards)
    groups.save(file, shards, np.arange(10), "by hand")
    whole = file.read_bytes()
    for damaged in (whole[:-8], b"", whole.replace(b"groups 1", b"groups 9")):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"groups\.safetensors is no whole file of groups"):
            groups.load(file, shards)
