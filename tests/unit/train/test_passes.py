"""The pass over all samples before an epoch: which images a method that clusters is shown."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from kit.data import write_shards
from torch import Tensor

from scaletrain.config import load, schema
from scaletrain.core import Batch
from scaletrain.data.loading.loader import Stream, open_stream
from scaletrain.train.loop import train
from scaletrain.train.session import whole_images

VIEWS = [
    {
        "size": 16,
        "count": 2,
        "scale": [0.1, 0.3],
        "grayscale": 1.0,
        "solarize": 1.0,
        "interpolation": "bilinear",
    }
]


def recipe(folder: Path, method: dict[str, object]) -> schema.Config:
    return load.build(
        {
            "batch": 12,
            "epochs": 2,
            "threads": 1,
            "data": {"path": str(folder), "lanes": 4, "window": 2, "workers": 0, "views": VIEWS},
            "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar"},
            "method": method,
            "optim": {"warmup_epochs": 0},
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("passes") / "shards", (30, 18))


def first(data: schema.DataConfig) -> tuple[Stream, Batch]:
    stream = open_stream(data, seed=0, batch=12, rank=0, world=1, device=torch.device("cpu"))
    batch = next(iter(stream.batches(0, 1)))
    stream.close()
    return stream, batch


def test_whole_images_are_the_same_samples_undistorted(folder: Path) -> None:
    data = recipe(folder, {"name": "byol"}).data
    (training, drawn), (passing, whole) = first(data), first(whole_images(data))
    assert training.steps_per_epoch == passing.steps_per_epoch == 4
    assert torch.equal(drawn.index, whole.index)
    assert drawn.views[0].shape == (2, 12, 3, 16, 16)
    assert whole.views[0].shape == (1, 12, 3, 16, 16)
    again = first(
        whole_images(
            data.model_copy(
                update={"views": (data.views[0].model_copy(update={"scale": (0.5, 1.0)}),)}
            )
        )
    )[1]
    assert torch.equal(whole.views[0], again.views[0])  # nothing is left to chance
    colours = whole.views[0].std(2).mean()
    assert colours > 4 * drawn.views[0].std(2).mean()  # of which training here shows none


@pytest.mark.parametrize(
    ("name", "count", "options"),
    [("pcl", 1, {"queue": 24, "warmup_epochs": 0}), ("deepcluster_v2", 2, {})],
)
def test_a_method_that_wants_whole_images_gets_them(
    name: str,
    count: int,
    options: dict[str, object],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    model = importlib.import_module(f"scaletrain.methods.{name}").Model
    right = model._embed

    def embed(self: object, batch: Batch) -> Tensor:
        seen.append(tuple(batch.views[0].shape))
        return right(self, batch)  # type: ignore[no-any-return]

    monkeypatch.setattr(model, "_embed", embed)
    train(
        recipe(folder, {"name": name, "hidden": 16, "dim": 8, "clusters": [4, 5], **options}),
        tmp_path / "run",
    )
    assert set(seen) == {(count, 12, 3, 16, 16)}
