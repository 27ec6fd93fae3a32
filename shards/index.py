"""Make the index of a folder of WebDataset tars."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data.errors import ShardError
from scaletrain.data.format import index, offsets, selection
from scaletrain.importers import command
from scaletrain.runtime.tables import plural


def main(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER", help="Folder of .tar shards, or a pattern of some of them."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Make it again, from the shards as they are now.")
    ] = False,
    skip: Annotated[
        bool, typer.Option("--skip", help="Name damaged samples and leave them out; do not stop.")
    ] = False,
) -> None:
    """Make the index of a folder of WebDataset tars: scaletrain-index.json and one offset table per
    shard.

    It has all shards of the folder, and lies in it, or in ~/.cache/scaletrain where that cannot be
    written. Members of other types are passed over.
    """
    folder = Path(selection.one_folder(shards).folder)
    faults: list[ShardError] = []

    with command.progress("indexing") as progress:
        index.build(
            folder, force=force, progress=progress, report=faults.append if skip else offsets.stop
        )

    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)

    found = index.load(shards)
    left = f"; {plural(len(faults), 'fault')} left out" if faults else ""
    if found.unused:
        print(index.unused(found))

    print(
        f"{folder}: {plural(int(found.samples.sum()), 'sample')} in "
        f"{plural(len(found), 'shard')}{left}"
    )


if __name__ == "__main__":
    command.run(main)
