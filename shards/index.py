"""Make the index of a folder of WebDataset tars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import index, script


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of .tar shards.")],
    force: Annotated[bool, typer.Option("--force", help="Make it again, from the shards as they are now.")] = False,
) -> None:
    """Make the index of a folder of WebDataset tars: index.json and one offset table per shard."""
    with script.progress("indexing") as progress:
        shards = index.build(folder, force=force, progress=progress)
    print(f"{folder}: {sum(s['samples'] for s in shards):,} samples in {len(shards)} shards")


if __name__ == "__main__":
    script.run(main)
