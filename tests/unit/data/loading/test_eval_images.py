"""Images as evaluations read them: each once, in order, through one transform."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kit.data import joined, write_shards

from scaletrain.core import Batch
from scaletrain.data.errors import ImageError, ShardError
from scaletrain.data.loading.loader import eval_batches
from scaletrain.data.reading.reader import Shards
from scaletrain.data.reading.subset_shards import SubsetShards
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.data.storage.prefetch import RangeOrder
from scaletrain.data.transforms.image import Pixels
from scaletrain.evals.transforms import Resize, Transform

NORM = {"device": torch.device("cpu"), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards") / "d", (11, 3, 20, 14))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("resize", ["tv", "byol", "none"])
def test_plain_gives_every_sample_once_in_order(folder: Path, workers: int, resize: Resize) -> None:
    def read(batch: int, parts: list[tuple[int, int]] | None = None) -> list[Batch]:
        return list(
            eval_batches(
                str(folder),
                transform=Transform(resize=resize, size=16),
                batch=batch,
                parts=parts,
                workers=workers,
                **NORM,
            )
        )

    whole = read(10)
    assert [len(batch) for batch in whole] == [10, 10, 10, 10, 8]
    assert all(b.views[0].shape == (1, len(b), 3, 16, 16) for b in whole)
    every, some = joined(whole), joined(read(4, [(2, 5), (11, 20), (40, 48)]))
    assert every.index.tolist() == list(range(48))
    assert every.labels.tolist() == [i % 7 for i in range(48)]

    wanted = [*range(2, 5), *range(11, 20), *range(40, 48)]
    assert some.index.tolist() == wanted
    assert torch.equal(some.labels, every.labels[wanted])
    assert torch.equal(some.views[0], every.views[0][:, wanted])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_end_with_their_part(folder: Path, workers: int) -> None:
    """Also where a later batch is larger than the first."""
    actual = eval_batches(
        str(folder),
        transform=Transform(resize="tv", size=16),
        batch=4,
        parts=[(2, 5), (11, 20), (40, 48)],
        workers=workers,
        **NORM,
    )
    assert [len(batch) for batch in actual] == [3, 4, 4, 1, 4, 4]


class Numbering:
    """A transform that paints an image with the number it is given, and cannot take number 20."""

    size = 8

    def __call__(self, image: Pixels, sample: int) -> Pixels:
        if sample == 20:
            raise ImageError("no image for the number 20")
        return np.full((8, 8, 3), sample, np.uint8)


def test_a_transform_gets_the_number_in_the_whole_shards(folder: Path) -> None:
    """So that a subset changes nothing about an image."""
    rows = np.array([4, 9, 47])
    options = {**NORM, "mean": (0, 0, 0), "std": (1 / 255,) * 3}
    some = SubsetShards(Shards(folder), rows)
    (batch,) = eval_batches(some, transform=Numbering(), **options)
    assert batch.index.tolist() == [0, 1, 2]
    assert batch.views[0][0, :, 0, 0, 0].round().tolist() == rows.tolist()


def test_what_a_transform_refuses_is_a_bad_sample(folder: Path) -> None:
    with pytest.raises(ShardError, match=r"s-\d+.tar at byte \d+: .*no image for the number 20"):
        list(eval_batches(str(folder), transform=Numbering(), **NORM))

    lost: list[tuple[int, list[Replaced]]] = []
    actual = eval_batches(
        str(folder),
        transform=Numbering(),
        parts=[(19, 20), (20, 21), (21, 30)],
        skip=True,
        lost=lambda number, replaced: lost.append((number, list(replaced))),
        **NORM,
    )
    assert [len(batch) for batch in actual] == [1, 0, 9]
    assert [[one.planned for one in replaced] for _, replaced in lost] == [[], [20], []]


def test_only_the_shards_of_the_ranges_are_expected() -> None:
    order = RangeOrder([(2, 4), (4, 6), (9, 10)])
    assert [order.samples(step).tolist() for step in range(10)] == [
        [],
        [],
        [2],
        [3],
        [4],
        [5],
        [],
        [],
        [],
        [9],
    ]
    with pytest.raises(IndexError):
        order.samples(10)
