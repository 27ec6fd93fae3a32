"""Write shards from CIFAR-100: class folders of images, the binary release, or the Python
release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.importers import cifar, command
from scaletrain.importers.write import How


def release(labels: str) -> cifar.Release:
    """`labels`: "fine" or "coarse"."""
    return cifar.Release(
        binary={"train": ("train.bin",), "test": ("test.bin",)},
        python={"train": ("train",), "test": ("test",)},
        names=f"{labels}_label_names.txt",
        bytes=2,
        byte=("coarse", "fine").index(labels),
        meta="meta",
        key=f"{labels}_labels",
        meta_key=f"{labels}_label_names",
    )


@command.importer
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="Folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a release."
        ),
    ],
    dest: command.Splits,
    how: How,
    coarse: Annotated[
        bool, typer.Option("--coarse", help="Of a release, take the 20 superclasses as labels.")
    ] = False,
) -> None:
    """Write shards from CIFAR-100, DEST/train and DEST/test: from class folders of images, or an
    unpacked release.

    Releases: cifar-100-binary.tar.gz (train.bin ...) or cifar-100-python.tar.gz (train, test,
    meta), whose pickles are read by a parser that runs nothing.
    """
    chosen = release("coarse" if coarse else "fine")

    command.save(
        dest, {split: cifar.read(source, split, chosen) for split in ("train", "test")}, how
    )


if __name__ == "__main__":
    command.run(main)
