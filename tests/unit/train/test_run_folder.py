"""Who may use a run folder: its owner, one process at a time, with access as asked."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaletrain.config.recipe import ConfigError
from scaletrain.train import run_folder
from scaletrain.train.run_folder import BusyError, Lease


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(run: Path, given: str | None) -> tuple[int, int]:
    """Of a folder and a file written under restrict()."""
    with contextlib.ExitStack() as until:
        run_folder.restrict(run, given, until)
        run.mkdir(exist_ok=True)
        (run / "file").touch()
    assert os.umask(0o022) == 0o022
    return tuple(stat.S_IMODE(path.stat().st_mode) for path in (run, run / "file"))  # type: ignore[return-value]


def test_a_run_folder_is_its_owners_alone_unless_asked_otherwise(tmp_path: Path) -> None:
    assert modes(tmp_path / "a", None) == (0o700, 0o600)
    assert modes(tmp_path / "b", "027") == (0o750, 0o640)
    (tmp_path / "b" / "file").unlink()
    assert modes(tmp_path / "b", None) == (0o750, 0o640)  # and keeps the access of its first start
    for bad in ("9", "x", "-1", "777", "1000"):
        with pytest.raises(ConfigError, match=f"--umask {bad}: give an octal number"):
            modes(tmp_path / "c", bad)


def test_another_users_run_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder.check_owner(tmp_path)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(
        ConfigError,
        match=r"belongs to user .*, and you are user 54321: train in a folder of your own",
    ):
        run_folder.check_owner(tmp_path)


def test_what_everybody_can_change_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o755)
    run_folder.warn_if_open(tmp_path)
    assert capsys.readouterr().err == ""
    tmp_path.chmod(0o777)
    run_folder.warn_if_open(tmp_path)
    assert f"warning: every user can change {tmp_path}: chmod o-w" in capsys.readouterr().err


# --- without locks --------------------------------------------------------------------------------


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks, and a quick heartbeat."""

    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    monkeypatch.setattr(run_folder, "BEAT", 0.1)


@pytest.mark.usefixtures("lockless")
def test_without_locks_a_second_start_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with contextlib.ExitStack() as first:
        run_folder._hold(tmp_path, first)
        with (
            contextlib.ExitStack() as second,
            pytest.raises(BusyError, match=rf"is being trained by process {os.getpid()} on"),
        ):
            run_folder._hold(tmp_path, second)
    with contextlib.ExitStack() as third:  # the first has let go
        run_folder._hold(tmp_path, third)
    assert not (tmp_path / ".lease").exists()


@pytest.mark.usefixtures("lockless")
def test_the_lease_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".lease").write_text("process 1 on gone, job none; 0123456789abcdef 7\n")
    begin = time.monotonic()
    with contextlib.ExitStack() as until:
        run_folder._hold(tmp_path, until)
        assert time.monotonic() - begin >= 0.3  # three beats without a sign of life
        assert f"process {os.getpid()}" in (tmp_path / ".lease").read_text()


@pytest.mark.usefixtures("lockless")
def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    held: list[bool] = []
    with contextlib.ExitStack() as until:

        def start() -> None:
            try:
                Lease(tmp_path).hold(until)
                held.append(True)
            except BusyError:
                held.append(False)

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(held) == [False, True]


@pytest.mark.usefixtures("lockless")
def test_a_process_whose_lease_was_taken_over_ends(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.ExitStack() as until:
            run_folder._hold(tmp_path, until)
            time.sleep(10)
        os._exit(0)
    while not (tmp_path / ".lease").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        (tmp_path / ".lease").write_text("process 2 on another, job none; fedcba9876543210 1\n")
        time.sleep(0.05)  # a process that took over shows signs of life too
    assert os.waitstatus_to_exitcode(ended[1]) == 75
