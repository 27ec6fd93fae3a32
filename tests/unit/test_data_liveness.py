"""Every rank takes the same number of steps; a worker that dies, stops or cannot hand over ends the run by name, soon."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from data_kit import write_shards

from scaletrain.config import Data, View
from scaletrain.data import index
from scaletrain.data.errors import LoaderError
from scaletrain.data.loader import Stream
from scaletrain.data.stream import Images, Raw

CPU = torch.device("cpu")


def stream(folder: Path, rank: int = 0, world: int = 1, workers: int = 0, **options: object) -> Stream:
    data = Data(path=str(folder), **{"lanes": 2, "window": 2, "workers": workers, "views": (View(size=8),), **options})
    return Stream(data, seed=1, batch=12, rank=rank, world=world, device=CPU)


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 40])
def test_every_rank_takes_the_same_steps(tmp_path: Path, shards: int) -> None:
    """More workers than shards, more ranks than shards, shards of one sample and empty ones."""
    counts = (*(1 + 5 * n % 3 for n in range(shards - 1)), 31, 0)
    folder = write_shards(tmp_path / "d", counts)
    index.build(folder)
    whole = stream(folder)
    steps = sum(counts) // 2 // 6
    for world, workers in ((1, 0), (2, 0), (3, 0), (4, 0), (1, 4), (2, 3)):
        ranks = [list(stream(folder, r, world, workers).batches(0, 2 * whole.steps_per_epoch)) for r in range(world)]
        assert {len(r) for r in ranks} == {2 * steps}
        for epoch in range(2):
            seen = Counter(int(i) for r in ranks for b in r[epoch * steps : (epoch + 1) * steps] for i in b.index)
            assert set(seen.values()) == {1}
            assert len(seen) == steps * 12


class _Acting(Images):
    """Does something to the worker that makes batch 2."""

    act = staticmethod(lambda raw: raw)

    def __getitem__(self, at: tuple[int, int]) -> Raw:  # type: ignore[override]
        raw = super().__getitem__(at)
        return self.act(raw) if at[1] == 2 else raw


def failing(folder: Path, act: object, workers: int = 3, **options: object) -> tuple[str, float]:
    s = stream(folder, workers=workers, **options)
    s.dataset.__class__ = type("Acting", (_Acting,), {"act": staticmethod(act)})
    begin = time.monotonic()
    with pytest.raises(LoaderError) as error:
        list(s.batches(0, 6))
    assert not multiprocessing.active_children()
    text = str(error.value)
    assert "\n" not in text
    return text, time.monotonic() - begin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "d", (30, 30, 30))


def stop(raw: Raw) -> Raw:
    os.kill(os.getpid(), signal.SIGSTOP)
    return raw


def unpicklable(raw: Raw) -> Raw:
    return raw._replace(repeats=threading.Lock())


def leave(raw: Raw) -> Raw:
    os._exit(0)


def test_a_stopped_worker_is_named_within_30_seconds(folder: Path) -> None:
    """With the default options: the only slow test here."""
    text, seconds = failing(folder, stop)
    assert text.startswith("loader worker 2 (pid ")
    assert ", last reading s-00" in text
    assert "is stopped (SIGSTOP)" in text
    assert seconds < 30


def test_a_killed_worker_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.watch.CHECK", 0.3)
    text, seconds = failing(folder, lambda raw: os.kill(os.getpid(), signal.SIGKILL))
    assert text.startswith("loader worker 2 (pid ")
    assert "was killed by SIGKILL; if memory ran out" in text
    assert seconds < 10
    text, _ = failing(folder, lambda raw: os.kill(os.getpid(), signal.SIGBUS))
    assert "was killed by SIGBUS; shared memory ran out: enlarge /dev/shm" in text


def test_a_worker_that_leaves_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.watch.CHECK", 0.3)
    assert "ended with exit code 0" in failing(folder, leave)[0]


def test_a_batch_that_cannot_be_pickled_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scaletrain.data.watch.CHECK", 0.3)
    text, _ = failing(folder, unpicklable)
    assert text.startswith("loader worker 2 (pid ")
    assert "cannot hand over its batch" in text
    assert "a batch cannot be handed over: TypeError: cannot pickle '_thread.lock' object" in capfd.readouterr().err


def test_a_silent_worker_is_named_after_the_timeout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaletrain.data.watch.CHECK", 0.3)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # that torch waits for one to end
    text, _ = failing(folder, lambda raw: time.sleep(60), timeout=1.5)
    assert text.startswith("no batch for 1.5 s: loader worker 2 (pid ")
    assert "raise data.timeout" in text


def test_slow_workers_and_a_short_stop_are_borne(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is suspended and continued goes on; so does one whose storage is slower than the watch looks."""
    monkeypatch.setattr("scaletrain.data.watch.CHECK", 0.4)

    def slow(raw: Raw) -> Raw:
        time.sleep(1.5)
        return raw

    s = stream(folder, workers=3)
    s.dataset.__class__ = type("Acting", (_Acting,), {"act": staticmethod(slow)})
    batches = s.batches(0, 6)
    found = [next(batches)]
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGCONT)
    found += list(batches)
    for a, b in zip(found, stream(folder).batches(0, 6), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.views[0], b.views[0])


def _job(folder: Path, out: str) -> None:
    found = list(stream(folder, workers=2).batches(0, 6))
    torch.save([b.views[0] for b in found], out)


def test_two_jobs_on_one_node_do_not_collide(folder: Path, tmp_path: Path) -> None:
    """Both index the folder, and both share memory with their workers; nothing is named after host or job."""
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_job, args=(folder, str(tmp_path / f"{n}.pt"))) for n in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in range(2))
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
