"""Every rank takes the same number of steps; a worker that is killed, stopped or stuck ends the run
by name, soon.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kit.data import children, write_shards
from kit.remote import serving
from kit.workers import acting, at_step, failure, signalled, stream

from scaletrain.config.schema import CacheConfig
from scaletrain.core import Batch
from scaletrain.data.format import index
from scaletrain.data.loading.dataset import RawBatch
from scaletrain.data.sampling.substitutes import Replaced
from scaletrain.data.storage import prefetch, remote
from scaletrain.runtime import heartbeat


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 40])
def test_every_rank_takes_the_same_steps(tmp_path: Path, shards: int) -> None:
    """More workers than shards, more ranks than shards, shards of one sample and empty ones."""
    counts = (*(1 + 5 * n % 3 for n in range(shards - 1)), 31, 0)
    folder = write_shards(tmp_path / "d", counts)
    index.build(folder)
    whole = stream(folder)
    steps = sum(counts) // 2 // 6
    for world, workers in ((1, 0), (2, 0), (3, 0), (4, 0), (1, 4), (2, 3)):
        ranks = [
            list(stream(folder, r, world, workers).batches(0, 2 * whole.steps_per_epoch))
            for r in range(world)
        ]
        assert {len(r) for r in ranks} == {2 * steps}
        for epoch in range(2):
            seen = Counter(
                int(i)
                for r in ranks
                for b in r[epoch * steps : (epoch + 1) * steps]
                for i in b.index
            )
            assert set(seen.values()) == {1}
            assert len(seen) == steps * 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "d", (30, 30, 30))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks more often, and waits less."""
    monkeypatch.setattr("scaletrain.data.loading.watchdog.CHECK", 0.05)
    monkeypatch.setattr("scaletrain.data.loading.watchdog.STOPPED", 0.2)


# --- killed and stopped ---------------------------------------------------------------------------

ENDS = {
    signal.SIGKILL: "was killed by SIGKILL; if memory ran out, lower data.workers",
    signal.SIGSTOP: "is stopped (SIGSTOP)",
}
each_way = pytest.mark.parametrize("how", ENDS)


@each_way
@pytest.mark.usefixtures("soon")
def test_a_worker_that_is_lost_before_its_first_batch_is_named(folder: Path, how: int) -> None:
    text = failure(acting(folder, before=at_step(2, signalled(how))).batches(0, 6))
    assert text.startswith("loader worker 2 (pid ")
    assert ENDS[how] in text


@each_way
@pytest.mark.usefixtures("soon")
def test_a_worker_that_is_lost_after_a_batch_is_named(folder: Path, how: int) -> None:
    """It waits for its next task, and what it announced before is there."""
    batches = stream(folder, workers=1, prefetch=1).batches(0, 6)
    next(batches)
    (pid,) = children()
    time.sleep(0.2)
    os.kill(pid, how)
    text = failure(batches)
    assert text.startswith(f"loader worker 0 (pid {pid}), last reading s-00")
    assert ENDS[how] in text


def long_winded(step: int, raw: RawBatch) -> RawBatch:
    """More than a pipe holds."""
    return raw._replace(replaced=(Replaced(1, 2, "x" * 300_000),))


@each_way
@pytest.mark.usefixtures("soon")
def test_a_worker_that_is_lost_while_it_hands_over_is_named(folder: Path, how: int) -> None:
    """Half of its message is in the pipe."""
    batches = acting(folder, workers=1, after=long_winded).batches(0, 6)
    next(batches)
    (pid,) = children()
    time.sleep(0.2)
    os.kill(pid, how)
    text = failure(batches)
    assert text.startswith(f"loader worker 0 (pid {pid}), last reading s-00")
    assert ENDS[how] in text


def test_a_stopped_worker_is_named_within_30_seconds(folder: Path) -> None:
    """With the default options: the only slow test here."""
    text = failure(
        acting(folder, after=lambda step, raw: signalled(signal.SIGSTOP)() or raw).batches(0, 6),
        within=30,
    )
    assert text.startswith("loader worker 0 (pid ")
    assert ", last reading s-00" in text
    assert "is stopped (SIGSTOP); start the run again" in text


def bus_error() -> None:
    faulthandler.disable()  # pytest's would print where
    os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: os._exit(0), "ended with exit code 0"),
        (bus_error, "was killed by SIGBUS; a file that it reads was cut short"),
        (signalled(signal.SIGRTMIN + 1), f"was killed by signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_other_ends_are_named(folder: Path, act: Callable[[], object], words: str) -> None:
    assert words in failure(acting(folder, before=at_step(2, act)).batches(0, 6))


@pytest.mark.usefixtures("soon")
def test_storage_that_hangs_does_not_hide_the_worker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the sample lies is asked of the same storage."""
    monkeypatch.setattr("scaletrain.data.loading.watchdog.NAMING", 0.2)
    s = acting(folder, before=at_step(3, signalled(signal.SIGKILL)))
    release = threading.Event()
    monkeypatch.setattr(s.dataset.shards, "name", lambda sample: release.wait(60))
    assert ", last reading " in failure(s.batches(0, 6))
    release.set()


# --- stuck and slow -------------------------------------------------------------------------------


def sleep() -> None:
    time.sleep(60)


@pytest.mark.usefixtures("soon")
def test_a_stuck_worker_is_named(folder: Path) -> None:
    text = failure(acting(folder, before=at_step(5, sleep), liveness=0.5).batches(0, 6))
    assert text.startswith("loader worker 2 (pid ")
    assert ", last reading s-00" in text
    assert (
        "is stuck: no sign of life for 0.5 s; storage or that process hangs; raise data.liveness"
        in text
    )


def slowly(step: int, raw: RawBatch) -> RawBatch:
    """Bytes arrive, then there is a wait that another process is to blame for."""
    for _ in range(8):
        time.sleep(0.1)
        heartbeat.beat()
    with heartbeat.unwatched():
        time.sleep(0.8)
    return raw


@pytest.mark.usefixtures("soon")
def test_a_slow_worker_is_borne_until_the_timeout(folder: Path) -> None:
    assert len(list(acting(folder, after=slowly, liveness=0.5).batches(0, 3))) == 3
    text = failure(acting(folder, after=slowly, liveness=0.5, timeout=1.0).batches(0, 3))
    assert text.startswith("no batch for 1 s: loader worker 0 (pid ")
    assert "raise data.timeout" in text


@pytest.mark.usefixtures("soon")
def test_workers_that_wait_for_the_network_are_not_stuck(tmp_path: Path) -> None:
    """One fetches a shard, the other waits until it is there."""
    folder = write_shards(tmp_path / "d", (24,))
    index.build(folder)
    with serving(folder) as web:
        s = stream(
            Path(), workers=2, path=web.url, cache=CacheConfig(path=str(tmp_path)), liveness=0.5
        )
        web.pause = 0.8
        for a, b in zip(s.batches(0, 2), stream(folder).batches(0, 2), strict=True):
            assert torch.equal(a.views[0], b.views[0])


@pytest.mark.usefixtures("soon")
def test_bytes_of_a_slow_folder_are_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "d", (12,))
    monkeypatch.setattr(remote, "CHUNK", -(-(folder / "s-000.tar").stat().st_size // 5))
    parts = remote.LocalOrigin.parts

    def slow(origin: remote.LocalOrigin, name: str, limit: int) -> Iterator[bytes]:
        for part in parts(origin, name, limit):
            time.sleep(0.2)
            yield part

    monkeypatch.setattr(remote.LocalOrigin, "parts", slow)
    monkeypatch.setattr(prefetch.CachedShards, "expect", lambda *_: None)  # nobody else fetches

    def batches(place: str, liveness: float) -> Iterator[Batch]:
        cache = CacheConfig(path=str(tmp_path / place), stage=True)
        return stream(folder, workers=1, cache=cache, liveness=liveness).batches(0, 1)

    assert len(list(batches("a", 0.6))) == 1
    assert "is stuck: no sign of life for 0.05 s" in failure(batches("b", 0.05))


def _job(folder: Path, out: str, **options: object) -> None:
    torch.save([b.views[0] for b in acting(folder, workers=2, **options).batches(0, 6)], out)


@contextmanager
def job(*args: object, **options: object) -> Iterator[multiprocessing.context.ForkProcess]:
    """A training process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_job, args=args, kwargs=options)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def workers_of(process: multiprocessing.context.ForkProcess, count: int = 2) -> list[int]:
    assert process.pid is not None
    until(lambda: len(children(process.pid)) == count)
    return children(process.pid)


def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("soon")
def test_a_job_that_is_suspended_and_continued_goes_on(folder: Path, tmp_path: Path) -> None:
    """Its processes are continued one by one, and the clocks went on."""
    made = tmp_path / "made"

    def slow(step: int) -> None:
        if step == 2:
            made.touch()
            time.sleep(0.3)

    with job(folder, str(tmp_path / "out.pt"), before=slow, liveness=1.0, timeout=1.0) as main:
        until(made.exists)
        processes = [main.pid, *workers_of(main)]
        for pid in reversed(processes):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5)
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)
        main.join()
        assert main.exitcode == 0
    for x, b in zip(
        torch.load(tmp_path / "out.pt", weights_only=True),
        stream(folder).batches(0, 6),
        strict=True,
    ):
        assert torch.equal(x, b.views[0])


def test_two_jobs_on_one_node_do_not_collide(folder: Path, tmp_path: Path) -> None:
    """Both index the folder, and both share memory with their workers; nothing is named after host
    or job.
    """
    files = [str(tmp_path / f"{n}.pt") for n in range(2)]
    with job(folder, files[0]) as one, job(folder, files[1]) as other:
        one.join()
        other.join()
        assert (one.exitcode, other.exitcode) == (0, 0)
    a, b = (torch.load(file, weights_only=True) for file in files)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_workers_end_with_a_main_process_that_is_killed(folder: Path, tmp_path: Path) -> None:
    """One waits for a task, one is in the middle of a batch, and one is stopped."""
    with job(folder, str(tmp_path / "out.pt"), before=at_step(3, sleep), prefetch=1) as main:
        workers = workers_of(main)
        time.sleep(0.2)
        os.kill(workers[0], signal.SIGSTOP)
        main.kill()
        main.join()
        until(lambda: not any(alive(pid) for pid in workers))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
