"""Which training runs count as finished."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from kit import pipelines

from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece
from scaletrain.pipelines import load, record

SOURCES = """
options: {source: null}
stages:
- {name: tuned, train: recipe.yaml, set: {method.source: "${source}"}}
- {name: started, train: recipe.yaml, init: "${source}"}
- {name: continued, train: recipe.yaml, continue: "${source}/checkpoints/step-00000006"}
"""


@pytest.mark.parametrize(
    ("step", "meta", "finished"),
    [
        (6, {"finished": True}, True),
        (6, {"finished": False}, False),  # the work of Method.on_end is still to be done
        (6, {}, True),  # of an earlier version
        (5, {"finished": False}, False),
    ],
)
def test_a_run_is_finished_with_the_work_after_its_last_step(
    step: int, meta: dict[str, bool], finished: bool, tmp_path: Path
) -> None:
    writer = Writer(tmp_path / "checkpoints")
    clock = {"step": step, "total": 6, "steps_per_epoch": 6}
    writer.save(step, {"x": Piece(torch.zeros(1), 0, (1,))}, {"clock": clock, **meta})
    writer.close()
    found = record.newest(tmp_path)
    assert found is not None
    assert (found.step, found.last) == (step, finished)


def test_a_run_or_step_of_another_place_is_identified_by_its_checkpoint(tmp_path: Path) -> None:
    file = pipelines.write(tmp_path, SOURCES)
    stages = load.load(file, tmp_path / "work", [f"source={tmp_path / 'run'}"]).stages
    records = []
    for value in (1.0, 2.0):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        writer = Writer(tmp_path / "run" / "checkpoints")
        clock = {"step": 6, "total": 6, "steps_per_epoch": 6}
        writer.save(6, {"x": Piece(torch.full((1,), value), 0, (1,))}, {"clock": clock})
        writer.close()
        records.append([record.present(stage, tmp_path / "work", {}) for stage in stages])

    step = "run/checkpoints/step-00000006"
    for before, now, path in zip(*records, ("run", "run", step), strict=True):
        assert record.differences(before, before) == ([], [])
        assert record.differences(before, now)[1] == [f"{tmp_path / path} has changed since"]
