"""Records and curves that cannot be written never end a run, and are complete again once they can
be.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from scaletrain.runtime.durable import Records, drop_records, replacing, write
from scaletrain.train.tensorboard_writer import Board


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_file_is_replaced_in_full_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, "old", mode=0o604)
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("old", 0o604)

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            assert path.read_text() == "old"
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert path.read_text() == "old"
    write(path, b"new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_records_wait_until_they_can_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    records = Records(path)
    records.add({"step": 0})
    kept = path.rename(tmp_path / "kept")
    path.mkdir()  # nothing can be appended to a folder
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            records.add({"step": step})
    assert [r.getMessage() for r in caplog.records] == [
        f"{path} cannot be written (Is a directory); the run continues and will try again"
    ]
    path.rmdir()
    kept.rename(path)
    records.add({"step": 3})
    assert steps(path) == [0, 1, 2, 3]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        records = Records(path)
        for step in range(3):
            records.add({"step": step, "text": "x" * 50})  # the second line does not fit
        written = path.read_text().count("\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        records.add({"step": 3})
        os._exit(written)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert steps(path) == [0, 1, 2, 3]


def test_damaged_lines_are_dropped_and_the_rest_is_kept_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.jsonl"
    starts = b'{"start": {"step": 7}}\n'
    good = [b'{"step": 0}\n' + starts, '{"step": 1, "fault": "\u00e9"}\n'.encode()]
    path.write_bytes(good[0] + b'\xff\xfe{"step": 1}\n7\n' + good[1] + b'{"step": 5}\n{"step": 1')
    drop_records(path, 3)
    assert path.read_bytes() == b"".join(good)
    before = path.stat().st_ino
    drop_records(path, 3)
    assert path.stat().st_ino == before  # nothing to do, nothing written
    drop_records(tmp_path / "none.jsonl", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["rank-0.jsonl"]


def test_tensorboard_goes_on_after_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a warning once, and without the traceback of its thread, which would end a test here."""
    folder = tmp_path / "tensorboard"
    board = Board(folder, 0)
    board.scalar("x", 0.0, 0)
    board.flush()
    shutil.rmtree(folder)
    folder.touch()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            board.scalar("x", 1.0, step)
            board.text("note", "y", step)
            board.flush()
    assert len([r for r in caplog.records if "the run continues" in r.getMessage()]) == 1
    folder.unlink()
    board.flush()
    board.scalar("x", 4.0, 4)
    board.flush()
    board.close()
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("x")] == [4]
