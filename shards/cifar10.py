"""Write shards from CIFAR-10: class folders of images, or the binary release."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from scaletrain.data import script, write
from scaletrain.data.errors import DataError
from scaletrain.data.sources import Arrays, Folder

RECORD = 1 + 3 * 32 * 32  # label, then the red, green and blue planes
FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}


def main(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or with data_batch_1.bin ..."),
    ],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to make: DEST/train and DEST/test.")],
    per_shard: Annotated[int, typer.Option(min=1, help="Samples in a shard.")] = write.PER_SHARD,
    seed: Annotated[int, typer.Option(min=0, help="Of the global shuffle.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace DEST if it holds shards.")] = False,
) -> None:
    """Write shards from CIFAR-10: class folders of images, or the binary release (cifar-10-binary.tar.gz, unpacked)."""
    with write.replacing(dest, force) as partial:
        for split in FILES:
            images = read(source, split)
            with script.progress(f"writing {split}") as progress:
                shards = write.write(images, partial / split, name=split, per_shard=per_shard, seed=seed, progress=progress)
            print(f"{dest / split}: {len(images):,} images in {len(images.classes)} classes, {len(shards)} shards")


def read(source: Path, split: str) -> Folder | Arrays:
    """One split of either form. Raises DataError."""
    if (source / split).is_dir():
        return Folder(source / split)
    if (source / FILES[split][0]).exists():
        return binary(source, FILES[split])
    if (source / "data_batch_1").exists():
        raise DataError(
            f"{source} is the Python release, whose pickles are not read: take the binary one, cifar-10-binary.tar.gz"
        )
    raise DataError(f"{source} has neither {split}/CLASS/*.jpg nor {FILES[split][0]}")


def binary(source: Path, files: list[str]) -> Arrays:
    """Records of `RECORD` bytes (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version")."""
    parts = []
    for path in (source / name for name in files):
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None
        if not len(data) or len(data) % RECORD:
            raise DataError(f"{path}: {len(data)} bytes are not whole records of {RECORD}; fetch it again")
        parts.append(data.reshape(-1, RECORD))
    records = np.concatenate(parts)
    pixels = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(pixels, records[:, 0].tolist(), names(source))


def names(source: Path) -> tuple[str, ...]:
    path = source / "batches.meta.txt"
    try:
        return tuple(path.read_text().split())
    except OSError as error:
        raise DataError(f"{path}, which names the classes, cannot be read: {error.strerror}") from None


if __name__ == "__main__":
    script.run(main)
