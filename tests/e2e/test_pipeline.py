"""A pipeline that is killed in three of its stages ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from kit import pipelines

from scaletrain.pipelines import load
from scaletrain.pipelines.driver import status

TRAINED = ("pretrain", "larger")


def results(work: Path) -> list[dict[str, Any]]:
    listed = json.loads((work / "scores" / "results.json").read_text())
    return [{key: result[key] for key in ("metrics", "step", "digest")} for result in listed]


def steps(run: Path) -> list[int]:
    """Of the lines of its metrics that are whole."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def test_killed_at_three_stages_it_ends_bit_for_bit_the_same(tmp_path: Path) -> None:
    file = pipelines.write(tmp_path)
    words = [f"data={pipelines.shards(tmp_path / 'shards')}"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    pipelines.drive(file, undisturbed, words)

    pretrain, larger = killed / "pretrain", killed / "larger"
    pipelines.kill(file, killed, words, lambda: 3 in steps(pretrain))
    pipelines.kill(file, killed, words, lambda: 2 in steps(larger))
    kept = {name: (killed / name / "checkpoints").stat().st_mtime_ns for name in TRAINED[:1]}
    pipelines.kill(file, killed, words, (killed / ".scores.partial").exists)
    # the first run is finished, and nothing of it is written again
    assert kept == {
        name: (killed / name / "checkpoints").stat().st_mtime_ns for name in TRAINED[:1]
    }
    assert [row[2] for row in status(load.load(file, killed, words))] == [
        "finished, step 6",
        "finished, step 4",
        "finished",
        "ready",
    ]

    said = pipelines.drive(file, killed, words)
    assert [line for line in said if "finished before" in line] == [
        "pretrain: finished before",
        "larger: finished before",
        "labels: finished before",
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
