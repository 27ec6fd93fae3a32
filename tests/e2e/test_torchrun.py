"""Without SLURM: the torchrun command of docs/guides/cluster.md, as two nodes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from kit import ranks

from scaletrain.checkpoint import reader

ROOT = Path(__file__).parents[2]
RECIPE = """
batch: 8
steps: 4
data: {path: synthetic, synthetic_samples: 32, lanes: 4, workers: 0, views: [{size: 16, count: 2}]}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 24, dim: 8}
optim: {lr: 0.3, lr_scaling: none, warmup_epochs: 0}
engine: {name: ddp, precision: fp64}
"""


def test_two_nodes_train_what_two_processes_train(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
    ]
    agent += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1", "-m", "--"]
    train = ["scaletrain", "train", str(recipe), "--run", str(tmp_path / "nodes")]
    nodes = [subprocess.Popen([*agent, *train], env=environment) for _ in range(2)]
    assert [node.wait(200) for node in nodes] == [0, 0]
    ranks.train(2, recipe, tmp_path / "local")
    here, there = (reader.latest(tmp_path / run / "checkpoints") for run in ("local", "nodes"))
    assert here is not None
    assert there is not None
    assert there.step == 4
    assert there.meta["world"] == 2
    assert all(torch.equal(there.read(name), here.read(name)) for name in here.names())
