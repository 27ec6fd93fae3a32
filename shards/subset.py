"""Write a label subset of a folder of shards: the few samples whose labels pretraining and
evaluation may use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from scaletrain.data.errors import DataError
from scaletrain.data.reading import subset
from scaletrain.data.reading.reader import Shards
from scaletrain.importers import command
from scaletrain.runtime.tables import plural


def main(
    folder: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Folder, pattern or address of labelled shards.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write, such as labels-1pct.json.")
    ],
    share: Annotated[
        float | None,
        typer.Option(min=0, max=100, metavar="PERCENT", help="Of all samples: 1 or 10."),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="So many samples of each class.")
    ] = None,
    names: Annotated[
        Path | None, typer.Option(help="File of image names, one a line: SimCLR's 1percent.txt.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
) -> None:
    """Write a label subset of a folder of shards: --share, --per-class or --names.

    --share and --per-class choose equally many of each class, and with one seed a smaller subset
    lies inside a larger one, the 1 % in the 10 %. OUT holds indices, keys and labels, and the
    checksum of the shards; it is refused for others.
    """
    if sum(option is not None for option in (share, per_class, names)) != 1:
        raise DataError("give one of --share (in per cent), --per-class and --names")
    if out.exists() and not force:
        raise DataError(f"{out} exists already; choose another name, or replace it with --force")

    shards = Shards(folder)
    if share is not None:
        chosen, rule = (
            subset.by_share(shards.labels(), share / 100, seed),
            f"{share:g} % of all, seed {seed}",
        )
    elif per_class is not None:
        chosen, rule = (
            subset.per_class(shards.labels(), per_class, seed),
            f"{per_class} of each class, seed {seed}",
        )
    else:
        assert names is not None
        chosen, rule = subset.by_name(shards, command.lines(names)), f"the names in {names.name}"

    saved = subset.save(out, shards, chosen, rule)
    counts = np.unique(saved.labels, return_counts=True)[1]
    classes = plural(len(counts), "class")
    print(
        f"{out}: {len(chosen):,} of {plural(len(shards), 'sample')}, {classes} of {counts.min()} "
        f"to {counts.max()}"
    )


if __name__ == "__main__":
    command.run(main)
