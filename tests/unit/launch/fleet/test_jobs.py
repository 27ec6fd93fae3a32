"""Arrays of evaluations, computed without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scaletrain.launch.fleet import jobs
from scaletrain.launch.fleet.cells import Cell
from scaletrain.launch.fleet.claims import Holder
from scaletrain.launch.fleet.jobs import Jobs
from scaletrain.launch.slurm import submit
from scaletrain.launch.slurm.queue import Job, Partition
from scaletrain.launch.slurm.submit import Resources

PLACE = Partition("gpu", ("n1",), (16,), (4,))
RUN = Path("/runs/a b")
HOLDER = Holder(fleet="f", launch="0002", element=1)


def cell(step: int, benchmark: str = "knn", gpus: int = 1, run: Path = RUN) -> Cell:
    result = run / "evals" / f"{benchmark}@d-step-{step}-x.json"
    return Cell(run, step, benchmark, "d", ("eval", "file", benchmark), result, gpus)


def test_an_array_for_each_run_benchmark_and_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/runs/other")
    cells = [cell(1), cell(1, "svm"), cell(2), cell(3, gpus=2), cell(1, run=other)]
    actual = list(Jobs(Resources(), PLACE).batches(cells))
    assert sorted(map(len, actual)) == [1, 1, 1, 2]
    assert [cells[0], cells[2]] in actual
    monkeypatch.setattr(jobs, "_MOST", 2)
    assert [len(one) for one in Jobs(Resources(), PLACE).batches([cells[0]] * 5)] == [2, 2, 1]


def test_a_job_has_its_share_of_a_node() -> None:
    def wanted(resources: Resources, place: Partition | None, gpus: int) -> tuple[object, ...]:
        got = Jobs(resources, place).resources([cell(1, gpus=gpus)])
        return got.gpus_per_node, got.tasks_per_node, got.cpus_per_task

    assert wanted(Resources(), PLACE, 1) == (1, 1, 4)
    assert wanted(Resources(), PLACE, 8) == (4, 4, 4)
    assert wanted(Resources(gpus_per_node=2), PLACE, 8) == (2, 2, 8)
    assert wanted(Resources(cpus_per_task=3), PLACE, 1) == (1, 1, 3)
    assert wanted(Resources(), replace(PLACE, gpus=(0,)), 8) == (0, 1, 16)


def test_the_script_counts_no_crashes_and_bounds_what_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Jobs(Resources(), PLACE).script([cell(1), cell(2)])
    assert f"\n#SBATCH --output={RUN}/evals/launches/0001/%A_%a_0_log.out\n" in script.replace(
        "'", ""
    ).replace('"', "")
    assert f'grep -cF "$when: " "$id.stops")" -le {jobs.STOPS}' in script
    assert 'grep -cF "$when: " "$id.crashes")" -le 0' in script
    assert 'echo "$code" > "$id.exit"' in script
    training = submit.script(tmp_path, RUN, Resources(), 1)
    assert "$id.stops" not in training

    seen: list[tuple[object, ...]] = []
    monkeypatch.setattr(submit, "submit", lambda *words: seen.append(words) or ["7_0", "7_1"])
    made = Jobs(Resources(time="60"), PLACE)
    launch = RUN / "evals" / "launches" / "0002"
    assert made.submit(launch, [cell(1), cell(2)], after="6") == ["7_0", "7_1"]
    folder, named, resources, tasks, comment = seen[0]
    assert (folder, str(named), comment) == (launch, "a b-knn", "/runs/a b#evals/0002")
    assert isinstance(resources, Resources)
    assert (resources.dependency, resources.time) == ("afterany:6", "60")
    assert [task.arguments for task in tasks] == [["eval", "file", "knn"]] * 2  # type: ignore[attr-defined]


def test_a_job_is_found_by_its_number_or_its_launch() -> None:
    comment = "/runs/a b#evals/0002"
    live = [
        Job("5", "RUNNING", str(RUN)),
        Job("6_1", "RUNNING", "/runs/a b#evals/0001"),
        Job("7_0", "PENDING", comment),
        Job("7_1", "RUNNING", comment),
    ]
    assert jobs.find(live, RUN, HOLDER) == live[3]
    assert jobs.find(live, RUN, HOLDER.model_copy(update={"job": "6_1"})) == live[1]
    assert jobs.find(live, RUN, HOLDER.model_copy(update={"job": "6_0"})) is None
    assert jobs.find(live[:3], RUN, HOLDER) is None
    alone = Holder(fleet="f", launch="0003")
    assert jobs.find([Job("8", "PENDING", "/runs/a b#evals/0003")], RUN, alone) is not None


def test_launches_are_numbered_and_leave_their_exit_codes(tmp_path: Path) -> None:
    assert jobs.new_launch(tmp_path).name == "0001"
    folder = tmp_path / "evals" / "launches" / "0002"
    folder.mkdir(parents=True)
    assert jobs.new_launch(tmp_path).name == "0003"
    ended = HOLDER.model_copy(update={"job": "7_1"})
    assert jobs.exit_code(tmp_path, ended) is None
    (folder / "7_1.exit").write_text("75\n")
    assert jobs.exit_code(tmp_path, ended) == 75
    assert jobs.log(tmp_path, ended) == folder / "7_1_0_log.err"
