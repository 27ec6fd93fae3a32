"""Commands for shards that exist: their index, their verification, and subsets of their labels.

Those that write shards stand with their formats in scaletrain/importers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from scaletrain.data.errors import DataError, ShardError
from scaletrain.data.format import index as index_format
from scaletrain.data.format import offsets, selection
from scaletrain.data.format import verify as checks
from scaletrain.data.reading import subset as subsets
from scaletrain.data.reading.concat import shards_of
from scaletrain.importers import command
from scaletrain.importers.write import MAX_PIXELS
from scaletrain.runtime.tables import plural


def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="FOLDER", help="Folder of .tar shards, or a pattern of some of them."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Rebuild it from the shards as they are now.")
    ] = False,
    skip: Annotated[
        bool,
        typer.Option(
            "--skip", help="Report damaged samples and leave them out instead of stopping."
        ),
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
        index_format.build(
            folder, force=force, progress=progress, report=faults.append if skip else offsets.stop
        )

    for fault in faults:
        print(f"left out: {fault}", file=sys.stderr)

    found = index_format.load(shards)
    left = f"; {plural(len(faults), 'fault')} left out" if faults else ""
    if found.unused:
        print(index_format.unused(found))

    print(
        f"{folder}: {plural(int(found.samples.sum()), 'sample')} in "
        f"{plural(len(found), 'shard')}{left}"
    )


def verify(
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS", help="Folder of .tar shards, or a pattern of some of them."
        ),
    ],
    max_pixels: Annotated[int, typer.Option(min=1, help="Report larger images.")] = MAX_PIXELS,
) -> None:
    """Check every byte of shards: archive structure, checksums, index, and that every image
    decodes.

    Each fault is named by shard and byte offset; with any, the exit code is 2.
    """
    with command.progress("verifying") as progress:
        found = checks.verify(shards, max_pixels, progress)

    for fault in found.faults:
        print(f"damaged: {fault}", file=sys.stderr)

    counts = (
        f"{plural(found.samples, 'sample')}, {found.labelled:,} labelled, "
        f"{plural(found.masks, 'mask')}, {found.bytes:,} bytes"
    )
    noted = {
        "labels that are no whole numbers": found.unreadable,
        "samples left out of the index": found.left_out,
        f"images in another one's sample, such as {found.first_unused}": found.unused,
    }

    counts += "".join(f"; {what}: {count:,}" for what, count in noted.items() if count)
    verdict = plural(len(found.faults), "fault").upper() if found.faults else "sound"
    print(f"{', '.join(shards)}: {plural(found.shards, 'shard')}, {counts}: {verdict}")
    if found.faults:
        raise SystemExit(2)


def subset(
    folder: Annotated[
        str, typer.Argument(metavar="SHARDS", help="Folder, pattern or address, or a list [A, B].")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="File to write, such as labels-1pct.json.")
    ],
    share: Annotated[
        float | None,
        typer.Option(min=0, max=100, metavar="PERCENT", help="Of all samples: 1 or 10."),
    ] = None,
    per_class: Annotated[int | None, typer.Option(min=1, help="Samples per class.")] = None,
    names: Annotated[
        Path | None, typer.Option(help="File of image names, one a line: SimCLR's 1percent.txt.")
    ] = None,
    kind: Annotated[
        Literal["labels", "samples"],
        typer.Option(help="List labelled samples and their labels, or any samples."),
    ] = "labels",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the selection.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
) -> None:
    """Write a subset of the samples of shards: --share, --per-class or --names.

    --share and --per-class choose equally many of each class, and with one seed a smaller subset
    lies inside a larger one, the 1 % in the 10 %. With --kind samples, --share chooses among all
    samples regardless of labels. OUT holds indices, keys and labels (of --kind samples no labels),
    and the checksum of the shards; it is refused for others. Training takes it as data.subset, and
    with labels evaluation as --labels and SuNCEt as data.support.labels.
    """
    if sum(option is not None for option in (share, per_class, names)) != 1:
        raise DataError("give one of --share (in per cent), --per-class and --names")
    if out.exists() and not force:
        raise DataError(f"{out} exists already; choose another name, or replace it with --force")

    shards = shards_of(folder)
    if share is not None and kind == "samples":
        chosen, rule = (
            subsets.any_share(len(shards), share / 100, seed),
            f"{share:g} % of all samples, seed {seed}",
        )
    elif share is not None:
        chosen, rule = (
            subsets.by_share(shards.labels(), share / 100, seed),
            f"{share:g} % of all, seed {seed}",
        )
    elif per_class is not None:
        chosen, rule = (
            subsets.per_class(shards.labels(), per_class, seed),
            f"{per_class} of each class, seed {seed}",
        )
    else:
        assert names is not None
        chosen, rule = subsets.by_name(shards, command.lines(names)), f"the names in {names.name}"

    subsets.save(out, shards, chosen, rule, kind)
    text = f"{out}: {len(chosen):,} of {plural(len(shards), 'sample')}"
    if kind == "labels":
        counts = np.unique(shards.labels()[chosen], return_counts=True)[1]
        text += f", {plural(len(counts), 'class')} of {counts.min()} to {counts.max()}"

    print(text)
