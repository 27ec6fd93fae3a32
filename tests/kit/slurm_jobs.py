"""Small training jobs on the cluster of cluster.py."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kit.slurm_cluster import Cluster, missing
from scaletrain.checkpoint import reader
from scaletrain.train import records

ROOT = Path(__file__).parents[2]
STEPS = 40
CRASHED = r"exit code \d+ after saving step (\d+), requeued.*resumed from step \1;"
RECIPE = f"""
batch: 12
steps: {STEPS}
data: {{lanes: 4, window: 2, workers: 1,
  views: [{{size: 16, count: 2, blur: 0.0}}, {{size: 8, count: 1, blur: 0.0}}]}}
model: {{name: resnet10, width: 0.0625, stem: cifar}}
method: {{name: relicv2, hidden: 24, dim: 8, negatives: 3, tau: 0.9}}
optim: {{lr: 0.3, lr_scaling: none, warmup_epochs: 1, trust_coefficient: 0.02}}
engine: {{name: ddp, precision: fp64}}
checkpoint: {{every_steps: 6, keep_last: 2}}
monitor: {{every: 1, images_every: 0}}
"""
SHORT = ("steps=2", "optim.warmup_epochs=0")
unavailable = pytest.mark.skipif(
    bool(missing()), reason=f"SLURM IS NOT TESTED: {', '.join(missing())} not installed"
)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert saved.step == STEPS
    return {name: saved.read(name) for name in saved.names()}


def launch(
    cluster: Cluster, recipe: Path, run: Path, *options: str, code: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "launchers" / "slurm.py"),
        "--config",
        str(recipe),
        "--run",
        str(run),
    ]
    done = subprocess.run(
        [*command, *options],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def start(cluster: Cluster, recipe: Path, run: Path, *options: str) -> str:
    """The id of a job of two processes on two nodes."""
    done = launch(cluster, recipe, run, "--nodes", "2", "--cpus-per-task", "1", *options)
    found = re.search(r"job (\d+)", done.stdout)
    assert found
    return found[1]


def steps(run: Path) -> int:
    return len(records.read(run).steps)


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def log(run: Path) -> str:
    return "".join(path.read_text() for path in sorted((run / "launches").glob("*/*_0_log.*")))
