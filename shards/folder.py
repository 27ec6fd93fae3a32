"""Write shards from a folder of images: one folder per class, or a flat folder without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import script, write
from scaletrain.data.sources import MAX_PIXELS, Folder


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="SRC/CLASS/*.jpg|jpeg|png|webp, or images directly in SRC.")],
    dest: Annotated[
        Path, typer.Argument(metavar="DEST", help="Folder to make: DEST/NAME-000000.tar ..., index, classes.json.")
    ],
    masks: Annotated[Path | None, typer.Option(help="Folder that mirrors SRC, with a PNG mask for every image.")] = None,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "train",
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = write.PER_SHARD,
    seed: Annotated[int, typer.Option(min=0, help="Of the global shuffle.")] = 0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Refuse larger images.")] = MAX_PIXELS,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST if it holds shards.")] = False,
) -> None:
    """Write shards from a folder of images: one folder per class, or a flat folder without labels.

    Every image is decoded once; one that cannot be read stops the import and is named.
    """
    images = Folder(source, masks, max_pixels)
    with write.replacing(dest, force) as partial, script.progress("writing") as progress:
        shards = write.write(images, partial, name=name, per_shard=per_shard, seed=seed, progress=progress)
    labelled = f"in {len(images.classes)} classes" if images.classes else "without labels"
    print(f"{dest}: {len(images):,} images {labelled}, {len(shards)} shards")
    if images.ignored:
        print("not images, ignored: " + ", ".join(f"{n} x {suffix}" for suffix, n in sorted(images.ignored.items())))


if __name__ == "__main__":
    script.run(main)
