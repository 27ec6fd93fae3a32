"""What loader workers send and share: errors, tracebacks, memory; nothing in files, nothing left
open.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.data import children, write_shards
from kit.workers import acting, failure, stream

from scaletrain.config.schema import View
from scaletrain.data.errors import DataError, LoaderError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "d", (30, 30, 30))


# --- what a worker says ---------------------------------------------------------------------------


def raises(error: BaseException) -> Callable[[int], None]:
    def act(step: int) -> None:
        raise error

    return act


def test_errors_of_the_data_arrive_as_they_are(folder: Path) -> None:
    with pytest.raises(DataError) as long:
        list(acting(folder, before=raises(DataError("x" * 300_000))).batches(0, 3))
    assert str(long.value) == "x" * 300_000
    with pytest.raises(OSError, match="Stale file handle: 'shard'") as stale:
        list(
            acting(
                folder, before=raises(OSError(errno.ESTALE, "Stale file handle", "shard"))
            ).batches(0, 3)
        )
    assert stale.value.errno == errno.ESTALE
    with pytest.raises(
        LoaderError, match=r"a loader worker \(pid \d+\) ran out of memory; lower data\.workers"
    ):
        list(acting(folder, before=raises(MemoryError())).batches(0, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"before": lambda step: step.nonsense},
            r"(?s)in loader worker \d+:\nTraceback .*AttributeError: .*'nonsense'",
        ),
        (
            {"after": lambda step, raw: raw._replace(replaced=threading.Lock())},
            "cannot pickle '_thread.lock' object",
        ),
        (
            {"after": lambda step, raw: raw._replace(repeats=torch.zeros(10_000))},
            "a batch has more than the 4096 bytes",
        ),
    ],
)
def test_a_defect_shows_the_traceback_of_the_worker(
    folder: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(RuntimeError, match=words):
        list(acting(folder, **options).batches(0, 3))
    assert not children()


# --- memory ---------------------------------------------------------------------------------------


def shared_memory(process: int | str) -> set[str]:
    """The lines of /proc/PROCESS/maps about memory that it shares with others."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line for line in lines if " rw-s " in line}


def test_batches_need_no_files_and_leave_none_open(folder: Path) -> None:
    """Neither in /dev/shm, which is small in containers, nor anywhere else."""
    files = os.listdir("/proc/self/fd")  # noqa: PTH208
    # of whatever ran in this process before; workers inherit it
    before = shared_memory("self")
    s = stream(folder, workers=2)
    batches = s.batches(0, 6)
    next(batches)
    for pid in children():
        new = shared_memory(pid) - before
        # what Linux calls memory without a file
        assert any(line.endswith("/dev/zero (deleted)") for line in new)
        assert not any("/dev/shm" in line for line in new)
    batches.close()
    s.close()
    assert sorted(os.listdir("/proc/self/fd")) == sorted(files)  # noqa: PTH208


def test_memory_that_is_not_to_be_had_is_one_line(folder: Path) -> None:
    s = stream(folder, workers=2, views=(View(size=4096),))  # 1.8 GB for three batches
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), before[1]))
    try:
        text = failure(s.batches(0, 6))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert text == (
        "2 loader workers with 5 batches of 603,983,872 bytes cannot be started: Cannot allocate "
        "memory; "
        "lower data.workers, data.prefetch or batch"
    )
