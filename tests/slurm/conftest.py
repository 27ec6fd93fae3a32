"""The cluster and what its jobs train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from kit import importing, ranks
from kit.slurm_cluster import Cluster
from kit.slurm_jobs import RECIPE, ROOT, tensors


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        running.env |= {"PYTHONPATH": str(ROOT)}
        yield running
        leftover = running.processes
    assert not leftover()


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose data are shards of 96 made-up images."""
    folder = tmp_path_factory.mktemp("work with spaces")
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(96):
        cv2.imwrite(
            str(folder / "images" / f"{i:03d}.png"),
            draw.integers(0, 256, (20, 20, 3), dtype=np.uint8),
        )
    importing.run("folder", folder / "images", folder / "shards", "--per-shard", 16)
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.replace("data: {", f"data: {{path: '{folder / 'shards'}', "))
    return path


@pytest.fixture(scope="session")
def undisturbed(recipe: Path) -> dict[str, torch.Tensor]:
    """What as many processes train without SLURM."""
    run = recipe.parent / "undisturbed"
    ranks.train(2, recipe, run)
    return tensors(run)
