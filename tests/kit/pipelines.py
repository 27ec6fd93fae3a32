"""Pipelines in miniature: a recipe, shards, and drivers that are killed."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kit import evals
from scaletrain.checkpoint import reader
from scaletrain.pipelines import load
from scaletrain.pipelines.driver import Driver

RECIPE = """
batch: 8
steps: 6
data: {lanes: 4, window: 2, workers: 0,
  views: [{size: 16, count: 2, blur: 0.0, jitter: 0.0, grayscale: 0.0}]}
model: {name: resnet10, width: 0.0625, stem: cifar}
method: {name: byol, hidden: 24, dim: 8}
optim: {lr: 0.3, lr_scaling: none, warmup_epochs: 0, trust_coefficient: 0.02}
engine: {name: ddp, precision: fp64}
checkpoint: {every_steps: 2, keep_last: 20}
monitor: {every: 1, images_every: 0}
"""


def write(folder: Path, pipeline: str) -> Path:
    """The file of a pipeline with the recipe that it trains."""
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "pipeline.yaml").write_text(pipeline)
    return folder / "pipeline.yaml"


def shards(folder: Path) -> Path:
    """Labelled shards of 32 images to train on, with a test set next to them."""
    evals.shards(folder / "test", [n % 2 for n in range(8)], seed=1)
    return evals.shards(folder / "train", [n % 2 for n in range(32)])


def drive(file: Path, work: Path, words: Sequence[str] = (), **options: Any) -> list[str]:
    """Run a pipeline in this process; what it says."""
    said: list[str] = []
    Driver(load.load(file, work, words), say=said.append).run(**options)
    return said


def kill(file: Path, work: Path, words: Sequence[str], when: Callable[[], object]) -> None:
    """Run a pipeline in another process, and kill that as soon as `when` is true."""
    multiprocessing.set_forkserver_preload(["scaletrain.train.loop", "torch._dynamo"])
    process = multiprocessing.get_context("forkserver").Process(
        target=_quietly, args=(file, work, words)
    )
    process.start()
    limit = time.monotonic() + 120
    while not when():
        assert process.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.002)

    process.kill()
    process.join()
    assert process.exitcode == -9


def _quietly(file: Path, work: Path, words: Sequence[str]) -> None:
    torch.set_num_threads(1)
    drive(file, work, words)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Those of the newest checkpoint of a run."""
    saved = reader.latest(run / "checkpoints")
    assert saved is not None
    return {name: saved.read(name) for name in saved.names()}
