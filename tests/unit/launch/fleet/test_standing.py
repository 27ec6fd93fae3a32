"""Where results stand: what is measured, at work, to be tried again or given up, whoever died."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from kit.evals import write_result

from scaletrain.launch.fleet import jobs, standing
from scaletrain.launch.fleet.cells import Cell, Status
from scaletrain.launch.fleet.claims import Claim, Claims, Holder
from scaletrain.launch.fleet.pool import Pool
from scaletrain.launch.fleet.standing import Standing
from scaletrain.launch.slurm import queue
from scaletrain.launch.slurm.queue import Job, UnavailableError


class Ended(Pool):
    """A pool whose processes have ended with these exit codes, by benchmark."""

    def __init__(self, **codes: int) -> None:
        super().__init__(1)
        self.ends = codes

    def code(self, log: Path) -> int | None:
        return self.ends.pop(log.name.partition("@")[0], None)


def cell(run: Path, benchmark: str = "knn") -> Cell:
    result = run / "evals" / f"{benchmark}@d-step-3-x.json"
    return Cell(run, 3, benchmark, "d", ("eval",), result)


def status_of(claims: Claims, pool: Pool | None = None, retries: int = 1) -> Status:
    watch = Standing(claims, pool, retries)
    watch.see_queue()
    return watch.status(cell(claims._folder.parents[1]))


def log(run: Path, text: str) -> None:
    cell(run).log.parent.mkdir(parents=True)
    cell(run).log.write_text(text)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs in the queue."""
    actual: list[Job] = []
    monkeypatch.setattr(queue, "mine", lambda: actual)
    return actual


def test_attempts_are_counted_until_they_are_given_up(tmp_path: Path, live: list[Job]) -> None:
    log(tmp_path, "loading\nerror: no memory\nsomething else\n")
    with Claims(tmp_path) as claims:
        assert status_of(claims) == Status("missing")
        mine = Holder(fleet=claims.fleet)
        for attempt, expected in ((1, "missing"), (2, "failed")):
            claims.write("knn@d-step-3-x", claims.read("knn@d-step-3-x").held_by(mine))
            actual = status_of(claims, Ended(knn=1))
            text = f"exit code 1; no memory ({cell(tmp_path).log})"
            assert actual == Status(expected, text, tried=True)  # type: ignore[arg-type]
            kept = claims.read("knn@d-step-3-x")
            assert (kept.attempts, kept.holder) == (attempt, None)


def test_invalid_input_is_given_up_at_once(tmp_path: Path, live: list[Job]) -> None:
    log(tmp_path, "error: no such folder\n")
    with Claims(tmp_path) as claims:
        claims.write("knn@d-step-3-x", Claim(holder=Holder(fleet=claims.fleet)))
        assert status_of(claims, Ended(knn=2)).state == "failed"
        assert claims.read("knn@d-step-3-x").refused


@pytest.mark.parametrize("code", [130, 143, 140])
def test_an_end_on_request_is_no_attempt(tmp_path: Path, live: list[Job], code: int) -> None:
    with Claims(tmp_path) as claims:
        claims.write("knn@d-step-3-x", Claim(holder=Holder(fleet=claims.fleet)))
        assert status_of(claims, Ended(knn=code)) == Status("missing")
        assert claims.names() == set()


def test_ends_on_request_are_bounded_too(
    tmp_path: Path, live: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks may be a guard of the memory, which asks again and again."""
    monkeypatch.setattr(jobs, "STOPS", 1)
    pool = Ended()
    with Claims(tmp_path) as claims:
        watch = Standing(claims, pool, 0)
        watch.see_queue()
        for expected in ("missing", "failed"):
            pool.ends["knn"] = 143
            claims.write("knn@d-step-3-x", Claim(holder=Holder(fleet=claims.fleet)))
            assert watch.status(cell(tmp_path)).state == expected


@pytest.mark.parametrize(("stops", "state"), [(20, "missing"), (21, "failed")])
def test_a_job_that_was_stopped_too_often_is_given_up(
    tmp_path: Path, live: list[Job], stops: int, state: str
) -> None:
    """One that could not be requeued is not."""
    folder = jobs._launches(tmp_path) / "0001"
    folder.mkdir(parents=True)
    (folder / "7.exit").write_text("140\n")
    (folder / "7.stops").write_text("after saving 3: stopped\n" * stops)
    with Claims(tmp_path) as claims:
        holder = Holder(fleet="dead", launch="0001", job="7")
        claims.write("knn@d-step-3-x", Claim(holder=holder))
        assert status_of(claims, retries=3).state == state


def test_what_a_dead_fleet_had_begun_is_free(tmp_path: Path, live: list[Job]) -> None:
    with Claims(tmp_path) as claims:
        with Claims(tmp_path) as other:
            claims.write("knn@d-step-3-x", Claim(holder=Holder(fleet=other.fleet), attempts=1))
            assert status_of(claims) == Status("running", f"fleet {other.fleet}")
        assert status_of(claims) == Status("missing", "", tried=True)
        assert claims.read("knn@d-step-3-x") == Claim(attempts=1)


def test_a_job_is_live_by_the_queue_and_its_end_by_its_exit_code(
    tmp_path: Path, live: list[Job]
) -> None:
    with Claims(tmp_path) as claims:
        holder = Holder(fleet="dead", launch="0001", element=1, job="7_1")
        claims.write("knn@d-step-3-x", Claim(holder=holder))
        for state in ("PENDING", "SUSPENDED", "PREEMPTED", "REQUEUE_HOLD"):
            live[:] = [Job("7_1", state, "")]
            assert status_of(claims) == Status("pending", "job 7_1")
        live[:] = [Job("7_1", "RUNNING", "")]
        assert status_of(claims) == Status("running", "job 7_1")

        live.clear()
        folder = jobs._launches(tmp_path) / "0001"
        folder.mkdir(parents=True)
        (folder / "7_1_0_log.err").write_text("error: the disk is full\n")
        (folder / "7_1.exit").write_text("75\n")
        actual = status_of(claims)
        # it may pass, and is given time
        assert (actual.state, actual.tried) == ("pending", True)
        assert actual.text.startswith("exit code 75; the disk is full (")
        pause = claims.read("knn@d-step-3-x").after - time.time()
        assert 20 < pause <= 30
        second = claims.read("knn@d-step-3-x").failed("", 75)
        assert 50 < second.after - time.time() <= 60
        claims.write("knn@d-step-3-x", Claim(holder=holder.model_copy(update={"job": "8_1"})))
        assert status_of(claims).text.startswith("it was killed; it wrote nothing")
        (folder / "9_1.exit").write_text("2\n")
        claims.write("knn@d-step-3-x", Claim(holder=holder.model_copy(update={"job": "9_1"})))
        assert status_of(claims).state == "failed"


def test_a_job_whose_fleet_died_while_submitting_is_adopted_or_free(
    tmp_path: Path, live: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Claims(tmp_path) as claims:
        lost = Claim(holder=Holder(fleet="dead", launch="0004", element=1))
        claims.write("knn@d-step-3-x", lost)
        live.append(Job("7_1", "PENDING", f"{tmp_path}#evals/0004"))
        assert status_of(claims) == Status("pending", "job 7_1")
        kept = claims.read("knn@d-step-3-x").holder
        assert kept is not None
        assert kept.job == "7_1"

        live.clear()
        claims.write("knn@d-step-3-x", lost)
        watch = Standing(claims, None, 1)
        watch.see_queue()
        # sbatch may still be at work
        assert watch.status(cell(tmp_path)) == Status("pending")
        assert watch.settling
        monkeypatch.setattr(standing, "SETTLE", 0.0)
        assert watch.status(cell(tmp_path)) == Status("missing")
        assert not watch.settling
        assert claims.names() == set()


def test_jobs_of_a_queue_that_cannot_be_seen_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> list[Job]:
        raise UnavailableError("squeue is not installed")

    monkeypatch.setattr(queue, "mine", away)
    with Claims(tmp_path) as claims:
        assert status_of(claims) == Status("missing")
        claims.write("knn@d-step-3-x", Claim(holder=Holder(fleet="f", launch="0001", job="7")))
        assert status_of(claims).state == "pending"
        assert claims.names() == {"knn@d-step-3-x"}


def test_a_result_ends_its_claim_whatever_that_says(tmp_path: Path, live: list[Job]) -> None:
    result = write_result(tmp_path, 3, {"linear": 41.236, "linear_per_class": 40.0})
    actual = Cell(tmp_path, 3, "linear", "d", ("eval",), result)
    with Claims(tmp_path) as claims:
        claims.write(actual.name, Claim(attempts=9, error="x", refused=True))
        watch = Standing(claims, None, 1)
        assert watch.status(actual) == Status("measured", "41.24 [39.24, 43.24]")
        assert claims.names() == set()

        result.write_text("{}")
        assert watch.status(actual) == Status("measured", "41.24 [39.24, 43.24]"), (
            "results never change"
        )
        again = Standing(claims, None, 1)
        assert again.status(actual).state == "failed"
        assert "is not a result" in again.status(actual).text


def test_a_damaged_claim_stops_only_its_result(tmp_path: Path, live: list[Job]) -> None:
    with Claims(tmp_path) as claims:
        (tmp_path / "evals" / "claims" / "knn@d-step-3-x.json").write_text(json.dumps([]))
        assert status_of(claims).state == "failed"
        impossible = Cell(tmp_path, 3, "svm", "d", (), None, problem="no labels")
        assert Standing(claims, None, 1).status(impossible) == Status("failed", "no labels")
