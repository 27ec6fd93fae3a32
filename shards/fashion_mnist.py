"""Write shards from Fashion-MNIST's (or MNIST's) IDX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.data import script, write
from scaletrain.data.idx import read_idx
from scaletrain.data.sources import Arrays

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SPLITS = {"train": "train", "test": "t10k"}  # ours: in the file names


def main(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of train-images-idx3-ubyte.gz and its three siblings.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make: DEST/train and DEST/test.")],
    download: Annotated[bool, typer.Option("--download", help="Fetch the files into SRC first, with torchvision.")] = False,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = write.PER_SHARD,
    seed: Annotated[int, typer.Option(min=0, help="Of the global shuffle.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST if it holds shards.")] = False,
) -> None:
    """Write shards from Fashion-MNIST's IDX files: 28 x 28 gray images as PNG, DEST/train and DEST/test."""
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(source), download=True)
        source = source / "FashionMNIST" / "raw"
    with write.replacing(dest, force) as partial:
        for split, prefix in SPLITS.items():
            pixels = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
            labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
            images = Arrays(pixels, labels.tolist(), CLASSES)
            with script.progress(f"writing {split}") as progress:
                shards = write.write(images, partial / split, name=split, per_shard=per_shard, seed=seed, progress=progress)
            print(f"{dest / split}: {len(images):,} images in {len(CLASSES)} classes, {len(shards)} shards")


if __name__ == "__main__":
    script.run(main)
