"""The node's cache: bounded, shared by processes, never wrong, whatever is killed in between."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from scaletrain.data.errors import DataError
from scaletrain.data.storage import cache
from scaletrain.data.storage.cache import NodeCache

SIZE = 1000


def content(number: int) -> bytes:
    return bytes([number % 251]) * SIZE


def fill(number: int, log: Path | None = None, seconds: float = 0.0) -> Callable[[BinaryIO], None]:
    def write(file: BinaryIO) -> None:
        if log:
            with log.open("a") as lines:
                lines.write(f"{number}\n")
        file.write(content(number)[: SIZE // 2])
        file.flush()
        time.sleep(seconds)
        file.write(content(number)[SIZE // 2 :])

    return write


def read(held: NodeCache, number: int, **options: object) -> bytes:
    file = held.open(f"k{number}", SIZE, fill(number, **options))
    try:
        return os.pread(file, 2 * SIZE, 0)
    finally:
        os.close(file)


def names(held: NodeCache) -> set[str]:
    return {p.name for p in held.folder.iterdir()} - {".room"}


def age(held: NodeCache, number: int, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(held.folder / f"k{number}", (then, then))


def forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os._exit(0 if work() in (None, True) else 1)
    except BaseException:
        os._exit(2)


def ended(*children: int) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_filled_once_and_kept(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), 10 * SIZE)
    assert read(held, 1, log=tmp_path / "log") == read(held, 1, log=tmp_path / "log") == content(1)
    assert (tmp_path / "log").read_text() == "1\n"
    assert names(held) == {"k1"}
    assert (held.folder.stat().st_mode & 0o777, (held.folder / "k1").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )


def test_the_least_recently_used_goes(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), 3 * SIZE)
    for number in range(3):
        read(held, number)
        age(held, number, 100 - number)
    read(held, 0)  # used again
    read(held, 3)
    assert names(held) == {"k0", "k2", "k3"}
    held.mark("k3", wanted=False)  # though it came last
    read(held, 4)
    assert names(held) == {"k0", "k2", "k4"}
    age(held, 2, 100)
    held.mark("k2", wanted=True)
    age(held, 0, 50)
    read(held, 5)
    assert names(held) == {"k2", "k4", "k5"}
    held.mark("gone", wanted=True)


def test_what_is_open_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    held = NodeCache(str(tmp_path), 2 * SIZE)
    first, second = (held.open(f"k{n}", SIZE, fill(n)) for n in range(2))
    with pytest.raises(
        DataError, match=r"every file is in use and data.cache.bytes=2,000 is full; raise it"
    ):
        read(held, 2)
    assert names(held) == {"k0", "k1"}
    os.close(second)
    assert read(held, 2) == content(2)
    assert names(held) == {"k0", "k2"}
    assert os.pread(first, SIZE, 0) == content(0)
    os.close(first)


def test_waits_for_room(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), SIZE)
    file = held.open("k0", SIZE, fill(0))
    threading.Timer(0.2, os.close, (file,)).start()
    assert read(held, 1) == content(1)


def test_larger_than_the_cache(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a file of 1,000 bytes does not fit in data.cache.bytes=999; raise it"
    ):
        read(NodeCache(str(tmp_path), SIZE - 1), 0)
    assert names(NodeCache(str(tmp_path), 1)) == set()


def test_a_failed_filling_leaves_nothing(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), 10 * SIZE)

    def broken(file: BinaryIO) -> None:
        file.write(b"half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        held.open("k0", SIZE, broken)
    assert names(held) == set()
    assert read(held, 0) == content(0)


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"the disk of .* is full: lower data.cache.bytes"):
        read(NodeCache(str(tmp_path), 10 * SIZE), 0)
    with pytest.raises(
        DataError, match=r"has room for [\d,]+ bytes and data.cache.bytes is .*data.cache.path"
    ):
        NodeCache(str(tmp_path), 1 << 60).check(1 << 60)
    NodeCache(str(tmp_path), 1 << 60).check(1000)


def test_the_bound_holds_with_many_processes(tmp_path: Path) -> None:
    """Eight processes read 30 files in different orders through a cache of 12; one looks on."""
    log, limit = tmp_path / "log", 12 * SIZE

    def work(seed: int) -> bool:
        held = NodeCache(str(tmp_path), limit)
        for turn in range(60):
            number = (turn * (2 * seed + 1) + seed) % 30
            if read(held, number, log=log, seconds=0.001) != content(number):
                return False
        return True

    children = [forked(lambda seed=seed: work(seed)) for seed in range(8)]
    held, most = NodeCache(str(tmp_path), limit), 0
    for child in children:
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            most = max(most, held.used())
            time.sleep(0.001)
    assert ended(*children) == [0] * 8
    assert 10 * SIZE < most <= limit
    assert all("part" not in name for name in names(held))


def test_processes_wait_for_the_one_that_fills(tmp_path: Path) -> None:
    log = tmp_path / "log"
    work = lambda: read(NodeCache(str(tmp_path), 9 * SIZE), 1, log=log, seconds=0.2) == content(1)  # noqa: E731
    assert ended(*(forked(work) for _ in range(6))) == [0] * 6
    assert log.read_text() == "1\n"


def test_nobody_waits_for_a_reader(tmp_path: Path) -> None:
    """Who has filled a file may go on to read it for days."""
    held, log = NodeCache(str(tmp_path), SIZE), tmp_path / "log"
    reader = forked(lambda: (held.open("k1", SIZE, fill(1, log, seconds=0.3)), time.sleep(60)))
    until(log.exists)
    waiting = forked(lambda: read(held, 1) == content(1))
    try:
        until(lambda: os.waitid(os.P_PID, waiting, os.WEXITED | os.WNOHANG | os.WNOWAIT))
    finally:
        for child in (reader, waiting):
            os.kill(child, signal.SIGKILL)
    assert ended(reader, waiting) == [-9, 0]


def test_reading_ahead_does_not_wait(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), 9 * SIZE)
    child = forked(lambda: read(held, 1, log=tmp_path / "log", seconds=0.5) == content(1))
    until((tmp_path / "log").exists)
    begin = time.monotonic()
    held.ensure("k1", SIZE, fill(1, tmp_path / "log"))
    assert time.monotonic() - begin < 0.4
    assert not (held.folder / "k1").exists()
    assert ended(child) == [0]
    held.ensure("k1", SIZE, fill(1, tmp_path / "log"))
    assert (tmp_path / "log").read_text() == "1\n"


def test_filled_by_another_process_just_before(tmp_path: Path) -> None:
    held, log = NodeCache(str(tmp_path), 9 * SIZE), tmp_path / "log"
    read(held, 1)
    held._make("k1", SIZE, fill(1, log))  # it was not there when this one looked
    assert not log.exists()
    assert names(held) == {"k1"}


def test_a_killed_process_leaves_its_place_to_the_next(tmp_path: Path) -> None:
    held, log = NodeCache(str(tmp_path), SIZE), tmp_path / "log"
    child = forked(lambda: read(held, 1, log=log, seconds=60))
    until(log.exists)
    until(lambda: (held.folder / "k1.part").read_bytes()[: SIZE // 2] == content(1)[: SIZE // 2])
    waiting = forked(lambda: read(held, 1, log=log) == content(1))
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    assert ended(child, waiting) == [-9, 0]
    assert names(held) == {"k1"}
    assert read(held, 1) == content(1)


def test_what_killed_processes_left_is_room_for_others(tmp_path: Path) -> None:
    held, log = NodeCache(str(tmp_path), 2 * SIZE), tmp_path / "log"
    child = forked(lambda: read(held, 1, log=log, seconds=60))
    until(log.exists)
    os.kill(child, signal.SIGKILL)
    ended(child)
    assert held.used() == SIZE
    for number in (2, 3):
        assert read(held, number) == content(number)
    assert names(held) == {"k2", "k3"}


def test_deleted_between_opening_and_locking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that loses the race against an eviction fills the file again, and never holds one
    that no longer counts.
    """
    held, real, done = NodeCache(str(tmp_path), 2 * SIZE), fcntl.flock, []
    read(held, 1)

    def racing(file: int, how: int) -> None:
        if how == fcntl.LOCK_SH and not done:
            done.append(1)
            (held.folder / "k1").unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", racing)
    assert read(held, 1, log=tmp_path / "log") == content(1)
    assert (tmp_path / "log").read_text() == "1\n"
    assert names(held) == {"k1"}


def test_folders_of_others_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / f"scaletrain-{os.geteuid()}"
    refused = pytest.raises(
        DataError,
        match=r"must be a folder that belongs to you alone \(chmod 700\); remove it, or set",
    )
    place.mkdir(mode=0o755)
    with refused:
        NodeCache(str(tmp_path), SIZE)
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(tmp_path / "elsewhere")
    with refused:
        NodeCache(str(tmp_path), SIZE)
    place.unlink()
    place.mkdir(mode=0o700)
    NodeCache(str(tmp_path), SIZE)
    real = os.geteuid()
    (tmp_path / f"scaletrain-{real + 1}").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: real + 1)
    with refused:  # made by another user for us to find
        NodeCache(str(tmp_path), SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"cannot be made: Not a directory; choose a folder with data.cache.path"
    ):
        NodeCache(str(tmp_path / "file"), SIZE)


def test_links_in_the_folder_are_not_followed(tmp_path: Path) -> None:
    held = NodeCache(str(tmp_path), 2 * SIZE)
    (tmp_path / "secret").write_bytes(b"secret")
    (held.folder / "k1.part").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="symbolic links"):
        read(held, 1)
    assert (tmp_path / "secret").read_bytes() == b"secret"
