"""The reader of metrics.jsonl: it sees whole lines only, reads what is new, and is right after the
file was replaced.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from scaletrain.config.recipe import ConfigError
from scaletrain.runtime.durable import drop_records
from scaletrain.train import records

START = {
    "step": 0,
    "time": 1.5,
    "world": 2,
    "devices": {"cpu": 2},
    "host": "a",
    "hosts": ["a"],
    "job": "7",
    "versions": {"torch": "2"},
    "git": "abc",
}


def line(step: int, **scalars: Any) -> bytes:
    return json.dumps({"step": step, **scalars}).encode() + b"\n"


def start(step: int) -> bytes:
    return json.dumps({"start": {**START, "step": step}}).encode() + b"\n"


def append(run: Path, data: bytes) -> None:
    with (run / records.FILE).open("ab") as file:
        file.write(data)


def steps(metrics: records.Metrics) -> list[int]:
    metrics.refresh()
    return [record.step for record in metrics.steps]


def test_lines_are_read_once_and_when_they_are_whole(tmp_path: Path) -> None:
    metrics = records.Metrics(tmp_path)
    assert steps(metrics) == []
    append(tmp_path, start(0) + line(0, **{"train/loss": 3.5, "grad_norm": None}) + line(1)[:5])
    assert steps(metrics) == [0]
    first = metrics.steps[0]
    assert first.scalars == {"train/loss": 3.5, "grad_norm": None}
    append(tmp_path, line(1)[5:])
    assert steps(metrics) == [0, 1]
    assert metrics.steps[0] is first
    (begun,) = metrics.starts
    assert (begun.world, begun.devices, begun.hosts, begun.job) == (2, {"cpu": 2}, ("a",), "7")
    (tmp_path / records.FILE).unlink()
    assert steps(metrics) == []


def test_a_resume_drops_its_steps_and_no_start(tmp_path: Path) -> None:
    metrics = records.Metrics(tmp_path)
    append(tmp_path, start(0) + b"".join(map(line, range(6))))
    assert steps(metrics) == [0, 1, 2, 3, 4, 5]
    drop_records(tmp_path / records.FILE, 4)
    append(tmp_path, start(4) + b"".join(line(step, again=1.0) for step in (4, 5, 6)))
    assert steps(metrics) == [0, 1, 2, 3, 4, 5, 6]
    assert [record.scalars for record in metrics.steps[3:5]] == [{}, {"again": 1.0}]
    assert [begun.step for begun in metrics.starts] == [0, 4]


def test_whatever_becomes_of_the_file_an_old_reader_sees_what_a_new_one_sees(
    tmp_path: Path,
) -> None:
    """Also where its inode number is used again and where it is written in place."""
    draw, path = random.Random(0), tmp_path / records.FILE
    metrics, at = records.Metrics(tmp_path), 0

    for turn in range(400):
        match draw.randrange(6):
            case 0:
                at = draw.randrange(at + 1)
                drop_records(path, at)
                append(tmp_path, start(at))
            case 1:
                append(tmp_path, line(at, time=turn)[: draw.randrange(1, 9)])
                metrics.refresh()
                # taken back, as on a full disk
                whole = path.read_bytes().rpartition(b"\n")
                os.truncate(path, len(whole[0] + whole[1]))
            case 2 if path.exists():
                kept = path.read_bytes().splitlines(keepends=True)[: draw.randrange(4)]
                path.write_bytes(b"".join(kept) + line(at, time=turn))
            case _:
                append(tmp_path, line(at, time=turn))
                at += 1

        if draw.random() < 0.6:
            metrics.refresh()
            fresh = records.read(tmp_path)
            assert (metrics.steps, metrics.starts) == (fresh.steps, fresh.starts)


def test_damage_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    append(tmp_path, line(0) + b"{}\n" + b'{"start": {"step": 1}}\n' + b'{"step": 1, "x": "y"}\n')
    append(tmp_path, line(2))
    metrics = records.Metrics(tmp_path)
    assert steps(metrics) == [0, 2]
    assert metrics.starts == []
    assert len(metrics.damaged) == 3
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 2, is not a record of a run"):
        metrics.check()
    drop_records(tmp_path / records.FILE, 9)
    metrics.refresh()
    assert len(metrics.damaged) == 2


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / records.FILE)
    with pytest.raises(OSError, match="a pipe and not a file"):
        records.read(tmp_path)
