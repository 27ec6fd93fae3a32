"""The command `scaletrain pipeline`."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer


def pipeline(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A YAML file, or a name of configs/pipelines.", show_default=False
        ),
    ],
    work: Annotated[Path, typer.Option(help="Folder of the pipeline, with one for each stage.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Options of the pipeline, data=FOLDER, and changes of a stage, pretrain.epochs=2.",
        ),
    ] = None,
    procs: Annotated[
        int | None,
        typer.Option(min=1, help="Train with so many processes; default: in this one."),
    ] = None,
    redo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="Do a stage again; what it has made is moved to WORK/earlier. May be repeated.",
        ),
    ] = None,
    stage: Annotated[
        str | None,
        typer.Option(help="Run this stage only, in all processes of a job; others must be done."),
    ] = None,
    umask: Annotated[
        str | None,
        typer.Option(help="As for `scaletrain train`: access to WORK, e.g. 027."),
    ] = None,
    status: Annotated[
        bool, typer.Option("--status", help="Print a table of the stages and run nothing.")
    ] = False,
) -> None:
    """Run a pipeline of trainings and computations, or resume it.

    Stages that are finished are not done again.
    """
    from scaletrain.config.recipe import ConfigError
    from scaletrain.pipelines import driver, load
    from scaletrain.runtime import tables

    if stage is not None and redo:
        raise ConfigError("--stage runs a single stage; use --redo without it")

    found = load.load(file, work, changes or ())
    if status:
        tables.show(("stage", "what", "state"), driver.status(found))
        return

    start = None if procs is None else _Processes(procs)
    runner = driver.Driver(found, start=start, umask=umask, say=_say)
    try:
        if stage is None:
            runner.run(redo or ())
        else:
            runner.run_one(stage)
    except driver.StageError as error:
        raise typer.Exit(error.code) from None
    except Exception as error:
        # Known without an import of torch.
        if type(error).__name__ != "Stopped":
            raise
        raise typer.Exit(128 + getattr(error, "number", 0)) from None


class _Processes:
    """Trains with several processes on this machine."""

    def __init__(self, procs: int) -> None:
        self._procs = procs

    def __call__(self, arguments: Sequence[str]) -> int:
        from scaletrain.launch import local

        before = {number: signal.getsignal(number) for number in local.SIGNALS}
        try:
            return local.start(arguments, self._procs, port=0, restarts=0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say(text: str) -> None:
    # At once, between the lines of processes.
    print(text, flush=True)
