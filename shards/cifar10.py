"""Write shards from CIFAR-10: class folders of images, the binary release, or the Python
release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scaletrain.importers import cifar, command
from scaletrain.importers.write import How

BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
RELEASE = cifar.Release(
    binary={"train": tuple(f"{name}.bin" for name in BATCHES), "test": ("test_batch.bin",)},
    python={"train": BATCHES, "test": ("test_batch",)},
    names="batches.meta.txt",
    bytes=1,
    byte=0,
    meta="batches.meta",
    key="labels",
    meta_key="label_names",
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
) -> None:
    """Write shards from CIFAR-10, DEST/train and DEST/test: from class folders of images, or an
    unpacked release.

    Releases: cifar-10-binary.tar.gz (data_batch_1.bin ...) or cifar-10-python.tar.gz (data_batch_1
    ...), whose pickles are read by a parser that runs nothing.
    """
    command.save(
        dest, {split: cifar.read(source, split, RELEASE) for split in ("train", "test")}, how
    )


if __name__ == "__main__":
    command.run(main)
