"""Training on a subset: the same batches as on a folder that holds its samples alone, in any number
of ranks and workers, and the groups that come with them.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.data import add, joined, write_shards
from kit.evals import spoil

from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.loading.sources import open_plan, open_shards
from scaletrain.data.reading import groups, subset
from scaletrain.data.reading.concat import shards_of
from scaletrain.data.reading.reader import Shards

CPU = torch.device("cpu")
COUNTS = (11, 3, 20, 14)
CHOSEN = [n for n in range(48) if n % 7 > 2 and not 11 <= n < 14]  # none of the second shard
N = len(CHOSEN)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a subset of them, and groups of the subset: ten times a sample's number in it."""
    root = tmp_path_factory.mktemp("subset")
    shards = Shards(write_shards(root / "whole", COUNTS))
    subset.save(root / "some.json", shards, np.array(CHOSEN), "by hand", "samples")
    used = open_shards(DataConfig(path=str(root / "whole"), subset=str(root / "some.json")))
    assert used is not None
    groups.save(root / "groups.safetensors", used, 10 * np.arange(N), "by hand")
    return root


def stream(root: Path, rank: int = 0, world: int = 1, **options: Any) -> Stream:
    settings = {
        "path": str(root / "whole"),
        "subset": str(root / "some.json"),
        "lanes": 4,
        "window": 2,
        "workers": 0,
        "views": (View(size=16, count=2), View(size=8)),
    }
    data = DataConfig(**(settings | options))
    return open_stream(data, seed=5, batch=12, rank=rank, world=world, device=CPU)


def content(batches: Sequence[Batch]) -> list[Any]:
    return [
        (
            *(x.tolist() for x in (b.index, b.keys, b.labels)),
            *(view.numpy().tobytes() for view in b.views),
        )
        for b in batches
    ]


def test_a_subset_trains_as_a_folder_of_its_samples_alone(root: Path, tmp_path: Path) -> None:
    """Bit for bit: order, random keys, pixels, labels."""
    (root / "alone").mkdir()
    source, shard = Shards(root / "whole"), np.repeat(range(4), COUNTS)
    for number in (0, 2, 3):
        name = root / "alone" / f"s-{number}.tar"
        with tarfile.open(name, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in (n for n in CHOSEN if shard[n] == number):
                stored = source.read(sample)
                add(tar, f"{sample:05d}.cls", str(stored.label).encode())
                add(tar, f"{sample:05d}.png", stored.image)

    some, alone = stream(root), stream(root, path=str(root / "alone"), subset="")
    assert (some.samples, some.steps_per_epoch) == (alone.samples, alone.steps_per_epoch) == (N, 2)
    mine = list(some.batches(0, 6))
    assert content(mine) == content(list(alone.batches(0, 6)))
    assert some.mixing().endswith(f"; data.subset selects {N} of 48 samples")
    assert {n for b in mine for n in b.index.tolist()} == set(range(N))
    assert [some.name(n).rpartition("/")[2] for n in range(N)] == [f"{n:05d}" for n in CHOSEN]
    assert some.labels().tolist() == [n % 7 for n in CHOSEN]
    for world, workers in ((2, 0), (3, 1)):
        ranks = [list(stream(root, r, world, workers=workers).batches(0, 4)) for r in range(world)]
        assert content([joined([r[step] for r in ranks]) for step in range(4)]) == content(mine[:4])

    staged = stream(root, cache={"path": str(tmp_path), "stage": True})
    assert content(list(staged.batches(0, 2))) == content(mine[:2])


def test_the_plan_that_a_launcher_checks_is_that_of_the_subset(root: Path) -> None:
    data = DataConfig(path=str(root / "whole"), subset=str(root / "some.json"), lanes=4)
    assert open_plan(data, seed=5, batch=12).steps_per_epoch == 2
    with pytest.raises(DataError, match=f"the data set has {N} samples, fewer than batch=32"):
        open_plan(data, seed=5, batch=32)


def test_substitutes_come_from_the_subset(tmp_path: Path) -> None:
    """With labels and groups of their own."""
    folder = write_shards(tmp_path / "whole", (16, 16))
    shards = Shards(folder)
    chosen = np.array([n for n in range(32) if n % 7 in (1, 3, 5)])
    subset.save(tmp_path / "some.json", shards, chosen, "by hand")
    used = open_shards(DataConfig(path=str(folder), subset=str(tmp_path / "some.json")))
    assert used is not None
    groups.save(tmp_path / "groups.safetensors", used, np.arange(len(chosen)), "by hand")
    for n in (1, 8, 19):
        spoil(folder, n)

    made = stream(tmp_path, on_bad="skip", max_bad=1.0, groups=str(tmp_path / "groups.safetensors"))
    replaced = []
    batches = list(made.batches(0, 5, lambda step, lost: replaced.extend(lost)))
    assert len(replaced) >= 10
    assert {int(chosen[n.planned]) for n in replaced} == {1, 8, 19}
    for batch in batches:
        assert batch.index.max() < len(chosen)
        assert batch.groups is not None
        assert batch.groups.tolist() == batch.index.tolist()
        assert batch.labels.tolist() == (chosen[batch.index] % 7).tolist()


def test_groups_come_with_every_sample(root: Path) -> None:
    file = str(root / "groups.safetensors")
    (batch,) = stream(root, groups=file).batches(1, 2)
    assert batch.groups is not None
    assert batch.groups.dtype == torch.int64
    assert batch.groups.tolist() == (10 * batch.index).tolist()
    for part in (batch.double(), *batch.split(3)):
        assert torch.equal(part.groups, 10 * part.index)
    ranks = [next(stream(root, r, 2, groups=file, workers=1).batches(1, 2)) for r in range(2)]
    assert torch.equal(joined(ranks).groups, batch.groups)
    (without,) = stream(root).batches(1, 2)
    assert without.groups is None
    assert content([without]) == content([batch])


def test_labelled_samples_have_the_groups_of_what_is_in_use(root: Path) -> None:
    """They are chosen from all stored samples, of which those outside the subset have no group."""
    subset.save(root / "labels.json", Shards(root / "whole"), np.arange(2, 5), "by hand")
    support = {"labels": str(root / "labels.json"), "classes": 3}
    file = str(root / "groups.safetensors")
    (batch,) = stream(root, groups=file, support=support).batches(0, 1)
    assert batch.support is not None
    known = {number: 10 * place for place, number in enumerate(CHOSEN)}
    assert batch.support.groups.tolist() == [known.get(n, -1) for n in batch.support.index.tolist()]
    assert {-1, 0, 10} == set(batch.support.groups.tolist())
    other = {"path": str(write_shards(root / "labelled", (8,))), "classes": 3}
    (batch,) = stream(root, groups=file, support=other).batches(0, 1)
    assert batch.support is not None
    assert batch.support.groups is None


def test_a_mixture_of_subsets(tmp_path: Path) -> None:
    """One file over all parts; each part gives its samples of it."""
    folders = [str(write_shards(tmp_path / name, (20, 20))) for name in ("a", "b")]
    chosen = np.array([*range(0, 40, 2), *range(41, 80, 3)])
    subset.save(tmp_path / "some.json", shards_of(folders), chosen, "by hand", "samples")
    parts = [
        {"path": folder, "weight": weight} for folder, weight in zip(folders, (1, 3), strict=True)
    ]
    made = stream(tmp_path, path="", mixture=parts, epoch_samples=48)
    assert made.samples == len(chosen)
    drawn = torch.cat([b.index for b in made.batches(0, 4)])
    assert drawn.max() < len(chosen)
    assert 11 <= (drawn < 20).sum() <= 13
    assert [source["samples"] for source in made.sources()] == [40, 40]
    assert made.list_sources()["subset"]["samples"] == len(chosen)


def test_synthetic_data_has_no_subset(root: Path) -> None:
    with pytest.raises(DataError, match=r"synthetic data has none: clear it with data\.subset=''"):
        stream(root, path="synthetic")
    with pytest.raises(DataError, match=r"clear it with data\.groups=''"):
        stream(root, path="synthetic", subset="", groups="x")
