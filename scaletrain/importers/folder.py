"""Write shards from a folder of images: one folder per class, or a flat folder without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.importers import command
from scaletrain.importers.sources import Folder
from scaletrain.importers.write import How


@command.importer
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="SRC/CLASS/*.jpg|jpeg|png|webp, or images directly in SRC."
        ),
    ],
    dest: command.Dest,
    how: How,
    masks: Annotated[
        Path | None,
        typer.Option(help="Folder that mirrors SRC, with a PNG mask or class map for every image."),
    ] = None,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "train",
) -> None:
    """Write shards from a folder of images: one folder per class, or a flat folder without labels.

    Every image is decoded once; one that cannot be read is named, and stops the import unless
    --max-bad allows it.
    """
    command.save(dest, {"": Folder(source, masks)}, how, name)
