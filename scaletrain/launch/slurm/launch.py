"""One launch on a SLURM cluster: its runs, the checks before they are submitted, and the table of
their results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from scaletrain.config import load
from scaletrain.config.schema import Config
from scaletrain.data.loading.sources import open_plan
from scaletrain.launch.slurm import follow as watch
from scaletrain.launch.slurm import submit, task
from scaletrain.launch.slurm.queue import SlurmError
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task
from scaletrain.report import grid as grids
from scaletrain.runtime import tables
from scaletrain.train.build import total_steps


class Launch:
    """One run, or one for each element of a grid; `folder` is new with every launch and holds its
    logs.
    """

    def __init__(
        self,
        recipe: Path,
        overrides: tuple[str, ...],
        run: Path,
        elements: list[tuple[str, ...]],
        options: Sequence[str] = (),
    ) -> None:
        self.recipe, self.run, self.elements, self.options = (
            recipe.absolute(),
            run,
            elements,
            options,
        )
        self.several = elements != [()]
        self.runs = [grids.folder(run, element) if self.several else run for element in elements]
        data = load.load(recipe, overrides).data

        self.overrides = overrides
        # absolute paths, so that the nodes find the data whatever folder they start in
        if data.mixture:
            parts = [part.model_dump(mode="json") for part in data.mixture]
            self.overrides = (*overrides, f"data.mixture={json.dumps(parts)}")
        elif data.path:
            self.overrides = (*overrides, f"data.path={json.dumps(data.path)}")

        for key in ("subset", "groups"):
            if place := getattr(data, key):
                self.overrides = (*self.overrides, f"data.{key}={json.dumps(place)}")

        self.folder = run / "launches" / f"{1 + int(max(self._launches(), default='0')):04d}"

    def _launches(self) -> list[str]:
        """Names of the launches so far."""
        return [place.name for place in (self.run / "launches").glob("[0-9][0-9][0-9][0-9]")]

    def configurations(self) -> Iterator[Config]:
        """Of each run. Raises ConfigError."""
        for element in self.elements:
            yield load.load(self.recipe, [*self.overrides, *element])

    def check(self, resources: Resources) -> None:
        """Refuse here what every rank would refuse after hours in the queue."""
        for config in self.configurations():
            if not config.data.path and not config.data.mixture:
                raise SlurmError(
                    f"{self.recipe.name} needs a data set: add data.path=FOLDER, a folder of "
                    "shards such as `scaletrain shards imagenet` writes, on storage that all nodes "
                    "share (or data.path=synthetic to try the cluster)"
                )

            check_fits(config, resources)

    def script(self, resources: Resources) -> str:
        return submit.script(self.folder, self.run, resources, len(self.runs))

    def submit(self, resources: Resources) -> list[str]:
        """The ids of the jobs."""
        arguments = ("train", str(self.recipe), *self.overrides)
        tasks = [
            Task([*arguments, *element, *self.options, "--run", str(run)], str(run))
            for element, run in zip(self.elements, self.runs, strict=True)
        ]

        if self.several:
            grids.save(self.run, self.elements)

        return submit.submit(self.folder, self.run, resources, tasks)

    def follow(self, jobs: list[str]) -> None:
        """Until the jobs have ended; exit code 1 if one has failed."""
        folder = self.run / "launches" / max(self._launches())
        try:
            states = watch.follow(jobs, folder, typer.echo)
        except KeyboardInterrupt:
            typer.echo(
                "\nno longer followed; the job continues. "
                f"`scancel {jobs[0].partition('_')[0]}` ends it"
            )
            raise typer.Exit(130) from None

        if self.several:
            # by number of the element: some may have ended before
            tasks = task.read(folder)
            named = {
                Path(tasks[int(job.partition("_")[2] or 0)].run): state.name.lower()
                for job, state in states.items()
            }
            show(self.run, named)

        failed = [job for job, state in states.items() if state.name != "COMPLETED"]
        for job in failed:
            for text in watch.complaints(job, folder):
                typer.echo(text, err=True)

        if failed:
            raise typer.Exit(1)


def check_fits(config: Config, resources: Resources) -> None:
    """Refuse a batch that the processes cannot share, and a schedule that does not fit the data."""
    plan = open_plan(config.data, seed=config.seed, batch=config.batch)
    plan.part(0, resources.nodes * resources.tasks)
    total_steps(config, plan.steps_per_epoch)


def show(run: Path, states: dict[Path, str] | None = None) -> None:
    rows = grids.table(run, states)
    names, cells = grids.printed(rows)
    notes = [f"all figures as CSV: {run / grids.TABLE}"]
    if any(" " in name for name in names):
        notes.insert(
            0,
            "a digest behind a column's name: protocol.digest of the results it is made of, as "
            "there are others",
        )

    tables.show(names, cells, notes=notes)
