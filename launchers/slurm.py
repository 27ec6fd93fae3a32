"""Train on a SLURM cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.config import load
from scaletrain.config.schema import Config
from scaletrain.data.loading.sources import open_plan
from scaletrain.importers import command as script
from scaletrain.launch.slurm import follow as watch
from scaletrain.launch.slurm import queue, submit, task
from scaletrain.launch.slurm.queue import SlurmError
from scaletrain.launch.slurm.submit import Resources
from scaletrain.launch.slurm.task import Task
from scaletrain.report import grid as grids
from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural
from scaletrain.train import run_folder
from scaletrain.train.build import total_steps

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "relicv2_r50_in1k.yaml"


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Of the recipe, e.g. data.path=/shared/imagenet/train"
        ),
    ] = None,
    config: Annotated[Path, typer.Option(help="Recipe: a YAML file.")] = DEFAULT,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder, on storage that all nodes share; default runs/RECIPE."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=0, help="Default: all of the partition's.")
    ] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: one per GPU, or one.")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(min=1, help="Default: the node's, divided by its tasks.")
    ] = None,
    mem: Annotated[
        str | None, typer.Option(help="Per node, e.g. 480G; default: the partition's.")
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Limit, e.g. 1-00:00:00, or minutes; 0: none. The job requeues itself at its end."
        ),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the cluster's default.")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option(help="Features the nodes must have.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to avoid, e.g. n[3-4].")] = None,
    mail: Annotated[
        str | None, typer.Option(help="Address told of end, failure and requeue.")
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            help="Shell line before the command, e.g. 'module load cuda'; may be repeated."
        ),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(help="Command before `python`, e.g. 'apptainer exec --nv image.sif'."),
    ] = None,
    warning: Annotated[
        int,
        typer.Option(
            min=1,
            help="Seconds before the limit at which the run saves: longer than its longest step.",
        ),
    ] = 120,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="Crashes at one and the same checkpoint before the job gives up."),
    ] = 3,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,VALUE|FILE",
            help="One run for each value, or item of a file; may be repeated.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, with seeds 0 ...")] = 1,
    throttle: Annotated[int, typer.Option(min=1, help="Runs of a grid at once.")] = 256,
    init: Annotated[
        Path | None,
        typer.Option(help="As of `scaletrain train`: a file whose backbone starts a new run."),
    ] = None,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="As of `scaletrain train`: resume although configuration or data differ.",
        ),
    ] = False,
    umask: Annotated[
        str | None,
        typer.Option(
            help="As of `scaletrain train`: access to --run, e.g. 027 for your group to read."
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show the job's states and log until it ends.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the batch script, also where there is no SLURM; submit nothing.",
        ),
    ] = False,
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Print the result table of the grid in --run, submit nothing."
        ),
    ] = False,
) -> None:
    """Train on a SLURM cluster: saves, requeues and resumes by itself at time-out, preemption and
    node failure.

    The same command goes on with a run that has ended before its time.
    """
    run = (run or Path("runs") / config.stem).absolute()

    if table:
        show(run)
        return

    resources = Resources(
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time=time,
        mem=mem,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        exclude=exclude,
        mail=mail,
        setup=tuple(setup or ()),
        container=container,
        throttle=throttle,
        warning=warning,
        restarts=restarts,
    )

    options = [*(("--change",) if change else ()), *(("--umask", umask) if umask else ())]
    options += ["--init", str(init.absolute())] if init else []
    launch = Launch(
        config, tuple(overrides or ()), run, grids.combinations(grid or (), seeds), options
    )

    try:
        place = queue.partition(partition)
    except queue.UnavailableError as error:
        if not dry_run:
            raise
        preview(launch, resources, error)
        return

    resources = resources.on(place)
    text = launch.script(resources)
    launch.check(resources)
    if warn := queue.check_shared(run, place.nodes):
        typer.echo(f"warning: {warn}", err=True)

    typer.echo(
        f"{plural(len(launch.runs), 'run')} of {plural(resources.nodes, 'node')} x "
        f"{plural(resources.tasks, 'process')}, "
        f"{plural(resources.gpus_per_node or 0, 'GPU')} per node, "
        f"{plural(resources.cpus_per_task or 1, 'CPU')} per process, "
        f"partition {place.name}",
        err=dry_run,
    )

    if dry_run:
        typer.echo(text)
        return

    jobs = queue.live(str(run))
    if jobs and not follow:
        raise SlurmError(
            f"job {', '.join(jobs)} trains {run} already: --follow shows it, `scancel {jobs[0]}` "
            "ends it"
        )

    if not jobs:
        with contextlib.ExitStack() as until:
            run_folder.restrict(run, umask, until)
            jobs = launch.submit(resources)
        typer.echo(f"job {', '.join(jobs)}\nrun  {run}\nlogs {launch.folder}")
    else:
        typer.echo(
            f"job {', '.join(jobs)} trains {run} already and is followed; nothing new is submitted"
        )

    if follow:
        launch.follow(jobs)


def preview(launch: Launch, resources: Resources, reason: Exception) -> None:
    """Print the batch script where no SLURM answers, and on stderr what the cluster would add to
    it.
    """
    # refused here, and not after hours in the queue
    list(launch.configurations())
    typer.echo(launch.script(resources))

    if undecided := resources.undecided():
        typer.echo(f"{reason}\nSo this is the script without what the partition decides:", err=True)
        typer.echo(tables.render(("", ""), undecided.items(), width=tables.width()), err=True)

    typer.echo(
        "not checked: that the cluster can give what is asked for, the data, and batch against the "
        "processes",
        err=True,
    )


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
                    "shards such as "
                    "shards/imagenet.py writes, on storage that all nodes share (or "
                    "data.path=synthetic to try the cluster)"
                )

            plan = open_plan(config.data, seed=config.seed, batch=config.batch)
            plan.part(0, resources.nodes * resources.tasks)
            total_steps(config, plan.steps_per_epoch)

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
                f"\nno longer followed; it goes on. `scancel {jobs[0].partition('_')[0]}` ends it"
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


def show(run: Path, states: dict[Path, str] | None = None) -> None:
    rows = grids.table(run, states)
    names = [name for name in rows[0] if not name.split()[0].endswith(("_top5", "_per_class"))]
    notes = [f"all figures as CSV: {run / grids.TABLE}"]
    if any(" " in name for name in names):
        notes.insert(
            0,
            "a digest behind a column's name: protocol.digest of the results it is made of, as "
            "there are others",
        )

    tables.show(names, [[row[name] for name in names] for row in rows], notes=notes)


if __name__ == "__main__":
    script.run(main)
