"""From shards behind a web server: two ranks train and an evaluation judges, as from the folder
itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from kit.data import write_shards
from kit.remote import serving

from scaletrain.checkpoint import reader
from scaletrain.data.format import index

ROOT = Path(__file__).parents[2]
RECIPE = """
batch: 8
steps: 6
data: {path: PLACE, lanes: 4, window: 2, workers: 1, views: [{size: 16, count: 2}],
  cache: {path: CACHE, bytes: 10_000_000}}
model: {name: resnet18, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 24, dim: 8}
optim: {lr: 0.3, lr_scaling: none, warmup_epochs: 0}
"""


def run(*arguments: str) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_and_evaluation_from_a_web_server(tmp_path: Path) -> None:
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
            run(
                str(ROOT / "launchers" / "local.py"), "--procs", "2", str(recipe), "--run", str(out)
            )
            few = ["--set", "knn.ks=[1,5]", "--set", "features.workers=0"]
            run("-m", "scaletrain", "eval", str(out), "knn", f"--test={place}/test", *few)
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
