"""The commands `scaletrain show`: what a recipe says and needs, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scaletrain import environment
from scaletrain.cli.commands import Overrides, Recipe

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")]
Ranks = Annotated[int, typer.Option(min=1, help="Processes of the run, one per device.")]

app = typer.Typer(
    no_args_is_help=True, help="Inspect a recipe: configuration, model size, memory, communication."
)


@app.command("config")
def show_config(recipe: Recipe, overrides: Overrides = None) -> None:
    """The resolved configuration, as a run saves it."""

    from scaletrain.config import load

    typer.echo(load.dump(load.load(recipe, overrides or ())), nl=False)


@app.command("model")
def show_model(
    recipe: Recipe,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Parameters, FLOPs per view and step, and activation memory of a recipe; nothing is
    computed.
    """
    from scaletrain.config import load
    from scaletrain.estimate import model

    found = model.measure(load.load(recipe, overrides or ()))
    typer.echo(json.dumps(found, indent=1)) if as_json else model.show(found)


@app.command("memory")
def show_memory(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = 8,
    as_json: AsJson = False,
) -> None:
    """Bytes that each rank holds under each engine, of parameters, gradients, optimizer, frozen
    networks, buffers and activations.
    """
    from scaletrain.config import load
    from scaletrain.estimate import memory

    found = memory.measure(load.load(recipe, overrides or ()), ranks)
    typer.echo(json.dumps(found, indent=1)) if as_json else memory.show(found)


@app.command("comm")
def show_comm(
    recipe: Recipe,
    overrides: Overrides = None,
    ranks: Ranks = 8,
    as_json: AsJson = False,
) -> None:
    """What the ranks send each other in a step: collectives and bytes by kind and purpose,
    predicted for any number of them.

    torchrun --nproc-per-node 2 -m scaletrain show comm ... counts them in a real step instead.
    """
    from scaletrain.config import load
    from scaletrain.estimate import comm

    found = comm.measure(load.load(recipe, overrides or ()), ranks)
    if environment.rank() == 0:
        typer.echo(json.dumps(found, indent=1)) if as_json else comm.show(found)


@app.command("schema")
def show_schema() -> None:
    """JSON schema of recipes, for editors."""

    from scaletrain.config import load

    typer.echo(json.dumps(load.schema(), indent=1))


@app.command("methods")
def show_methods() -> None:
    """Every method and auxiliary: paper, kind, recipes and published figures."""
    from scaletrain.report import catalogue
    from scaletrain.runtime import tables

    width = tables.width()
    for line in (
        *catalogue.lines("methods"),
        "",
        "added to a method by `auxiliaries`:",
        *catalogue.lines("auxiliaries"),
    ):
        typer.echo(tables.wrap(line, width, 8))


@app.command("datasets")
def show_datasets(
    data_root: Annotated[
        Path | None,
        typer.Option(envvar="SCALETRAIN_DATA_ROOT", help="Folder of their shards; default data."),
    ] = None,
) -> None:
    """Every dataset that `scaletrain eval --dataset` knows by name."""
    from scaletrain.report import dataset_table

    typer.echo("\n".join(dataset_table.show(data_root)))
