"""A pipeline as a chain of jobs, computed without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from kit import pipelines
from kit.commands import call

from scaletrain.launch.slurm import chain as chains
from scaletrain.launch.slurm import queue, submit
from scaletrain.launch.slurm.chain import Chain
from scaletrain.launch.slurm.queue import Partition, SlurmError
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task
from scaletrain.pipelines import load

PIPELINE = """
stages:
- name: base
  train: recipe.yaml
  set: {data.path: synthetic, data.synthetic_samples: 16}
  resources: {nodes: 2, tasks_per_node: 2}
- {name: part, train: recipe.yaml, foreach: 2, set: {data.path: synthetic}, continue: "${base.run}"}
- {name: scores, do: evaluate, set: {target: "${part-1.run}", benchmarks: [knn]}, after: [part]}
"""
PLACE = Partition("gpu", ("n1", "n2"), (16, 16), (4, 4))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return pipelines.write(tmp_path, PIPELINE)


def test_every_stage_is_a_job_after_those_that_it_needs(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: dict[str, tuple[Resources, Task]] = {}

    def accept(folder: Path, run: Path, resources: Resources, tasks: list[Task]) -> list[str]:
        submitted[run.name] = resources, tasks[0]
        return [str(10 + len(submitted))]

    monkeypatch.setattr(submit, "submit", accept)
    # one was submitted before
    monkeypatch.setattr(queue, "live", lambda run: ["7"] if run.endswith("part-1") else [])
    work = tmp_path / "work"
    pipeline = load.load(file, work, ["base.seed=3"])
    lines = list(Chain(pipeline, Resources(time="60"), PLACE, "027").submit())
    assert lines == [
        "job 11: base, 2 x 2 processes, 4 GPUs per node",
        "job 12: part-0, 1 x 4 processes, 4 GPUs per node, after base",
        "part-1: job 7 was submitted before",
        "job 13: scores, 1 x 1 processes, 1 GPUs per node, after part-1, part-0",
    ]
    wanted = {name: resources.dependency for name, (resources, _) in submitted.items()}
    assert wanted == {"base": None, "part-0": "afterok:11", "scores": "afterok:7:12"}
    resources, task = submitted["scores"]
    assert (resources.cpus_per_task, resources.time) == (4, "60")
    assert task.arguments == [
        "pipeline", str(file), "base.seed=3", "--work", str(work), "--stage", "scores",
        "--umask", "027",
    ]  # fmt: skip


def test_what_processes_would_refuse_is_refused_before(file: Path, tmp_path: Path) -> None:
    pipeline = load.load(file, tmp_path / "work")
    with pytest.raises(ValueError, match="batch"):
        Chain(pipeline, Resources(tasks_per_node=3), PLACE)
    pipeline = load.load(file, tmp_path / "work", ["base.data.path=''"])
    with pytest.raises(SlurmError, match="stage 'base' needs a data set"):
        Chain(pipeline, Resources(), PLACE)


def test_the_dry_run_prints_the_chain(file: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    options = ("launch", "slurm", "--pipeline", file, "--work", work, "--dry-run")
    got = call(*options, "--time", "60", PATH=str(tmp_path))
    assert got.exit_code == 0, got.output
    titles = [line for line in got.stdout.splitlines() if line.startswith("# --- ")]
    assert titles[1] == "# --- part-0, 1 x 1 processes, 0 GPUs per node, after base"
    assert got.stdout.count("#SBATCH --dependency=afterok:job-of-base\n") == 2
    assert got.stdout.count("#SBATCH --kill-on-invalid-dep=yes\n") == 3
    assert "sinfo is not installed" in got.stderr
    assert not work.exists()
    for bad, says in (
        (("--grid", "seed=1"), "--grid is for a recipe"),
        (("--run", "x"), "--run is for a recipe"),
    ):
        assert says in call(*options, *bad).stderr


def test_launches_of_a_stage_have_folders_of_their_own(tmp_path: Path) -> None:
    assert chains._folder(tmp_path, "a").name == "a.0001"
    (tmp_path / "a.0001").mkdir()
    (tmp_path / "a.0009").mkdir()
    (tmp_path / "ab.0010").mkdir()
    assert chains._folder(tmp_path, "a").name == "a.0010"
