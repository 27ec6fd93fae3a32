"""The commands that work on recipes and runs. They import what they need when they run, so that
--help is quick.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scaletrain import environment

if TYPE_CHECKING:
    from scaletrain.config.schema import Config

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="e.g. optim.lr=0.45 data.views.1.size=96"),
]
Recipe = Annotated[
    Path, typer.Argument(help="Name of a recipe of configs/, e.g. byol_r50_in1k, or a YAML file.")
]


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Run folder; default runs/<recipe name>. An earlier run is resumed."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(help="Run, step or safetensors file whose backbone starts a new run."),
    ] = None,
    continues: Annotated[
        Path | None,
        typer.Option(
            "--continue",
            help="Run folder, or step of its checkpoints, whose whole state (weights, targets, "
            "optimizer) starts a new run with a schedule of its own.",
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of a few steps to RUN/profile.")
    ] = False,
    change: Annotated[
        bool,
        typer.Option(
            "--change",
            help="Resume although the configuration or the data differ from those of RUN.",
        ),
    ] = False,
    umask: Annotated[
        str | None,
        typer.Option(
            help="Access to RUN, e.g. 027 for your group to read; default: yours alone (077)."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Short for data.path=DATA; `synthetic`: measure speed and memory without data."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Short for steps=STEPS; a throughput check has no warm-up.")
    ] = None,
) -> None:
    """Train by a recipe, or resume; `scaletrain launch` starts several processes."""
    from scaletrain.config import load
    from scaletrain.config.recipe import find

    short = [
        f"{key}={value}"
        for key, value in (("data.path", data), ("steps", steps))
        if value is not None
    ]
    # a throughput check is shorter than the warm-up of any recipe
    first = ["optim.warmup_epochs=0"] if data == "synthetic" and steps is not None else []
    config = load.load(recipe, [*first, *(overrides or ()), *short])
    run = run or Path("runs") / find(recipe).stem

    if environment.rank() == 0:
        _print_changes(recipe, load.load(recipe), config)

    from scaletrain.runtime.signals import Stopped
    from scaletrain.train.loop import train as start

    try:
        start(
            config,
            run,
            init=init,
            continues=continues,
            trace=profile,
            change=change,
            umask=umask,
        )
    except Stopped as stop:
        if environment.rank() == 0:
            # the terminal whose end was the signal
            with contextlib.suppress(OSError):
                typer.echo(str(stop))
        raise typer.Exit(128 + stop.number) from None


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            help="Run folder, one step of its checkpoints, exported file, tv/NAME or timm/NAME of "
            "torchvision or timm, or KIND:FILE of another project's checkpoint, e.g. moco:FILE."
        ),
    ],
    benchmarks: Annotated[list[str], typer.Argument(help="e.g. knn linear")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Benchmark dataset: a name of configs/datasets, e.g. cifar10, or a file."
        ),
    ] = "",
    data_root: Annotated[
        Path | None,
        typer.Option(
            envvar="SCALETRAIN_DATA_ROOT", help="Folder of the shards of --dataset; default data."
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            "--train",
            help="Without --dataset: labelled shards, a folder or address; default: the run's own.",
        ),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option("--test", help="Default: the folder `test` or `val` next to them.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="e.g. linear.epochs=20; may be repeated.")
    ] = None,
    encoder: Annotated[
        Literal["trained", "untrained", "pixels"], typer.Option(help="Which encoder to evaluate.")
    ] = "trained",
    labels: Annotated[
        Path | None,
        typer.Option(help="Train on this label subset only, a file of `scaletrain shards subset`."),
    ] = None,
    same_numbers: Annotated[
        bool,
        typer.Option(
            "--same-numbers",
            help="Both sets number their classes alike, whatever their classes.json say.",
        ),
    ] = False,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; default RUN/evals, or that of the file."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder of the stored features; default: `features` in --results."),
    ] = None,
) -> None:
    """Evaluate a frozen encoder. Results go to RUN/evals; `scaletrain launch fleet RUN` adds them
    to the run's TensorBoard.
    """
    from scaletrain.evals import run as evals
    from scaletrain.report import cards

    measured = evals.run(
        target,
        benchmarks,
        dataset=dataset,
        data_root=data_root,
        train=train_data,
        test=test_data,
        overrides=settings or (),
        encoder=encoder,
        labels=labels,
        same_numbers=same_numbers,
        results=results,
        store=store,
    )

    # ranks that helped have nothing to print
    if measured:
        typer.echo("\n".join(cards.report(measured)))


def compare_runs(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Run folders whose checkpoints were evaluated."),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="e.g. linear or knn_20; default: the first that all runs have."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Which settings and data, by the digest that is shown where there are several."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of the tables.")
    ] = False,
) -> None:
    """Scores of several runs against epochs, images and time, when each reaches the other's final
    one, and whether their final ones differ beyond chance.
    """
    from scaletrain.report import compare
    from scaletrain.runtime import tables

    found = compare.compare(runs, metric, protocol)
    typer.echo(
        json.dumps(found, indent=1) if as_json else "\n".join(compare.show(found, tables.width()))
    )


def rank_encoders(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders that were evaluated, and folders of results of other encoders.",
        ),
    ],
    metric: Annotated[
        str | None,
        typer.Option(help="e.g. linear_top5; default: the main metric of each benchmark."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write all places to FILE.")
    ] = None,
) -> None:
    """Rank encoders by their newest results, a table for each benchmark and dataset.

    Those that the test samples cannot tell apart share their places.
    """
    from scaletrain.report import leaderboard
    from scaletrain.runtime import tables

    found = leaderboard.boards(folders, metric)
    if file is not None:
        leaderboard.save(found, file)
    typer.echo("\n".join(leaderboard.show(found, tables.width())))


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    file: Annotated[
        Path, typer.Argument(help="safetensors file to write, with torchvision's ResNet names.")
    ],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to take; default: the newest good one.")
    ] = None,
    module: Annotated[
        str, typer.Option(help="Another module of the method, such as a head, e.g. projector.")
    ] = "backbone",
) -> None:
    """Write the trained backbone to one file that torchvision, timm and `train --init` load."""
    from scaletrain.checkpoint import files, reader
    from scaletrain.evals.encoders import targets

    root = run / "checkpoints"
    source = reader.latest(root) if step is None else reader.open_step(reader.folder_of(root, step))
    if source is None:
        raise files.CheckpointError(f"{root}: no checkpoint to export; is {run} a run folder?")

    tensors = targets.export(run, source, module, file)
    typer.echo(f"{file}: {module} of step {source.step}, {tensors} tensors")


def doctor(
    run: Annotated[
        Path, typer.Option(help="Run folder to measure; if it holds a run, with that run's recipe.")
    ] = Path("runs"),
    data: Annotated[Path | None, typer.Option(help="Folder of shards to measure.")] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail where there is no GPU.")
    ] = False,
) -> None:
    """Check installation, machine, disks and network: a page for a bug report; torchrun starts it
    on several processes.
    """
    from scaletrain.doctor import run as doctor

    if doctor.examine(run, data, require_gpu=require_gpu):
        raise typer.Exit(1)


def _print_changes(recipe: Path, before: Config, after: Config) -> None:
    from scaletrain.config import load
    from scaletrain.runtime import tables

    changes = load.diff(before, after)
    if not changes:
        typer.echo(f"configuration: {recipe} as it is")
        return

    rows = [
        (key, *("-" if value is None else value for value in (old, new)))
        for key, old, new in changes
    ]
    tables.show(("key", "recipe", "this run"), rows, title=f"changes of the recipe {recipe}")
