"""Elastic resume: runs that stop in mid-epoch and go on with other ranks and workers see what one
uninterrupted run sees.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from kit.data import joined, write_shards

from scaletrain.config.schema import DataConfig, View
from scaletrain.core import Batch
from scaletrain.data.loading.loader import Stream, open_stream

CPU = torch.device("cpu")
STEPS = 12  # three epochs of 4 steps, or of 3 for the mixture
Shape = tuple[int, int]  # ranks, workers of each


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("elastic")
    return write_shards(root / "a", (11, 3, 20, 14)), write_shards(root / "b", (7, 10))


def streams(folders: tuple[Path, Path], case: str, shape: Shape) -> list[Stream]:
    ranks, workers = shape
    origin = (
        {"path": str(folders[0])}
        if case == "one"
        else {
            "mixture": [
                {"path": str(f), "weight": w} for f, w in zip(folders, (0.6, 0.4), strict=True)
            ],
            "epoch_samples": 40,
        }
    )
    data = DataConfig(
        lanes=4, window=2, workers=workers, views=(View(size=16, count=2), View(size=8)), **origin
    )
    return [
        open_stream(data, seed=5, batch=12, rank=rank, world=ranks, device=CPU)
        for rank in range(ranks)
    ]


def part(folders: tuple[Path, Path], case: str, shape: Shape, start: int, stop: int) -> list[Batch]:
    """Global batches of the steps start .. stop - 1, whose ranks read more than they train on, as a
    killed run's do.
    """
    ranks = streams(folders, case, shape)
    running = [stream.batches(start, STEPS) for stream in ranks]
    batches = [joined([next(r) for r in running]) for _ in range(start, stop)]
    for stream in ranks:
        stream.close()
    return batches


def content(batch: Batch) -> tuple[object, ...]:
    """Everything of a batch, byte for byte."""
    return (
        batch.index.tolist(),
        batch.keys.tolist(),
        batch.labels.tolist(),
        *(v.numpy().tobytes() for v in batch.views),
    )


@pytest.fixture(scope="module", params=["one", "mixture"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def whole(folders: tuple[Path, Path], case: str) -> list[Batch]:
    return part(folders, case, (1, 0), 0, STEPS)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 2), (1, 1)), ((2, 2), (1, 3)), ((3, 1), (2, 2))]
)
def test_twice_resumed_in_mid_epoch(
    folders: tuple[Path, Path], case: str, whole: list[Batch], before: Shape, after: Shape
) -> None:
    batches = [
        *part(folders, case, before, 0, 5),
        *part(folders, case, after, 5, 7),
        *part(folders, case, before, 7, STEPS),
    ]
    assert [content(b) for b in batches] == [content(b) for b in whole]


def test_no_sample_is_missing_or_repeated(case: str, whole: list[Batch]) -> None:
    """Against counting: the uninterrupted run is not its own judge."""
    if case == "one":
        for epoch in range(3):
            numbers = torch.cat([b.index for b in whole[4 * epoch : 4 * epoch + 4]])
            assert sorted(numbers.tolist()) == list(range(48))
        return
    for first, size in ((0, 48), (48, 17)):
        seen = [int(i) - first for b in whole for i in b.index if first <= i < first + size]
        counts = Counter(seen)
        assert {counts[i] for i in range(size)} <= {len(seen) // size, -(-len(seen) // size)}
    assert len({tuple(b.keys.tolist()) for b in whole}) == STEPS
    assert len({k for b in whole for k in b.keys.tolist()}) == 12 * STEPS
