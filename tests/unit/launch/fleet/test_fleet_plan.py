"""What a fleet plans from what is on disk: the steps that are due, kept for the evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kit import evals

from scaletrain.checkpoint import reader
from scaletrain.checkpoint import writer as checkpoint
from scaletrain.core import Piece
from scaletrain.evals.benchmark import Needs
from scaletrain.evals.benchmarks import knn
from scaletrain.evals.encoders import exports, targets
from scaletrain.evals.request import Request
from scaletrain.evals.run import Evaluation
from scaletrain.launch.fleet.plan import Plan, due
from scaletrain.train import status

QUICK = ("features.workers=0",)


@pytest.mark.parametrize(
    ("steps", "every", "expected"),
    [
        ([3, 1, 2], 0, [1, 2, 3]),
        # of each ten epochs of five steps the first, and the last step of all
        ([10, 50, 60, 99, 101, 150, 155], 10, [50, 101, 150, 155]),
        ([50, 155], 10, [50, 155]),
        ([5, 10, 15], 0.2, [5, 10, 15]),
        ([1, 2, 3], 0.2, [1, 2, 3]),
        ([10, 20], 100, []),
        ([], 10, []),
    ],
)
def test_the_first_step_of_each_window_is_due(
    steps: Sequence[int], every: float, expected: list[int]
) -> None:
    assert due(steps, every, 5, 155) == expected
    chosen = due(steps, every, 5, 155)
    # those that were evaluated are enough to choose the same again
    assert due(chosen, every, 5, 155) == chosen


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train = evals.shards(tmp_path / "data" / "train", [i % 6 for i in range(12)])
    evals.shards(tmp_path / "data" / "test", [i % 6 for i in range(6)], seed=1)
    return evals.run_folder(tmp_path, train)


def save(run: Path, step: int, total: int, offset: int = 0) -> None:
    """A step of a run of 2 steps per epoch, whose schedule counts `offset` steps less."""
    state = evals.backbone(evals.settings("x"), seed=step)
    pieces = {
        f"method.backbone.{name}": Piece(t.flatten(), 0, tuple(t.shape))
        for name, t in state.items()
    }
    pieces["optimizer"] = Piece(torch.zeros(2), 0, (2,))
    writer = checkpoint.Writer(run / "checkpoints", keep_last=9, keep_every=0)
    clock = {"step": step - offset, "total": total - offset, "steps_per_epoch": 2}
    writer.save(step, pieces, {"clock": clock})
    writer.close()


def test_cells_are_what_an_evaluation_of_the_step_would_write(run: Path) -> None:
    wanted = Request(("knn", "linear"), overrides=(*QUICK, "linear.epochs=3"))
    plan = Plan(run, [wanted])
    plan.refresh()
    exported = targets.export_of(run, 7)
    alone = Evaluation(run / "checkpoints" / "step-00000007", wanted)
    assert [(cell.step, cell.benchmark, cell.result) for cell in plan.cells] == [
        (7, name, alone.path(name)) for name in ("knn", "linear")
    ]
    # linear trains on views, which no store has
    assert [cell.shares for cell in plan.cells] == [True, False]
    assert plan.cells[0].arguments == (
        "eval", str(exported), "knn", "--encoder", "trained", "--set", "features.workers=0",
    )  # fmt: skip
    assert not targets.held(run, 7).exists()

    before = plan.cells
    save(run, 9, 20)
    # training deletes a step, and begins another one
    reader.delete(run / "checkpoints" / "step-00000007")
    (run / "checkpoints" / "step-00000011").mkdir()
    plan.refresh()
    assert plan.cells[:2] == before
    assert [cell.step for cell in plan.cells] == [7, 7, 9, 9]
    again = Plan(run, [wanted])
    again.refresh()
    assert again.cells == plan.cells
    assert not plan.over
    save(run, 20, 20)
    plan.refresh()
    assert plan.over


def test_a_run_whose_batch_was_changed_is_over_at_its_own_last_step(run: Path) -> None:
    """Its schedule ends at step 20 of another count."""
    plan = Plan(run, [], every=100)
    save(run, 20, 30, offset=10)
    plan.refresh()
    assert not plan.over
    save(run, 30, 30, offset=10)
    plan.refresh()
    assert plan.over


def test_a_step_that_a_killed_fleet_has_only_held_is_not_lost(run: Path) -> None:
    exports.hold(run, 7)
    reader.delete(run / "checkpoints" / "step-00000007")
    plan = Plan(run, [Request(("knn",), overrides=QUICK)])
    plan.refresh()
    assert [(cell.step, cell.problem) for cell in plan.cells] == [(7, "")]
    assert not targets.held(run, 7).exists()


def test_a_step_that_is_saved_again_with_other_weights_is_planned_again(run: Path) -> None:
    plan = Plan(run, [Request(("knn",), overrides=QUICK)])
    plan.refresh()
    shutil.rmtree(run / "checkpoints")
    save(run, 7, 20)
    before = plan.cells
    plan.refresh()
    assert [cell.step for cell in plan.cells] == [7]
    assert plan.cells != before


def test_what_is_not_possible_says_why_and_stops_nothing_else(run: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    said: list[str] = []
    requests = [Request(("knn",), overrides=QUICK), Request(("knn",), test=missing)]
    plan = Plan(run, requests, say=said.append)
    plan.refresh()
    possible, impossible = plan.cells
    assert possible.result
    assert impossible.result is None
    assert missing in impossible.problem

    damaged = run / "checkpoints" / "step-00000009"
    save(run, 9, 20)
    for file in damaged.glob("*.safetensors"):
        file.write_bytes(b"x" * file.stat().st_size)
    plan.refresh()
    assert [cell.step for cell in plan.cells] == [7, 7]
    assert len(said) == 1
    assert said[0].startswith("run step 9: ")


def test_a_step_is_kept_whole_for_those_that_need_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "needs", lambda *_: Needs(("test",), network=True))
    plan = Plan(run, [Request(("knn",), overrides=QUICK)])
    plan.refresh()
    assert [(cell.step, cell.network, cell.problem) for cell in plan.cells] == [(7, True, "")]
    reader.delete(run / "checkpoints" / "step-00000007")
    assert reader.open_step(targets.held(run, 7)).step == 7
    plan.release(lambda cell: False)
    assert targets.held(run, 7).exists()
    plan.release(lambda cell: True)
    assert not targets.held(run, 7).exists()


def test_a_status_that_cannot_be_read_ends_no_fleet(run: Path) -> None:
    assert Plan(run, []).training() == ""
    (run / status.FILE).mkdir()
    assert Plan(run, []).training() == ""


def test_nothing_is_exported_where_nothing_is_asked_for(run: Path) -> None:
    plan = Plan(run, [])
    plan.refresh()
    assert plan.cells == []
    assert not (run / "evals").exists()
    assert Plan(run.parent / "not begun", [Request(("knn",))]).cells == []
