"""kill -9 in mid-epoch, resume: everything equals the uninterrupted run, bit for bit at the same
world size.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from kit import importing, ranks, small

from scaletrain.checkpoint import reader
from scaletrain.train import records

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

RECIPE = """
batch: 12
epochs: 3
data:
  lanes: 4
  window: 2
  workers: 1
  views: [{size: 16, count: 2, blur: 0.0}, {size: 8, count: 1, blur: 0.0}]
model: {name: resnet10, width: 0.0625, stem: cifar}
optim: {lr: 0.3, lr_scaling: none, warmup_epochs: 1, trust_coefficient: 0.02}
engine: {name: ddp, precision: fp64}
checkpoint: {every_steps: 3, keep_last: 20}
monitor: {every: 1, images_every: 0}
"""
METHODS = {  # between them: moving averages, a queue, a sharded memory, clusterings, masks' keys
    "swav": "method: {name: swav, hidden: 24, dim: 8, prototypes: 6, queue: 24, queue_epoch: 0, "
    "freeze_steps: 2}",
    "deepcluster_v2": "method: {name: deepcluster_v2, hidden: 24, dim: 8, clusters: [5, 4], "
    "iterations: 4}",
    "relicv2": "method: {name: relicv2, hidden: 24, dim: 8, negatives: 3, tau: 0.9}",
}

# started by the launcher; the ranks of the others are started without its imports
LAUNCHED = "swav"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for i in range(96):
        where = folder / f"class{i % 3}"
        where.mkdir(exist_ok=True)
        cv2.imwrite(str(where / f"{i:03d}.png"), draw.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    out = tmp_path_factory.mktemp("shards") / "train"
    importing.run("folder", folder, out, "--per-shard", 16)
    return out


def start(recipe: Path, run: Path, world: int, *overrides: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        str(ROOT / "launchers" / "local.py"),
        "--procs",
        str(world),
        str(recipe),
        *overrides,
    ]
    return subprocess.Popen([*command, "--run", str(run)], env=ENVIRONMENT, start_new_session=True)


def resumed(run: Path, before: list[dict[str, float]]) -> int:
    """The step that the last start went on from: what was recorded before it is untouched, times
    included.
    """
    kept = sum(a == b for a, b in zip(before, metrics(run), strict=False))
    assert kept > 0, "it began anew"
    return kept


def wait_for(run: Path, step: int) -> None:
    """Until metrics of `step` are written."""
    deadline = time.monotonic() + 120
    while not any(m["step"] >= step for m in metrics(run)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metrics(run: Path) -> list[dict[str, float]]:
    return [record.model_dump() for record in records.read(run).steps]


def losses(run: Path) -> list[float]:
    return [m["train/loss"] for m in metrics(run) if "train/loss" in m]


def final(run: Path) -> dict[str, torch.Tensor]:
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    assert saved.step == 24
    return {name: saved.read(name) for name in saved.names()}


def test_every_method_that_is_resumed_in_every_way_is_here() -> None:
    assert set(METHODS) == set(small.RESUMED)


# with three ranks, the order in which DDP adds them up shows as well
@pytest.mark.parametrize(("method", "world"), [("swav", 2), ("deepcluster_v2", 2), ("relicv2", 3)])
def test_killed_and_resumed_equals_undisturbed(
    method: str, world: int, shards: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{RECIPE}\n{METHODS[method]}\n")
    data = f"data.path={shards}"
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    ranks.train(world, recipe, undisturbed, data)
    # epochs have 8 steps, checkpoints come every 3: mid-epoch, off a checkpoint
    if method == LAUNCHED:
        process = start(recipe, killed, world, data)
        wait_for(killed, 13)
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    else:
        with ranks.training(world, recipe, killed, data):
            wait_for(killed, 13)
    before = metrics(killed)
    if method == LAUNCHED:
        assert start(recipe, killed, world, data).wait(timeout=240) == 0
    else:
        ranks.train(world, recipe, killed, data)
    assert resumed(killed, before) in (9, 12, 15)
    assert len(losses(undisturbed)) == 24
    assert losses(undisturbed) == losses(killed)
    expected, got = final(undisturbed), final(killed)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    if method == "deepcluster_v2":
        assert any("banks" in name for name in expected)


def test_another_world_size_at_every_resume(shards: Path, tmp_path: Path) -> None:
    """2 -> 1 -> 3 ranks, killed in between, against one process all the way: equal to float64
    rounding.
    """
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{RECIPE}\n{METHODS['deepcluster_v2']}\n")
    data = f"data.path={shards}"
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    ranks.train(1, recipe, undisturbed, data)
    for world, step in ((2, 7), (1, 13)):
        with ranks.training(world, recipe, moved, data):
            wait_for(moved, step)
    before = metrics(moved)
    ranks.train(3, recipe, moved, data)
    assert resumed(moved, before) >= 9
    assert losses(moved) == pytest.approx(losses(undisturbed), rel=1e-10)
    expected, got = final(undisturbed), final(moved)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-8, atol=1e-10, msg=name)
