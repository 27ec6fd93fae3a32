"""A pipeline as a chain of SLURM jobs: one for every stage that is not finished, each after those
that it needs.

A job runs `scaletrain pipeline ... --stage NAME`. Training saves, requeues and resumes as in a job
of its own; a computation is a job of one process, which begins again after an interruption.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from scaletrain.config import load as recipes
from scaletrain.launch.slurm import follow as watch
from scaletrain.launch.slurm import queue, submit
from scaletrain.launch.slurm.launch import check_fits
from scaletrain.launch.slurm.queue import Partition, SlurmError
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task
from scaletrain.pipelines import record
from scaletrain.pipelines.driver import Driver
from scaletrain.pipelines.load import Pipeline, Stage
from scaletrain.train import run_folder


@dataclass(frozen=True)
class Link:
    """The job of one stage."""

    stage: Stage
    resources: Resources
    # folder of its batch script and logs
    folder: Path
    # stages that are not finished either
    after: tuple[str, ...]


class Chain:
    """The jobs of a pipeline. `umask` is passed on to the stages.

    partition: whose values are taken where none are asked for; None: not known. Raises SlurmError,
    also for what every process would refuse after hours in the queue, and ConfigError for finished
    stages that do not fit the pipeline.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        resources: Resources,
        partition: Partition | None,
        umask: str | None = None,
    ) -> None:
        self._pipeline, self._umask = pipeline, umask
        self._jobs: dict[str, str] = {}
        # Jobs would refuse this too, but hours later.
        Driver(pipeline).refuse_changed(pipeline.stages)

        unfinished = [stage for stage in pipeline.stages if not record.result(stage)]
        left = {stage.name for stage in unfinished}

        self.links = [
            Link(
                stage,
                _wanted(stage, resources, partition),
                _folder(pipeline.work / "launches", stage.name),
                tuple(name for name in stage.after if name in left),
            )
            for stage in unfinished
        ]
        for link in self.links:
            self._check(link)

    def show(self) -> Iterator[str]:
        """The batch scripts, with names of stages in the place of their jobs."""
        for link in self.links:
            yield f"# --- {self._title(link)}"
            yield self._script(link, [f"job-of-{name}" for name in link.after])

    def submit(self) -> Iterator[str]:
        """Submit what is neither finished nor submitted, a line for each stage."""
        jobs = self._jobs
        for link in self.links:
            name = link.stage.name
            if live := queue.live(str(link.stage.folder)):
                jobs[name] = live[0]
                yield f"{name}: job {live[0]} was submitted before"
                continue

            wanted = _after(link.resources, [jobs[one] for one in link.after])
            task = Task(self._arguments(link), str(link.stage.folder))
            jobs[name] = submit.submit(link.folder, link.stage.folder, wanted, [task])[0]
            yield f"job {jobs[name]}: {self._title(link)}"

    def follow(self) -> None:
        """Until the jobs have ended; exit code 1 if one has failed."""
        try:
            states = watch.follow(list(self._jobs.values()), self._pipeline.work, typer.echo)
        except KeyboardInterrupt:
            typer.echo("\nno longer followed; the jobs continue")
            raise typer.Exit(130) from None

        folders = {self._jobs[link.stage.name]: link.folder for link in self.links}
        failed = [job for job, state in states.items() if state.name != "COMPLETED"]
        for job in failed:
            for text in watch.complaints(job, folders[job]):
                typer.echo(text, err=True)

        if failed:
            raise typer.Exit(1)

    # --- one job ----------------------------------------------------------------------------------

    def _title(self, link: Link) -> str:
        wanted = link.resources
        after = f", after {', '.join(link.after)}" if link.after else ""
        return (
            f"{link.stage.name}, {wanted.nodes} x {wanted.tasks} processes, "
            f"{wanted.gpus_per_node or 0} GPUs per node{after}"
        )

    def _script(self, link: Link, jobs: list[str]) -> str:
        return submit.script(link.folder, link.stage.folder, _after(link.resources, jobs), 1)

    def _arguments(self, link: Link) -> list[str]:
        pipeline = self._pipeline
        umask = ["--umask", self._umask] if self._umask else []
        return [
            "pipeline",
            str(pipeline.file),
            *pipeline.words,
            "--work",
            str(pipeline.work),
            "--stage",
            link.stage.name,
            *umask,
        ]

    def _check(self, link: Link) -> None:
        stage = link.stage
        if stage.recipe is None:
            return

        config = recipes.load(stage.recipe, stage.overrides)
        if not config.data.path and not config.data.mixture:
            raise SlurmError(f"stage '{stage.name}' needs a data set: set its data.path")
        # Of what other stages write, nothing is there to check.
        if str(self._pipeline.work) not in config.data.model_dump_json():
            check_fits(config, link.resources)


def _wanted(stage: Stage, resources: Resources, partition: Partition | None) -> Resources:
    """What the job of a stage asks for; a computation has the share of one process."""
    own: dict[str, Any] = {key: value for key, value in stage.resources if value is not None}
    if stage.recipe is None:
        shared = resources.on(partition) if partition else resources
        gpus = shared.gpus_per_node
        alone: dict[str, Any] = {
            "gpus_per_node": gpus and min(1, gpus),
            **own,
            "nodes": 1,
            "tasks_per_node": 1,
        }
        wanted = replace(shared, **alone)
    else:
        wanted = replace(resources, **own)

    return wanted.on(partition) if partition else wanted


def _folder(launches: Path, name: str) -> Path:
    """A new folder for a launch of a stage."""
    numbers = [int(path.name.rpartition(".")[2]) for path in launches.glob(f"{name}.[0-9]*")]
    return launches / f"{name}.{1 + max(numbers, default=0):04d}"


def _after(resources: Resources, jobs: list[str]) -> Resources:
    """With a dependency on the success of jobs."""
    return replace(resources, dependency=f"afterok:{':'.join(jobs)}") if jobs else resources


def launch(chain: Chain, place: Partition, work: Path, umask: str | None, *, follow: bool) -> None:
    """Submit a chain, and say what was done."""
    if not chain.links:
        typer.echo("every stage is finished: nothing is submitted")
        return
    if warn := queue.check_shared(work, place.nodes):
        typer.echo(f"warning: {warn}", err=True)

    with contextlib.ExitStack() as until:
        run_folder.restrict(work, umask, until)
        for line in chain.submit():
            typer.echo(line)

    typer.echo(f"work {work}\nlogs {work / 'launches'}")
    if follow:
        chain.follow()
