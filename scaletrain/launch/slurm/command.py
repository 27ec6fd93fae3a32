"""The command `scaletrain launch slurm`: train on a SLURM cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.config.recipe import ConfigError, find
from scaletrain.launch.slurm import chain as chains
from scaletrain.launch.slurm import options, queue
from scaletrain.launch.slurm.launch import Launch, show
from scaletrain.launch.slurm.queue import SlurmError
from scaletrain.launch.slurm.submit import Resources
from scaletrain.pipelines import load as pipelines
from scaletrain.report import grid as grids
from scaletrain.runtime import tables
from scaletrain.runtime.tables import plural
from scaletrain.train import run_folder

DEFAULT = "relicv2_r50_in1k"


def main(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RECIPE] [KEY=VALUE]...",
            help=f"Recipe, a name or a file [{DEFAULT}], and what is changed in it.",
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="Another way to name the recipe.")] = None,
    data: Annotated[str | None, typer.Option(help="Short for data.path=DATA.")] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of a recipe: a pipeline, as a chain of jobs; the arguments change it.",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder of --pipeline, on storage that all nodes share."),
    ] = None,
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
    cpus_per_task: options.CpusPerTask = None,
    mem: options.Mem = None,
    time: options.Time = None,
    partition: options.Partition = None,
    account: options.Account = None,
    qos: options.Qos = None,
    constraint: options.Constraint = None,
    exclude: options.Exclude = None,
    mail: options.Mail = None,
    setup: options.Setup = None,
    container: options.Container = None,
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
        typer.Option(help="As for `scaletrain train`: a file whose backbone starts a new run."),
    ] = None,
    continues: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            help="As for `scaletrain train`: a run or step whose whole state starts a new run.",
        ),
    ] = None,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="As for `scaletrain train`: resume although configuration or data differ.",
        ),
    ] = False,
    umask: Annotated[
        str | None,
        typer.Option(
            help="As for `scaletrain train`: access to --run, e.g. 027 for your group to read."
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

    Rerun the same command to resume a run that has ended before its time.
    """
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

    if pipeline is not None:
        others: dict[str, object] = {"--config": config, "--data": data, "--run": run}
        others |= {"--grid": grid, "--init": init, "--continue": continues}
        others |= {"--change": change, "--table": table}
        _pipeline(pipeline, work, words or (), resources, umask, others, follow, dry_run)
        return

    recipe, overrides = _recipe(words or (), config)
    overrides += (f"data.path={data}",) if data is not None else ()
    run = (run or Path("runs") / recipe.stem).absolute()

    if table:
        show(run)
        return

    further = [*(("--change",) if change else ()), *(("--umask", umask) if umask else ())]
    further += ["--init", str(init.absolute())] if init else []
    further += ["--continue", str(continues.absolute())] if continues else []
    launch = Launch(recipe, overrides, run, grids.combinations(grid or (), seeds), further)

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


def _recipe(words: Sequence[str], option: str | None) -> tuple[Path, tuple[str, ...]]:
    """The file of the recipe, which is the first word or the option, and the overrides."""
    named = words[:1] if words and "=" not in words[0] else ()
    if named and option is not None:
        raise ConfigError(f"two recipes are named, {named[0]} and --config {option}; leave one out")

    return find(next(iter(named), option or DEFAULT)), tuple(words[len(named) :])


def _pipeline(
    name: str,
    work: Path | None,
    words: Sequence[str],
    resources: Resources,
    umask: str | None,
    others: Mapping[str, object],
    follow: bool,
    dry_run: bool,
) -> None:
    """Submit a pipeline, or show the scripts of its jobs."""
    if given := [option for option, value in others.items() if value]:
        raise SlurmError(f"{given[0]} is for a recipe and has no meaning with --pipeline")
    if work is None:
        raise SlurmError("--pipeline needs --work, the folder of its stages")

    found = pipelines.load(name, work, words)
    try:
        place = queue.partition(resources.partition)
    except queue.UnavailableError as error:
        if not dry_run:
            raise
        place = None
        typer.echo(f"{error}\nSo the scripts lack what the partition decides", err=True)

    chain = chains.Chain(found, resources, place, umask)
    if dry_run or place is None:
        typer.echo("\n".join(chain.show()))
    else:
        chains.launch(chain, place, found.work, umask, follow=follow)


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
