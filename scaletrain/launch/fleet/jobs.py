"""Evaluations as SLURM jobs: an array for each run, benchmark and resources.

A job is found again by its comment, which names the launch; that of a run's training is the run
alone, so the two are never mixed up. Jobs that stop on request come back by themselves, with the
features that they had stored. What fails is submitted again by the fleet, which counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from scaletrain.launch.fleet.cells import Cell
from scaletrain.launch.fleet.claims import Holder
from scaletrain.launch.slurm import submit
from scaletrain.launch.slurm.queue import Job, Partition
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task

# Elements of an array: SLURM's default limit is 1,001.
_MOST = 1000
# How often a job that stores nothing more may be stopped on request and come back.
STOPS = 20


class Jobs:
    """The jobs of a fleet. wanted: resources of the largest one. place: the partition whose values
    are taken where none are asked for; None: not known.
    """

    def __init__(self, wanted: Resources, place: Partition | None) -> None:
        wanted = replace(wanted, nodes=1, restarts=0, stops=STOPS)
        self._wanted = wanted.on(place) if place else wanted

    def batches(self, cells: Sequence[Cell]) -> Iterator[list[Cell]]:
        """The cells of each array."""

        def key(cell: Cell) -> tuple[str, str, int]:
            return str(cell.run), cell.benchmark, cell.gpus

        for _, group in groupby(sorted(cells, key=key), key):
            batch = list(group)
            yield from (batch[at : at + _MOST] for at in range(0, len(batch), _MOST))

    def resources(self, batch: Sequence[Cell]) -> Resources:
        """A process for each GPU, with its share of the node's CPUs."""
        gpus = min(batch[0].gpus, self._wanted.gpus_per_node or 0)
        return replace(self._wanted, gpus_per_node=gpus, tasks_per_node=max(1, gpus))

    def script(self, batch: Sequence[Cell]) -> str:
        """The batch script of an array."""
        launch = new_launch(batch[0].run)
        return submit.script(launch, _named(batch), self.resources(batch), len(batch), _of(launch))

    def submit(self, launch: Path, batch: Sequence[Cell], after: str) -> list[str]:
        """The ids of the jobs. after: the job or array that they wait for, since it stores the
        features that they use, or "". Raises SlurmError.
        """
        wanted = self.resources(batch)
        if after:
            wanted = replace(wanted, dependency=f"afterany:{after}")

        tasks = [Task(list(cell.arguments), str(cell.run)) for cell in batch]
        return submit.submit(launch, _named(batch), wanted, tasks, _of(launch))


def _named(batch: Sequence[Cell]) -> Path:
    """What names the jobs."""
    return Path(f"{batch[0].run.name}-{batch[0].benchmark}")


def new_launch(run: Path) -> Path:
    """A new folder for batch scripts and logs; for a fleet that plans alone."""
    numbers = [int(path.name) for path in _launches(run).glob("[0-9]*") if path.name.isdecimal()]
    return _launches(run) / f"{1 + max(numbers, default=0):04d}"


def find(live: Sequence[Job], run: Path, holder: Holder) -> Job | None:
    """The job of a claim among those that run or wait."""
    if holder.job:
        return next((job for job in live if job.id == holder.job), None)

    # The fleet was killed before sbatch had answered.
    comment = _of(_launches(run) / holder.launch)
    mine = [job for job in live if job.comment == comment]
    ids = ("", str(holder.element))
    return next((job for job in mine if job.id.partition("_")[2] in ids), None)


def exit_code(run: Path, holder: Holder) -> int | None:
    """Of a job that has ended; None where its batch script was killed too."""
    try:
        return int((_launches(run) / holder.launch / f"{holder.job}.exit").read_text())
    except (OSError, ValueError):
        return None


def worn_out(run: Path, holder: Holder) -> bool:
    """Whether a job that has ended was stopped so often, without storing anything in between, that
    it did not come back.
    """
    try:
        stops = (_launches(run) / holder.launch / f"{holder.job}.stops").read_text().splitlines()
    except OSError:
        return False
    return stops.count(stops[-1]) > STOPS if stops else False


def log(run: Path, holder: Holder) -> Path:
    """The error log of a job's first process."""
    return _launches(run) / holder.launch / f"{holder.job}_0_log.err"


def _launches(run: Path) -> Path:
    return run / "evals" / "launches"


def _of(launch: Path) -> str:
    """The comment of the jobs of a launch."""
    return f"{launch.parents[2]}#evals/{launch.name}"
