"""Locks of files: who excludes whom, and whether a forked child keeps a lock."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from scaletrain.runtime.locks import acquire, locked


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT)


def test_two_openings_exclude_each_other_and_readers_share(tmp_path: Path) -> None:
    first, second = opened(tmp_path / "lock"), opened(tmp_path / "lock")
    assert acquire(first, wait=False)
    assert not acquire(second, wait=False)
    assert not acquire(second, wait=False, shared=True)
    assert acquire(first, wait=False, shared=True)
    assert acquire(second, wait=False, shared=True)
    os.close(first)
    assert acquire(second, wait=False)
    os.close(second)


def test_a_named_lock_is_released_at_the_end_of_its_context(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", wait=False) as outer:
        assert outer is not None
        with locked(tmp_path / "lock", wait=False) as inner:
            assert inner is None

    with locked(tmp_path / "lock", wait=True) as again:
        assert again is not None
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("of_process", [False, True])
def test_a_child_keeps_the_lock_of_an_open_file_only(tmp_path: Path, of_process: bool) -> None:
    """As a loader worker that outlives its trainer."""
    ready, finish = os.pipe(), os.pipe()
    parent = os.fork()

    if parent == 0:
        lock = opened(tmp_path / "lock")
        acquire(lock, wait=True, of_process=of_process)
        if os.fork() == 0:
            os.write(ready[1], b"x")
            os.read(finish[0], 1)
        os._exit(0)

    os.waitpid(parent, 0)
    os.read(ready[0], 1)
    mine = opened(tmp_path / "lock")
    assert acquire(mine, wait=False, of_process=of_process) == of_process
    os.write(finish[1], b"x")
    for end in (*ready, *finish, mine):
        os.close(end)
