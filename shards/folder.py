"""Write shards from a folder of images: one folder per class, or a flat folder without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import script
from scaletrain.data.sources import Folder
from scaletrain.data.write import How


@script.importer
def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="SRC/CLASS/*.jpg|jpeg|png|webp, or images directly in SRC.")],
    dest: script.Dest,
    how: How,
    masks: Annotated[Path | None, typer.Option(help="Folder that mirrors SRC, with a PNG mask for every image.")] = None,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "train",
) -> None:
    """Write shards from a folder of images: one folder per class, or a flat folder without labels.

    Every image is decoded once; one that cannot be read is named, and stops the import unless --max-bad allows it.
    """
    script.save(dest, {"": Folder(source, masks)}, how, name)


if __name__ == "__main__":
    script.run(main)
