"""Pretraining by rotation, fine-tuning on a part of the labels, evaluation: killed in three of its
stages, it ends as an undisturbed one, bit for bit.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import pipelines, ranks

from scaletrain.pipelines import load
from scaletrain.pipelines.driver import Driver, status
from scaletrain.train import records

FILE = load.find("rotation_finetune_cifar10")
TRAINED = ("pretrain", "finetune")
SMALL = (
    "batch=8",
    "steps=6",
    "data.lanes=4",
    "data.workers=0",
    "data.views.0.size=16",
    "model.width=0.0625",
    "engine.precision=fp64",
    "checkpoint.every_steps=2",
    "checkpoint.keep_last=20",
    "monitor={every: 1, images_every: 0}",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, and all stages in `undisturbed`."""
    folder = tmp_path_factory.mktemp("place")
    pipelines.shards(folder / "shards")
    pipelines.drive(FILE, folder / "undisturbed", words(folder))
    return folder


def words(place: Path) -> list[str]:
    small = [f"{stage}.{change}" for stage in TRAINED for change in SMALL]
    return [f"data={place / 'shards' / 'train'}", "share=50", *small]


def results(work: Path) -> list[dict[str, Any]]:
    listed = json.loads((work / "scores" / "results.json").read_text())
    return [{key: result[key] for key in ("metrics", "step")} for result in listed]


def steps(run: Path) -> list[int]:
    return [record.step for record in records.read(run).steps]


def test_killed_at_three_stages_it_ends_bit_for_bit_the_same(place: Path) -> None:
    given = words(place)
    undisturbed, killed = place / "undisturbed", place / "killed"
    pretrain, finetune = killed / "pretrain", killed / "finetune"
    pipelines.kill(FILE, killed, given, lambda: 3 in steps(pretrain))
    pipelines.kill(FILE, killed, given, lambda: 2 in steps(finetune))
    kept = (pretrain / "checkpoints").stat().st_mtime_ns
    pipelines.kill(FILE, killed, given, (killed / ".scores.partial").exists)
    # the first run is finished, and nothing of it is written again
    assert (pretrain / "checkpoints").stat().st_mtime_ns == kept
    assert [row[2] for row in status(load.load(FILE, killed, given))] == [
        "finished, step 6",
        "finished",
        "finished, step 6",
        "ready",
    ]

    said = pipelines.drive(FILE, killed, given)
    assert [line for line in said if "finished before" in line] == [
        "pretrain: finished before",
        "labels: finished before",
        "finetune: finished before",
    ]
    for name in TRAINED:
        expected, got = (pipelines.tensors(work / name) for work in (undisturbed, killed))
        assert expected.keys() == got.keys()
        assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())
        assert steps(undisturbed / name) == steps(killed / name)
    labels = [(work / "labels" / "subset.json").read_bytes() for work in (undisturbed, killed)]
    assert labels[0] == labels[1]
    assert results(undisturbed) == results(killed)
    assert not list(killed.glob(".*.partial"))


def test_the_processes_of_a_job_run_one_stage(place: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    for name in ("pretrain", "labels"):
        shutil.copytree(place / "undisturbed" / name, work / name)
    (tmp_path / "ranks").mkdir()
    lines = ranks.run(2, _finetune, tmp_path / "ranks", place, work)
    # the first one speaks
    assert [rank["lines"].item() for rank in lines] == [2, 0]
    got = pipelines.tensors(work / "finetune")
    for name, tensor in pipelines.tensors(place / "undisturbed" / "finetune").items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-8, atol=1e-10, msg=name)


def _finetune(place: Path, work: Path) -> dict[str, torch.Tensor]:
    said: list[str] = []
    Driver(load.load(FILE, work, words(place)), say=said.append).run_one("finetune")
    return {"lines": torch.tensor(len(said))}
