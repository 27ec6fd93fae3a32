"""Evaluate the checkpoints of runs while they train: the command `scaletrain launch fleet`."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
import time as clock
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scaletrain.config import schema
from scaletrain.evals import datasets, request
from scaletrain.evals.errors import EvalError
from scaletrain.evals.request import Request
from scaletrain.launch.fleet import pool, table
from scaletrain.launch.fleet.fleet import Fleet
from scaletrain.launch.fleet.jobs import Jobs
from scaletrain.launch.fleet.plan import Plan
from scaletrain.launch.fleet.pool import Pool
from scaletrain.launch.local import SIGNALS
from scaletrain.launch.slurm import options, queue
from scaletrain.launch.slurm.submit import Resources
from scaletrain.runtime.tables import plural
from scaletrain.train import run_folder

# Looks in a row that storage or the cluster may keep from being complete.
PATIENCE = 40


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    benchmarks: Annotated[
        str, typer.Option(help="e.g. linear,knn,svm; none: only collect what was measured.")
    ] = "",
    every: Annotated[
        float,
        typer.Option(
            min=0,
            help="Evaluate the first checkpoint of each EVERY epochs, and the last one; 0: all.",
        ),
    ] = 0,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Wait for further checkpoints until the training is over."),
    ] = False,
    local: Annotated[
        int | None,
        typer.Option(
            min=1, help="Evaluate on this machine, LOCAL processes at a time; default: SLURM jobs."
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Attempts after the first one, of each result.")
    ] = 3,
    again: Annotated[
        bool, typer.Option("--again", help="Try what was given up again, as often.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between looks at runs and jobs.")
    ] = 30,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="As for `scaletrain eval`; may be repeated, for several datasets."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option(envvar="SCALETRAIN_DATA_ROOT", help="As for `scaletrain eval`."),
    ] = None,
    train: Annotated[str | None, typer.Option(help="As for `scaletrain eval`.")] = None,
    test: Annotated[str | None, typer.Option(help="As for `scaletrain eval`.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="e.g. linear.epochs=20; may be repeated.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="As for `scaletrain eval`.")] = None,
    same_numbers: Annotated[
        bool, typer.Option("--same-numbers", help="As for `scaletrain eval`.")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="As for `scaletrain eval`.")] = None,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=0, help="Most GPUs of a job; a benchmark says how many it uses. Default: all."
        ),
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
        int, typer.Option(min=1, help="Seconds before the limit at which a job is told to end.")
    ] = 60,
    throttle: Annotated[int, typer.Option(min=1, help="Jobs of a benchmark at once.")] = 256,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be started; start nothing.")
    ] = False,
) -> None:
    """Evaluate the checkpoints of runs, also while they train, and collect the results.

    Only what is missing is started, so the command can be repeated, also while another fleet is at
    work. It alone writes the curves of evaluations to TensorBoard, in RUN/tensorboard/evals.
    """
    names = tuple(name for name in benchmarks.split(",") if name)
    folders = [path.absolute() for path in runs]
    _check_runs(folders, follow)

    wanted = Request(
        names,
        train=train and schema.absolute(train),
        test=test and schema.absolute(test),
        data_root=data_root and data_root.absolute(),
        overrides=tuple(settings or ()),
        labels=labels and labels.absolute(),
        same_numbers=same_numbers,
        store=store and store.absolute(),
    )
    named = [str(Path(one).absolute()) if Path(one).is_file() else one for one in dataset or [""]]
    if names:
        # Refused here, and not for every step.
        request.settings(names, wanted.overrides)
        for one in filter(None, named):
            datasets.load(one, wanted.data_root)

    requests = [replace(wanted, dataset=one) for one in named if names]
    resources = Resources(
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
        warning=warning,
        throttle=throttle,
    )

    workers = _workers(local, resources, folders, dry_run) if names else None
    screen = table.Screen()
    plans = [Plan(run, requests, every, screen.say) for run in folders]

    with contextlib.ExitStack() as until:
        for run in folders:
            run_folder.restrict(run, None, until)

        fleet = Fleet(plans, None if dry_run else workers, retries, screen.say)
        asked = until.enter_context(_Asked())
        until.enter_context(fleet)
        if again:
            fleet.forgive()

        _drive(fleet, workers, follow and not dry_run, interval, screen, asked)
        screen.close(table.lines(fleet))

        if dry_run and workers:
            _preview(fleet, workers)

    if asked.number:
        if isinstance(workers, Jobs):
            typer.echo("no longer followed; the jobs continue, and the same command follows them")
        raise typer.Exit(128 + asked.number)
    if fleet.count("failed"):
        raise typer.Exit(1)


def _check_runs(runs: Sequence[Path], follow: bool) -> None:
    if len({run.resolve() for run in runs}) < len(runs):
        raise EvalError("a run is named twice")

    for run in runs:
        if not run.is_dir():
            raise EvalError(f"there is no run folder {run}")
        if not follow and not (run / run_folder.CONFIG).is_file():
            raise EvalError(f"{run} is no run folder: it has no {run_folder.CONFIG}")


def _workers(
    local: int | None, resources: Resources, runs: Sequence[Path], dry_run: bool
) -> Pool | Jobs:
    """What evaluates. Raises SlurmError where the cluster cannot give what is asked for."""
    if local is not None:
        return Pool(local, pool.devices())

    try:
        place = queue.partition(resources.partition)
    except queue.UnavailableError as error:
        if not dry_run:
            raise queue.UnavailableError(
                f"{error}, `scaletrain launch fleet --local N` evaluates on this one"
            ) from None
        typer.echo(f"{error}\nSo the scripts lack what the partition decides", err=True)
        return Jobs(resources, None)

    for run in runs:
        if warn := queue.check_shared(run, place.nodes):
            typer.echo(f"warning: {warn}", err=True)

    return Jobs(resources, place)


def _drive(
    fleet: Fleet,
    workers: Pool | Jobs | None,
    follow: bool,
    interval: float,
    screen: table.Screen,
    asked: _Asked,
) -> None:
    """Look again and again until nothing is left to do, or a signal arrives. Jobs and the training
    are waited for only where they are followed.
    """
    waits = follow or isinstance(fleet.workers, Pool)
    failures, said = 0, set[str]()

    while not asked.number:
        fleet.look()
        screen.show(table.lines(fleet))

        failures = failures + 1 if fleet.problems else 0
        if failures >= (PATIENCE if waits else 1):
            raise fleet.problems[0]
        for problem in {str(one) for one in fleet.problems} - said:
            screen.say(f"{problem}; trying again")
        said = {str(one) for one in fleet.problems}

        if fleet.over or (fleet.idle and not follow) or not (waits or fleet.settling):
            return

        _wait(min(interval, 1.0) if fleet.settling else interval, fleet, asked)


def _wait(seconds: float, fleet: Fleet, asked: _Asked) -> None:
    """Until time is up, a signal arrives or a process of this machine has ended."""
    deadline = clock.monotonic() + seconds
    while not asked.number and clock.monotonic() < deadline and not fleet.sweep():
        asked.wait(min(0.2, seconds))


class _Asked:
    """Context: the first of the signals that ask for the end; the next one ends at once."""

    def __init__(self) -> None:
        self.number, self._event = 0, threading.Event()
        self._restored = contextlib.ExitStack()

    def __enter__(self) -> _Asked:
        for number in SIGNALS:
            # as nohup leaves it
            if signal.getsignal(number) != signal.SIG_IGN:
                self._restored.callback(signal.signal, number, signal.signal(number, self._note))

        # A launcher may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._restored.close()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)

    def _note(self, number: int, _: Any) -> None:
        if self.number:
            raise SystemExit(128 + number)
        self.number = number
        self._event.set()


def _preview(fleet: Fleet, workers: Pool | Jobs) -> None:
    """Print what would be started."""
    missing = fleet.cells("missing")
    if isinstance(workers, Pool):
        for cell in missing:
            typer.echo(shlex.join(["scaletrain", *cell.arguments]))
        return

    for batch in workers.batches(missing):
        typer.echo(f"# --- {plural(len(batch), 'job')} of {batch[0].benchmark}")
        typer.echo(workers.script(batch))
        for element, cell in enumerate(batch):
            typer.echo(f"# {element}: {shlex.join(['scaletrain', *cell.arguments])}")
