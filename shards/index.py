"""Make the index of a folder of WebDataset tars."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import index, script, table
from scaletrain.data.errors import ShardError
from scaletrain.tables import plural


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of .tar shards.")],
    force: Annotated[bool, typer.Option("--force", help="Make it again, from the shards as they are now.")] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Name damaged samples and leave them out; do not stop.")] = False,
) -> None:
    """Make the index of a folder of WebDataset tars: index.json and one offset table per shard.

    It lies in the folder, or in ~/.cache/scaletrain where that cannot be written. Members of other types are passed over.
    """
    faults: list[ShardError] = []
    with script.progress("indexing") as progress:
        shards = index.build(folder, force=force, progress=progress, report=faults.append if skip else table.stop)
    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)
    left = f"; {plural(len(faults), 'fault')} left out" if faults else ""
    samples = sum(s["samples"] for s in shards)
    print(f"{folder}: {plural(samples, 'sample')} in {plural(len(shards), 'shard')}{left}")


if __name__ == "__main__":
    script.run(main)
