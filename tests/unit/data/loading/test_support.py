"""Labelled samples beside the batches: balanced, each class and sample in turn, the same for any
ranks and after a resume.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kit.data import joined, write_shards

from scaletrain.config.schema import DataConfig, SupportConfig, View
from scaletrain.core import Batch
from scaletrain.data.errors import DataError
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.data.reading import subset as labels
from scaletrain.data.reading.reader import Shards
from scaletrain.data.sampling.balanced import Balanced
from scaletrain.data.sampling.substitutes import Replaced

CPU = torch.device("cpu")
LABELS = np.repeat([3, 0, 7, 8, 5], [2, 7, 4, 9, 6])  # [28]
INDEX = np.arange(100, 128)


def plan(classes: int = 3, per_class: int = 2, seed: int = 1) -> Balanced:
    return Balanced(
        INDEX, LABELS, seed=seed, classes=classes, per_class=per_class, steps_per_epoch=7
    )


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "per_class"), [(1, 2), (3, 2), (5, 3), (4, 5)])
def test_a_step_holds_equally_many_of_each_of_its_classes(classes: int, per_class: int) -> None:
    for step in range(7):
        y = LABELS[plan(classes, per_class).batch(2, step) - 100]
        assert sum(Counter(y.tolist()).values()) == classes * per_class
        assert all(n % per_class == 0 for n in Counter(y.tolist()).values())
        assert np.array_equal(
            y[:classes], y[classes : 2 * classes]
        )  # neighbours are of different classes


def test_classes_and_samples_take_turns() -> None:
    """50 steps of 3 classes are 30 rounds of the 5; each class gives 60 draws, its samples equally
    many.
    """
    draws = [plan().draws(*divmod(step, 7)) for step in range(50)]
    samples = np.concatenate([d.samples for d in draws])
    assert Counter(LABELS[samples - 100].tolist()) == dict.fromkeys(LABELS.tolist(), 60)
    for label in np.unique(LABELS):
        size = int((label == LABELS).sum())
        assert set(Counter(samples[LABELS[samples - 100] == label].tolist()).values()) <= {
            60 // size,
            -(-60 // size),
        }
    pairs = list(
        zip(samples.tolist(), np.concatenate([d.repeats for d in draws]).tolist(), strict=True)
    )
    assert len(set(pairs)) == len(pairs)  # no draw of a run has another's crop


def test_a_part_is_a_part_of_the_whole_and_seeds_differ() -> None:
    whole = plan().draws(1, 4)
    parts = [plan().draws(1, 4, *plan().part(rank, 3)) for rank in range(3)]
    for column in range(2):
        assert np.array_equal(np.concatenate([p[column] for p in parts]), whole[column])
    assert not np.array_equal(plan(seed=2).batch(1, 4), whole.samples)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"data\.support\.classes=6, but the labelled samples are of 5"
    ):
        plan(classes=6)
    with pytest.raises(
        DataError,
        match=r"4 processes do not divide the 6 labelled samples .* change data\.support\.classes",
    ):
        plan().part(0, 4)


# --- the stream -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("support") / "shards", (11, 3, 20, 14))


@pytest.fixture(scope="module")
def subset(folder: Path) -> Path:
    shards = Shards(folder)
    labels.save(folder / "few.json", shards, labels.per_class(shards.labels(), 3, 0), "three")
    return folder / "few.json"


def data(folder: Path, file: Path | str, workers: int = 0, **options: Any) -> DataConfig:
    support = {"labels": str(file), "classes": 3, "per_class": 2, "epochs": 1.5} | options
    return DataConfig(
        path=str(folder),
        lanes=4,
        window=2,
        workers=workers,
        views=(View(size=16, count=2), View(size=8)),
        support=support,
    )


def read(made: DataConfig, start: int, stop: int, ranks: int = 1, end: int = 12) -> list[Batch]:
    """Global batches with their support, from streams that are to go on to `end` and are closed
    before.
    """
    streams = [
        open_stream(made, seed=5, batch=12, rank=rank, world=ranks, device=CPU)
        for rank in range(ranks)
    ]
    running = [s.batches(start, end) for s in streams]
    found = []
    for _ in range(start, stop):
        parts = [next(r) for r in running]
        beside = [p.support for p in parts if p.support is not None]
        found.append(replace(joined(parts), support=joined(beside) if beside else None))
    for s in streams:
        s.close()
    return found


def content(batch: Batch | None) -> Any:
    if batch is None:
        return None
    pixels = [v.numpy().tobytes() for v in batch.views]
    return (
        batch.index.tolist(),
        batch.keys.tolist(),
        batch.labels.tolist(),
        pixels,
        content(batch.support),
    )


@pytest.fixture(scope="module")
def whole(folder: Path, subset: Path) -> list[Batch]:
    return read(data(folder, subset), 0, 8)


def test_labels_are_those_of_the_subset_and_end_with_their_epochs(
    whole: list[Batch], folder: Path, subset: Path
) -> None:
    known = labels.load(subset, Shards(folder))
    classes = dict(zip(known.index.tolist(), known.labels.tolist(), strict=True))
    for batch in whole[:6]:  # 1.5 epochs of 4 steps
        assert batch.support is not None
        assert [v.shape for v in batch.support.views] == [(1, 6, 3, 16, 16)]
        assert batch.support.labels.tolist() == [classes[i] for i in batch.support.index.tolist()]
    assert [batch.support for batch in whole[6:]] == [None, None]
    assert len({k for batch in whole[:6] for k in batch.support.keys.tolist()}) == 36


def test_the_batches_themselves_are_what_they_would_be_without(
    whole: list[Batch], folder: Path, subset: Path
) -> None:
    alone = read(data(folder, subset).model_copy(update={"support": None}), 0, 8)
    assert [content(replace(batch, support=None)) for batch in whole] == [
        content(batch) for batch in alone
    ]


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (3, 1)])
def test_ranks_workers_and_a_resume_do_not_matter(
    whole: list[Batch], folder: Path, subset: Path, ranks: int, workers: int
) -> None:
    again = read(data(folder, subset, workers), 0, 3, ranks) + read(
        data(folder, subset, workers), 3, 8
    )
    assert [content(batch) for batch in again] == [content(batch) for batch in whole]


def test_a_folder_of_its_own_needs_no_list(
    whole: list[Batch], folder: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "labelled", (8, 8))
    (batch,) = read(data(folder, "", path=str(other)), 0, 1)
    assert content(replace(batch, support=None)) == content(replace(whole[0], support=None))
    assert batch.support is not None
    assert batch.support.labels.tolist() == [i % 7 for i in batch.support.index.tolist()]


def test_a_substitute_has_no_label(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", (14, 14))
    first = folder / "s-000.tar"
    Shards(folder)  # is indexed while it is whole
    raw = bytearray(first.read_bytes())
    at = raw.index(b"\x89PNG")
    raw[at + 20 : at + 90] = bytes(70)
    first.write_bytes(raw)
    file = tmp_path / "few.json"
    labels.save(file, Shards(folder), np.array([0, 1]), "two")
    made = data(folder, file, classes=2, epochs=8).model_copy(update={"on_bad": "skip"})
    seen: list[Replaced] = []
    s = open_stream(made, seed=5, batch=12, rank=0, world=1, device=CPU)
    (batch,) = s.batches(0, 1, lambda step, lost: seen.extend(lost))
    assert batch.support is not None
    assert batch.support.labels.tolist().count(-1) == 2
    assert batch.support.labels.tolist().count(1) == 2
    assert [r.planned for r in seen].count(0) >= 2


def test_what_is_missing_is_said(folder: Path, subset: Path) -> None:
    def opened(made: DataConfig) -> Stream:
        return open_stream(made, seed=5, batch=12, rank=0, world=1, device=CPU)

    with pytest.raises(
        DataError, match=r"data\.support\.labels is empty: add data\.support\.labels=FILE"
    ):
        opened(data(folder, ""))
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        opened(data(folder, "nowhere.json"))
    mixed = data(folder, subset).model_dump() | {
        "path": "",
        "mixture": [{"path": str(folder), "weight": 1.0}],
    }
    with pytest.raises(DataError, match=r"set data\.support\.path"):
        opened(DataConfig.model_validate(mixed))


def test_made_up_data_has_made_up_labels() -> None:
    made = DataConfig(
        path="synthetic",
        synthetic_samples=48,
        lanes=4,
        workers=0,
        support=SupportConfig(classes=4, per_class=3),
    )
    s = open_stream(made, seed=0, batch=12, rank=0, world=1, device=CPU)
    assert s.support is not None
    assert s.mixing().endswith(
        "plus 12 of 48 labelled samples, 4 of 4 classes with each of the first 400 steps"
    )
    (batch,) = s.batches(0, 1)
    assert batch.support is not None
    assert Counter(batch.support.labels.tolist()) == dict.fromkeys(range(4), 3)
