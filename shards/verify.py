"""Check every byte of a folder of shards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import script
from scaletrain.data.verify import verify
from scaletrain.data.write import MAX_PIXELS
from scaletrain.tables import plural


def main(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of .tar shards.")],
    max_pixels: Annotated[int, typer.Option(min=1, help="Report larger images.")] = MAX_PIXELS,
) -> None:
    """Check every byte of a folder of shards: archive structure, checksums, index, and that every image decodes.

    Each fault is named by shard and byte offset; with any, the exit code is 2.
    """
    with script.progress("verifying") as progress:
        found = verify(folder, max_pixels, progress)
    for fault in found.faults:
        print(f"damaged: {fault}", file=sys.stderr)
    size, counts = plural(found.shards, "shard"), f"{plural(found.samples, 'sample')}, {found.labelled:,} labelled"
    verdict = plural(len(found.faults), "fault").upper() if found.faults else "sound"
    print(f"{folder}: {size}, {counts}, {plural(found.masks, 'mask')}, {found.bytes:,} bytes: {verdict}")
    if found.faults:
        raise SystemExit(2)


if __name__ == "__main__":
    script.run(main)
