"""Check every byte of a folder of shards."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from scaletrain.data.format.verify import verify
from scaletrain.importers import command
from scaletrain.importers.write import MAX_PIXELS
from scaletrain.runtime.tables import plural


def main(
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
        found = verify(shards, max_pixels, progress)

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


if __name__ == "__main__":
    command.run(main)
