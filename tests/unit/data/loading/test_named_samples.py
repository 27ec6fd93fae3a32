"""A step that is not finite names the samples as they are found in the data: shard and key."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch
from kit.data import add, encode, picture

from scaletrain.config import load
from scaletrain.config.schema import Config
from scaletrain.core import Batch
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.loading.to_device import ToDevice
from scaletrain.engines.base import TrainingError
from scaletrain.train.loop import train

SHARDS = {
    "birds.tar": ["north/crow", "north/jay", "owl", "wren"],
    "fish.tar": ["carp", "deep/" * 24 + "eel", "pike", "ray"],
}
KEYS = [f"{shard}/{key}" for shard, keys in SHARDS.items() for key in keys]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for shard, keys in SHARDS.items():
        with tarfile.open(folder / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, key in enumerate(keys):
                add(tar, f"{key}.cls", b"0")
                add(tar, f"{key}.png", encode(picture(number)))
    return folder


def config(path: Path | str, **changes: object) -> Config:
    return load.build(
        {
            "batch": 4,
            "steps": 4,
            "data": {
                "path": str(path),
                "lanes": 2,
                "workers": 0,
                "views": [{"size": 16, "count": 2}],
                "synthetic_samples": 8,
            },
            "model": {"name": "resnet10", "width": 0.0625, "stem": "cifar"},
            "method": {"name": "byol", "hidden": 16, "dim": 8},
            "optim": {
                "name": "sgd",
                "lr": 0.1,
                "lr_scaling": "none",
                "warmup_epochs": 0,
                **changes,
            },
            "engine": {"name": "ddp", "max_skipped": 1},
            "monitor": {"every": 1, "images_every": 0},
            "threads": 1,
        }
    )


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """`train` sets the number of threads of this process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("victim", range(len(KEYS)))
def test_a_bad_sample_is_named(
    victim: int,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = ToDevice.__call__

    def poison(self: ToDevice, raw: RawBatch) -> Batch:
        batch = right(self, raw)
        batch.views[0][1, batch.index == victim] = float("nan")
        return batch

    monkeypatch.setattr(ToDevice, "__call__", poison)
    with pytest.raises(TrainingError, match="the samples named above"):
        train(config(shards), tmp_path / "run")
    assert [m.partition("skipped: ")[2] for m in caplog.messages if "skipped" in m] == [
        f"the loss of rank 0 is not finite; samples {KEYS[victim]}"
    ]


def test_all_are_named_when_none_stands_out(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A learning rate that blows up the parameters: the step after the first is the whole
    batch's.
    """
    with pytest.raises(TrainingError):
        train(config(shards, lr=1e30), tmp_path / "run")
    (message,) = [m for m in caplog.messages if "skipped" in m]
    named = message.partition("samples ")[2].split(", ")
    assert len(set(named)) == 4
    assert set(named) <= set(KEYS)


def test_synthetic_samples_have_numbers_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TrainingError):
        train(config("synthetic", lr=1e30), tmp_path / "run")
    (message,) = [m for m in caplog.messages if "skipped" in m]
    assert set(message.partition("samples ")[2].split(", ")) <= set(map(str, range(8)))
