"""Write shards from Fashion-MNIST's (or MNIST's) IDX files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.importers import command
from scaletrain.importers.idx import read_idx
from scaletrain.importers.sources import Arrays
from scaletrain.importers.write import How

CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
# ours: in the file names
SPLITS = {"train": "train", "test": "t10k"}


@command.importer
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder of train-images-idx3-ubyte.gz and its three siblings."
        ),
    ],
    dest: command.Splits,
    how: How,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the files into SRC first, with torchvision.")
    ] = False,
) -> None:
    """Write shards from Fashion-MNIST's IDX files: 28 x 28 gray images as PNG, DEST/train and
    DEST/test.
    """
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(source), download=True)
        source = source / "FashionMNIST" / "raw"

    command.save(dest, {split: images(source, prefix) for split, prefix in SPLITS.items()}, how)


def images(source: Path, prefix: str) -> Arrays:
    pixels = read_idx(source / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
    return Arrays(pixels, labels.tolist(), CLASSES, source / prefix)
