"""Shards behind a web server: two ranks train and an evaluation gives the same results as from the
folder itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from kit import ranks
from kit.data import write_shards
from kit.remote import serving
from typer.testing import CliRunner

from scaletrain.checkpoint import reader
from scaletrain.cli import main as cli
from scaletrain.data.format import index

RECIPE = """
batch: 8
steps: 6
data: {path: PLACE, lanes: 4, window: 2, workers: 1, views: [{size: 16, count: 2}],
  cache: {path: CACHE, bytes: 10_000_000}}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 24, dim: 8}
optim: {lr: 0.3, lr_scaling: none, warmup_epochs: 0}
"""


def evaluate(run: Path, test: str) -> None:
    """In this process, whose imports are done."""
    few = ["--set", "knn.ks=[1,5]", "--set", "features.workers=0"]
    done = CliRunner().invoke(cli.app, ["eval", str(run), "knn", f"--test={test}", *few])
    assert done.exit_code == 0, done.output


def test_training_and_evaluation_from_a_web_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    made = {
        name: write_shards(tmp_path / "data" / name, (11, 3, 20, 14)) for name in ("train", "test")
    }
    for folder in made.values():
        index.build(folder)
    results = []
    with serving(tmp_path / "data") as server:
        for kind, place in (("folder", str(tmp_path / "data")), ("web", server.url)):
            recipe, out = tmp_path / f"{kind}.yaml", tmp_path / kind
            recipe.write_text(
                RECIPE.replace("PLACE", f"{place}/train").replace("CACHE", str(tmp_path / "cache"))
            )
            ranks.train(2, recipe, out)
            evaluate(out, f"{place}/test")
            (result,) = (out / "evals").glob("*.json")
            results.append(json.loads(result.read_text()))
        assert server.asked["train/s-001.tar"] == 1  # by two ranks and the evaluation
    here, there = (reader.latest(tmp_path / kind / "checkpoints") for kind in ("folder", "web"))
    assert here is not None
    assert there is not None
    assert there.step == 6
    assert all(torch.equal(there.read(name), here.read(name)) for name in here.names())
    local, remote = results
    assert remote["metrics"] == local["metrics"]
    assert remote["data"]["train"] == local["data"]["train"] | {"path": f"{server.url}/train"}
