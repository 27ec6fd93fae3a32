"""RUN/status.json and whether a run is alive."""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kit import pipelines

from scaletrain.config import load
from scaletrain.methods import byol
from scaletrain.runtime import locks
from scaletrain.runtime.signals import Stopped
from scaletrain.train import records, run_folder, status
from scaletrain.train.loop import train
from scaletrain.train.status import Status, StatusFile

SYNTHETIC = ("data.path=synthetic", "data.synthetic_samples=16", "steps=4")


def run(folder: Path, *overrides: str) -> Path:
    (folder / "recipe.yaml").write_text(pipelines.RECIPE)
    train(load.load(folder / "recipe.yaml", [*SYNTHETIC, *overrides]), folder / "run")
    return folder / "run"


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    def hook(self: Any, clock: Any, write: Any) -> None:
        if clock.step == step:
            act()

    monkeypatch.setattr(byol.Model, "after_step", hook)


def test_a_run_says_how_far_it_is_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    seen: list[Status | None] = []

    def fail() -> None:
        seen.append(status.read(tmp_path / "run"))
        raise MemoryError

    def states() -> list[tuple[str, int, int]]:
        return [(s.state, s.step, s.total) for s in (*seen, status.read(tmp_path / "run")) if s]

    before = time.time()
    at_step(monkeypatch, 3, fail)
    with pytest.raises(MemoryError):
        run(tmp_path)
    assert states() == [("running", 3, 4), ("failed", 3, 4)]
    last = status.read(tmp_path / "run")
    assert last is not None
    assert (last.job, last.host) == ("12", platform.node())
    assert before < last.time < time.time()

    # from the checkpoint of step 2
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run(tmp_path)
    assert states()[-1] == ("stopped", 3, 4)
    monkeypatch.undo()
    run(tmp_path)
    assert states()[-1] == ("finished", 4, 4)
    assert not list((tmp_path / "run").glob(".status*"))

    starts = records.read(tmp_path / "run").starts
    assert [(s.step, s.world, s.devices, s.job) for s in starts] == [
        (0, 1, {"cpu": 1}, "12"),
        (2, 1, {"cpu": 1}, "12"),
        (3, 1, {"cpu": 1}, ""),
    ]
    assert {"python", "torch", "scaletrain"} <= starts[0].versions.keys()


def test_a_status_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / status.FILE).mkdir()
    file = StatusFile(tmp_path, 9)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            file.write("running", step)
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / status.FILE} cannot be written (Is a directory); the run continues and will "
        "try again"
    ]
    (tmp_path / status.FILE).rmdir()
    file.write("running", 3)
    now = status.read(tmp_path)
    assert now is not None
    assert now.step == 3


def test_no_status_and_a_damaged_one_are_none(tmp_path: Path) -> None:
    assert status.read(tmp_path) is None
    for text in ("", "{}", '{"state": "running"', "\0" * 200):
        (tmp_path / status.FILE).write_text(text)
        assert status.read(tmp_path) is None


@contextmanager
def claimed(run: Path) -> Iterator[int]:
    """Another process, by its id, that has locked the run folder as training does."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        file = os.open(run / run_folder.LOCK, os.O_RDWR | os.O_CREAT)
        os.write(writes, b"1" if locks.acquire(file, wait=False, of_process=True) else b"0")
        time.sleep(60)
        os._exit(1)
    try:
        assert os.read(reads, 1) == b"1"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_alive_is_who_holds_the_lock_whatever_the_status_says(tmp_path: Path) -> None:
    assert not status.alive(tmp_path)
    StatusFile(tmp_path, 9).write("running", 3)
    with claimed(tmp_path):
        assert status.alive(tmp_path)
        # to ask does not take the lock away
        assert status.alive(tmp_path)
    # killed: nothing could be written
    now = status.read(tmp_path)
    assert now is not None
    assert now.state == "running"
    assert not status.alive(tmp_path)


def test_without_locks_it_is_who_renews_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(path: Path) -> bool:
        raise OSError("no locks available")

    monkeypatch.setattr(locks, "taken", none)
    monkeypatch.setattr(run_folder, "BEAT", 0.04)
    assert not status.alive(tmp_path)
    (tmp_path / run_folder.LEASE).write_text("of a killed process")
    assert not status.alive(tmp_path)

    ended = threading.Event()

    def beat() -> None:
        lease = run_folder.Lease(tmp_path)
        while not ended.wait(0.01):
            lease._beat()

    thread = threading.Thread(target=beat)
    thread.start()
    assert status.alive(tmp_path)
    ended.set()
    thread.join()
    assert not status.alive(tmp_path)


@pytest.mark.parametrize(
    ("state", "host", "age", "alive"),
    [
        ("running", "elsewhere", 10, True),
        ("running", "elsewhere", 400, False),
        ("running", platform.node(), 10, False),
        ("stopped", "elsewhere", 10, False),
    ],
)
def test_where_locks_are_not_seen_a_recent_status_counts(
    state: Any, host: str, age: float, alive: bool, tmp_path: Path
) -> None:
    now = Status(state=state, step=1, total=2, job="", host=host, time=time.time() - age)
    (tmp_path / status.FILE).write_text(now.model_dump_json())
    assert status.alive(tmp_path) is alive
