"""A subset of shards is a data set of its own: numbers, labels, names, folders and order."""

from __future__ import annotations

import numpy as np
import pytest
from kit.data import write_shards

from scaletrain.data.reading.concat import shards_of
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.data.storage.prefetch import MatchedOrder, RangeOrder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("subset")
    return [
        str(write_shards(root / name, counts)) for name, counts in (("a", (6, 2, 4)), ("b", (5,)))
    ]


def test_numbers_count_the_subset_only(folders: list[str]) -> None:
    shards = Shards(folders[0])
    some = SubsetShards(shards, np.array([1, 4, 8, 11]))
    assert len(some) == 4
    assert some.counts.tolist() == [2, 2]  # the second shard has none of them
    assert some.labels().tolist() == [1, 4, 1, 4]
    assert [some.read(n).image for n in range(4)] == [shards.read(n).image for n in (1, 4, 8, 11)]
    assert some.name(2) == shards.name(8) == "s-002.tar/00008"
    assert "sample '00011': broken" in str(some.fault(3, "broken"))
    assert some.span(2) == (0, 4)
    assert MatchedOrder(RangeOrder([(0, 4)]), some.rows).samples(3).tolist() == [11]


def test_a_subset_of_a_subset(folders: list[str]) -> None:
    shards = Shards(folders[0])
    some = SubsetShards(SubsetShards(shards, np.array([1, 4, 8, 11])), np.array([0, 3]))
    assert some.rows.tolist() == [1, 11]
    assert some.fingerprint == SubsetShards(shards, np.array([1, 11])).fingerprint
    assert some.fingerprint != SubsetShards(shards, np.array([1, 10])).fingerprint


def test_one_subset_of_several_folders(folders: list[str]) -> None:
    """A substitute stays in its folder and in the subset."""
    shards = shards_of(folders)
    some = SubsetShards(shards, np.array([0, 7, 10, 13, 14]))
    assert [counts.tolist() for counts in some.folder_counts] == [[1, 1, 1], [2]]
    assert [some.span(n) for n in range(5)] == [(0, 3)] * 3 + [(3, 5)] * 2
    assert some.name(4) == f"{folders[1]}/s-000.tar/00002"
    assert some.unlabelled().startswith("5 of 5 samples have no label that counts")
    assert some.fingerprint != SubsetShards(shards_of(folders[::-1]), some.rows).fingerprint
