"""Evaluations in TensorBoard: one file for each curve, with each result once and at its step."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from kit.evals import write_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scaletrain.launch.fleet.curves import Curves


def drawn(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of `linear`, by the folder of the curve."""
    actual = {}
    for folder in (run / "tensorboard" / "evals").iterdir():
        board = EventAccumulator(str(folder))
        board.Reload()
        assert board.Tensors("eval/protocol/text_summary")
        actual[folder.name] = [
            (event.step, round(event.value, 3)) for event in board.Scalars("eval/linear")
        ]
    return actual


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").rglob("*tfevents*"))


def result(run: Path, step: int, value: float, **changes: object) -> Path:
    return write_result(run, step, {"linear": value, "linear_per_class": value}, **changes)


def test_a_late_result_is_at_its_step_and_none_is_there_twice(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    curves.refresh()
    for step, value in ((20, 2.0), (40, 4.0), (30, 3.0)):
        result(tmp_path, step, value)
        curves.refresh()
        before = files(tmp_path)
        Curves(tmp_path).refresh()
        assert files(tmp_path) == before
        assert len(before) == 1

    (points,) = drawn(tmp_path).values()
    assert points == [(20, 2.0), (30, 3.0), (40, 4.0)]


def test_protocols_and_baselines_are_curves_of_their_own(tmp_path: Path) -> None:
    result(tmp_path, 20, 2.0)
    result(tmp_path, 20, 3.0, linear={"epochs": 9})
    result(tmp_path, 0, 1.0, encoder="untrained")
    Curves(tmp_path).refresh()
    actual = drawn(tmp_path)
    assert sorted(points for points in actual.values()) == [[(0, 1.0)], [(20, 2.0)], [(20, 3.0)]]
    assert [
        name.endswith("-untrained") for name, points in actual.items() if points[0][0] == 0
    ] == [True]


def test_what_a_killed_writer_or_another_version_left_is_replaced(tmp_path: Path) -> None:
    result(tmp_path, 20, 2.0)
    Curves(tmp_path).refresh()
    (first,) = files(tmp_path)
    result(tmp_path, 30, 3.0)
    # killed after the new file was written, before the old one was deleted
    Curves(tmp_path).refresh()
    (second,) = files(tmp_path)
    assert second.name > first.name
    first.write_bytes(second.read_bytes())
    (first.parent / "events.out.tfevents.1700000000.host.1.0.abc").write_bytes(b"")
    (tmp_path / "evals" / ".curve-left").mkdir()
    Curves(tmp_path).refresh()
    (points,) = drawn(tmp_path).values()
    assert points == [(20, 2.0), (30, 3.0)]
    assert len(files(tmp_path)) == 1
    assert not (tmp_path / "evals" / ".curve-left").exists()

    for path in (tmp_path / "evals").glob("*.json"):
        path.unlink()
    Curves(tmp_path).refresh()
    assert files(tmp_path) == []


def test_a_board_that_cannot_be_written_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(tmp_path, 20, 2.0)
    (tmp_path / "tensorboard").write_text("in the way")
    curves = Curves(tmp_path)
    curves.refresh()
    curves.refresh()
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_files_have_the_access_of_others(tmp_path: Path) -> None:
    result(tmp_path, 20, 2.0)
    Curves(tmp_path).refresh()
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
        next((tmp_path / "evals").glob("*.json")).stat().st_mode
    )
