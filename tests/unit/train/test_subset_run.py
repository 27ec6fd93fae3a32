"""Runs on a subset: memories of its size, a clustering of all its samples, and what a checkpoint
knows of the files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.data import write_shards
from kit.evals import shards as write_labelled

from scaletrain.checkpoint import reader
from scaletrain.config import load
from scaletrain.config.recipe import ConfigError
from scaletrain.config.schema import Config, DataConfig
from scaletrain.data.loading.sources import open_shards
from scaletrain.data.reading import groups, subset
from scaletrain.data.reading.reader import Shards
from scaletrain.train.loop import train


def recipe(data: dict[str, Any], method: dict[str, Any], **changes: Any) -> Config:
    views = [{"size": 16, "count": 2, "blur": 0.0}]
    return load.build(
        {
            "batch": 10,
            "epochs": 1,
            "threads": 1,
            "data": {"lanes": 5, "workers": 0, "views": views, **data},
            "model": {"name": "resnet18", "width": 0.0625, "stem": "cifar"},
            "method": method,
            "optim": {"warmup_epochs": 0},
            "monitor": {"images_every": 0},
            **changes,
        }
    )


@pytest.mark.parametrize(
    "method",
    [
        {"name": "deepcluster", "classes": 10, "whiten": 4, "iterations": 4},
        {"name": "deepcluster_v2", "hidden": 16, "dim": 8, "clusters": [10]},
    ],
    ids=lambda method: method["name"],
)
def test_a_clustering_assigns_every_sample_of_the_subset(
    method: dict[str, Any], tmp_path: Path
) -> None:
    """100 of 1,000 images. By their numbers among the 1,000, no more than some ten would have a
    place in a memory of 100 rows.
    """
    folder = write_labelled(tmp_path / "train", [n % 10 for n in range(1000)])
    opened = Shards(folder)
    chosen = subset.any_share(1000, 0.1, 0)
    subset.save(tmp_path / "tenth.json", opened, chosen, "a tenth", "samples")
    data = {"path": str(folder), "subset": str(tmp_path / "tenth.json")}
    train(recipe(data, method), tmp_path / "run")

    saved = reader.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.meta["clock"] == {"step": 10, "total": 10, "steps_per_epoch": 10}
    memories = [name for name in saved.names() if name.endswith(".rows")]
    assert "method.assignments.rows" in memories
    for name in memories:
        assert saved.shape(name)[0] == 100
        rows = saved.read(name).view(saved.shape(name))
        filled = rows >= 0 if name == "method.assignments.rows" else rows != 0
        assert filled.any(1).all()


def test_changed_files_are_refused_until_accepted(tmp_path: Path) -> None:
    opened = Shards(write_shards(tmp_path / "train", (20, 20)))
    some, grouped = tmp_path / "some.json", tmp_path / "groups.safetensors"
    data = {"path": str(tmp_path / "train"), "subset": str(some), "groups": str(grouped)}

    def write(step: int, group: int, rule: str = "by hand") -> None:
        subset.save(some, opened, np.arange(0, 40, step), rule)
        used = open_shards(DataConfig(path=data["path"], subset=data["subset"]))
        assert used is not None
        groups.save(grouped, used, np.full(len(used), group), rule)

    def go(steps: int, change: bool = False, **other: str) -> dict[str, Any]:
        method = {"name": "byol", "hidden": 16, "dim": 8}
        config = recipe(data | other, method, steps=steps, checkpoint={"keep_last": 5})
        train(config, tmp_path / "run", change=change)
        saved = reader.latest(tmp_path / "run" / "checkpoints")
        assert saved is not None
        return saved.meta["data"]

    write(2, 0)
    before = go(2)
    assert before["sources"][0]["samples"] == 40
    assert (before["subset"]["path"], before["subset"]["samples"]) == (str(some), 20)
    assert (before["groups"]["path"], before["groups"]["samples"]) == (str(grouped), 20)

    write(2, 0, "the same in other words")
    assert go(2) == before

    write(2, 1)
    with pytest.raises(ConfigError) as refused:
        go(2)
    lines = str(refused.value).splitlines()[1:-1]
    assert len(lines) == 1
    assert f"data.groups: {grouped} (20 samples, sha256 " in lines[0]

    write(1, 1)
    with pytest.raises(ConfigError) as refused:
        go(2)
    lines = str(refused.value).splitlines()[1:-1]
    assert [line.split(":")[0] for line in lines] == ["  data.subset", "  data.groups"]
    assert f"{some} (20 samples, sha256 " in lines[0]
    assert f" -> {some} (40 samples, sha256 " in lines[0]
    assert go(3, change=True)["subset"]["samples"] == 40
    with pytest.raises(ConfigError, match=r"data\.subset"):
        go(3, subset="", groups="")
    assert "subset" not in go(4, change=True, subset="", groups="")
    logged = (tmp_path / "run" / "changes.jsonl").read_text().splitlines()
    assert any(
        "data.subset:" in line and " -> nothing" in line
        for line in json.loads(logged[-1])["changes"]
    )


def test_memories_of_other_samples_are_refused_even_with_change(tmp_path: Path) -> None:
    """Of equally many, every tensor would fit."""
    opened = Shards(write_shards(tmp_path / "train", (20, 20)))
    data = {"path": str(tmp_path / "train"), "subset": str(tmp_path / "some.json")}
    method = {"name": "pirl", "hidden": 16, "dim": 8, "negatives": 4, "patch": 4}

    def go(first: int) -> None:
        subset.save(tmp_path / "some.json", opened, np.arange(first, first + 20), "by hand")
        config = recipe({**data, "views": [{"size": 16, "count": 2}]}, method, steps=2)
        train(config, tmp_path / "run", change=True)

    go(0)
    with pytest.raises(ConfigError, match="keeps an embedding of every sample, and the samples"):
        go(20)
