"""Which training runs count as finished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scaletrain.checkpoint.writer import Writer
from scaletrain.core import Piece
from scaletrain.pipelines import record


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
