"""Fleets over a queue and over processes: two of them do nothing twice, and one that dies at any
point leaves nothing undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scaletrain.launch.fleet import jobs, standing
from scaletrain.launch.fleet.cells import Cell
from scaletrain.launch.fleet.fleet import Fleet
from scaletrain.launch.fleet.jobs import Jobs
from scaletrain.launch.fleet.pool import Pool
from scaletrain.launch.slurm import queue, submit
from scaletrain.launch.slurm.queue import Job, Partition
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task

PLACE = Partition("gpu", ("n1",), (16,), (4,))
BENCHMARKS = ("knn", "linear", "svm")


class Planned:
    """A plan whose cells are given."""

    over = True

    def __init__(self, run: Path, cells: Sequence[Cell]) -> None:
        self.run, self.cells = run, list(cells)

    def refresh(self) -> None:
        """Nothing new."""

    def release(self, finished: Callable[[Cell], bool]) -> None:
        """Nothing is kept."""


class Queue:
    """A cluster: what was submitted, and what runs or waits."""

    def __init__(self) -> None:
        self.live: list[Job] = []
        self.submitted: list[tuple[str, str | None]] = []
        self.refuses, self.says = "", "too many"
        self.dies = False

    def submit(
        self, folder: Path, run: Path, wanted: Resources, tasks: Sequence[Task], comment: str
    ) -> list[str]:
        folder.mkdir(parents=True)
        if self.refuses and str(run).endswith(self.refuses):
            raise queue.refusal(f"sbatch refused the job: {self.says}")

        number = len(self.submitted) + 1
        ids = [f"{number}_{n}" for n in range(len(tasks))] if len(tasks) > 1 else [str(number)]
        self.live += [Job(job, "PENDING", comment) for job in ids]
        self.submitted.append((run.name, wanted.dependency))
        if self.dies:
            raise KeyboardInterrupt
        return ids


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Queue:
    actual = Queue()
    monkeypatch.setattr(queue, "mine", lambda: list(actual.live))
    monkeypatch.setattr(submit, "submit", actual.submit)
    return actual


def cells(run: Path, steps: Sequence[int] = (1, 2), shares: bool = True) -> list[Cell]:
    return [
        Cell(
            run,
            step,
            name,
            "d",
            ("eval", name),
            run / "evals" / f"{name}@d-step-{step}-x.json",
            shares=shares,
        )
        for step in steps
        for name in BENCHMARKS
    ]


def fleet(run: Path, workers: Any = None, **options: Any) -> Fleet:
    planned: Any = Planned(run, cells(run, **options))
    made = workers if workers is not None else Jobs(Resources(), PLACE)
    return Fleet([planned], made, 1, lambda text: None)


def test_two_fleets_submit_each_array_once(tmp_path: Path, cluster: Queue) -> None:
    with fleet(tmp_path) as first, fleet(tmp_path) as second:
        for one in (first, second, first):
            one.look()
            assert (one.count("pending"), one.problems) == (6, [])
    names = [f"{tmp_path.name}-{name}" for name in BENCHMARKS]
    # those that need the same features wait for the array that stores them
    assert cluster.submitted == [
        (names[0], None),
        (names[1], "afterany:1"),
        (names[2], "afterany:1"),
    ]
    # claims of jobs outlive their fleets
    with fleet(tmp_path) as third:
        third.look()
        assert third.count("pending") == 6
    assert len(cluster.submitted) == 3


def test_only_what_has_no_result_is_started(tmp_path: Path, cluster: Queue) -> None:
    for done in cells(tmp_path)[:4]:
        assert done.result
        done.result.parent.mkdir(exist_ok=True)
        done.result.write_text("{}")
    with fleet(tmp_path, shares=False) as one:
        one.look()
        assert (one.count("pending"), len(cluster.submitted)) == (2, 2)
        assert {dependency for _, dependency in cluster.submitted} == {None}


def test_a_fleet_that_dies_after_sbatch_is_followed_by_one_that_finds_the_jobs(
    tmp_path: Path, cluster: Queue
) -> None:
    cluster.dies = True
    with pytest.raises(KeyboardInterrupt), fleet(tmp_path) as one:
        one.look()
    cluster.dies = False
    with fleet(tmp_path) as again:
        again.look()
        assert again.count("pending") == 6
        assert not again.settling
    assert [name.rpartition("-")[2] for name, _ in cluster.submitted] == list(BENCHMARKS)


def test_a_refused_array_stops_no_other_and_is_submitted_later(
    tmp_path: Path, cluster: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "SETTLE", 0.0)
    cluster.refuses = "linear"
    with fleet(tmp_path) as one:
        one.look()
        assert [str(problem) for problem in one.problems] == ["sbatch refused the job: too many"]
        assert (one.count("pending"), one.count("missing"), one.idle) == (4, 2, False)
        cluster.refuses = ""
        one.look()
        assert (one.count("pending"), one.problems) == (6, [])


def test_what_is_refused_again_and_again_is_given_up_and_the_rest_followed(
    tmp_path: Path, cluster: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "SETTLE", 0.0)
    cluster.refuses, cluster.says = "linear", "Unable to contact slurm controller"
    with fleet(tmp_path) as one:
        for _ in range(5):
            one.look()
        # the controller may be back, whenever that is
        assert (one.count("pending"), one.count("missing"), len(one.problems)) == (4, 2, 1)
        cluster.says = "Invalid qos specification"
        for _ in range(3):
            one.look()
        assert (one.count("pending"), one.count("failed"), one.problems) == (4, 2, [])
        assert {one.statuses[cell].text for cell in one.cells("failed")} == {
            "sbatch refused the job: Invalid qos specification"
        }


def test_jobs_that_fail_are_submitted_again_a_bounded_number_of_times(
    tmp_path: Path, cluster: Queue
) -> None:
    with fleet(tmp_path, steps=(1,)) as one:
        for attempt in range(2):
            one.look()
            for job in cluster.live:
                folder = jobs._launches(tmp_path) / job.comment.rpartition("/")[2]
                (folder / f"{job.id}.exit").write_text(
                    "2" if attempt == 0 and job.id == "1" else "1"
                )
            cluster.live.clear()
        assert one.count("failed") == 1, "invalid input is not tried again"
        one.look()
        assert (one.count("failed"), one.idle) == (3, True)
        assert len(cluster.submitted) == 3 + 2
        one.forgive()
        one.look()
        assert len(cluster.submitted) == 3 + 2 + 3


class Processes(Pool):
    """Processes that run until they are asked to end."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.begun: list[Path] = []
        self.now: list[Path] = []

    @property
    def room(self) -> int:
        return self._size - len(self.now)

    def start(self, arguments: Sequence[str], log: Path) -> None:
        self.begun.append(log)
        self.now.append(log)

    def running(self, log: Path) -> bool:
        return log in self.now

    def end(self, log: Path, code: int) -> None:
        self.now.remove(log)
        self._codes[log] = code


def test_processes_start_where_there_is_room_and_no_features_are_waited_for(
    tmp_path: Path,
) -> None:
    pool = Processes(3)
    with fleet(tmp_path, pool) as one:
        one.look()
        # one of each step, which stores the features for the others
        assert [log.stem.partition("-x")[0] for log in pool.begun] == [
            "knn@d-step-1",
            "knn@d-step-2",
        ]
        pool.end(pool.begun[0], 1)
        one.look()
        # it has failed, and is tried again along with the others
        assert [log.stem.partition("-x")[0] for log in pool.begun[2:]] == [
            "knn@d-step-1",
            "linear@d-step-1",
        ]
        assert (one.count("running"), one.count("missing")) == (3, 3)


def test_two_fleets_share_the_work(tmp_path: Path) -> None:
    pools = [Processes(4), Processes(4)]
    with (
        fleet(tmp_path, pools[0], shares=False) as first,
        fleet(tmp_path, pools[1], shares=False) as second,
    ):
        for one in (first, second):
            one.look()
        assert (len(pools[0].begun), len(pools[1].begun)) == (4, 2)
        assert second.count("running") == 6
        first.__exit__()
        # what the first had begun ended with it
        second.look()
        assert len(pools[1].begun) == 4
        assert len({*pools[0].begun, *pools[1].begun}) == 6


def test_an_evaluation_on_views_holds_nothing_back(tmp_path: Path) -> None:
    wanted = [replace(one, shares=one.benchmark != "knn") for one in cells(tmp_path, steps=(1,))]
    planned: Any = Planned(tmp_path, wanted)
    pool = Processes(3)
    with Fleet([planned], pool, 1, lambda text: None) as one:
        one.look()
        assert [log.stem.partition("@")[0] for log in pool.begun] == ["knn", "linear"]
