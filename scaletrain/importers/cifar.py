"""Shards from CIFAR-10 and CIFAR-100 in any form that users have: class folders of images, the
binary or the Python release, unpacked.

Formats: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.data.format import numpy_pickle
from scaletrain.importers import command
from scaletrain.importers.sources import Arrays, Folder
from scaletrain.importers.write import How
from scaletrain.runtime import local_files

# the red, green and blue planes of an image
PIXELS = 3 * 32 * 32
NAMES_BYTES = 1 << 20


@dataclass(frozen=True)
class Release:
    """Where a release keeps what, for one choice of labels."""

    # split: files
    binary: Mapping[str, tuple[str, ...]]
    python: Mapping[str, tuple[str, ...]]
    # of the classes, a text file of the binary release
    names: str
    # labels before the pixels of a binary record
    bytes: int
    # which of them is the label
    byte: int
    # pickle with the names of the classes
    meta: str
    # the labels in a pickle
    key: str
    meta_key: str


BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
CIFAR10 = Release(
    binary={"train": tuple(f"{name}.bin" for name in BATCHES), "test": ("test_batch.bin",)},
    python={"train": BATCHES, "test": ("test_batch",)},
    names="batches.meta.txt",
    bytes=1,
    byte=0,
    meta="batches.meta",
    key="labels",
    meta_key="label_names",
)
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", help="Folder with train/CLASS/*.jpg and test/CLASS/*.jpg, or a release."
    ),
]


def _cifar100(labels: str) -> Release:
    """`labels`: "fine" or "coarse"."""
    return Release(
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
def cifar10(source: Source, dest: command.Splits, how: How) -> None:
    """Write shards from CIFAR-10, DEST/train and DEST/test: from class folders of images, or an
    unpacked release.

    Releases: cifar-10-binary.tar.gz (data_batch_1.bin ...) or cifar-10-python.tar.gz (data_batch_1
    ...), whose pickles are read by a parser that runs nothing.
    """
    _save(source, dest, CIFAR10, how)


@command.importer
def cifar100(
    source: Source,
    dest: command.Splits,
    how: How,
    coarse: Annotated[
        bool, typer.Option("--coarse", help="Label a release by its 20 superclasses.")
    ] = False,
) -> None:
    """Write shards from CIFAR-100, DEST/train and DEST/test: from class folders of images, or an
    unpacked release.

    Releases: cifar-100-binary.tar.gz (train.bin ...) or cifar-100-python.tar.gz (train, test,
    meta), whose pickles are read by a parser that runs nothing.
    """
    _save(source, dest, _cifar100("coarse" if coarse else "fine"), how)


def _save(source: Path, dest: Path, release: Release, how: How) -> None:
    command.save(dest, {split: read(source, split, release) for split in ("train", "test")}, how)


def read(source: Path, split: str, release: Release) -> Folder | Arrays:
    """One split of whichever form `source` holds. Raises DataError."""
    if (source / split).is_dir():
        return Folder(source / split)
    if (source / release.binary[split][0]).exists():
        return _binary(source, release.binary[split], release)
    if (source / release.python[split][0]).exists():
        return _python(source, release.python[split], release)

    first = f"{release.binary[split][0]} nor {release.python[split][0]}"
    raise DataError(f"{source} has neither {split}/CLASS/*.jpg nor {first}")


def _binary(source: Path, files: tuple[str, ...], release: Release) -> Arrays:
    parts, record = [], release.bytes + PIXELS
    for path in (source / name for name in files):
        try:
            with local_files.reader(path) as file:
                data = np.fromfile(file, np.uint8)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from None

        if not len(data) or len(data) % record:
            raise DataError(
                f"{path}: {len(data)} bytes are not whole records of {record}; fetch it again"
            )

        parts.append(data.reshape(-1, record))

    records = np.concatenate(parts)
    path = source / release.names
    try:
        with local_files.reader(path) as file:
            names = tuple(file.read(NAMES_BYTES).decode(errors="backslashreplace").split())
    except OSError as error:
        raise DataError(
            f"{path}, which names the classes, cannot be read: {error.strerror}"
        ) from None

    return _arrays(
        records[:, release.bytes :], records[:, release.byte].tolist(), names, source / files[0]
    )


def _python(source: Path, files: tuple[str, ...], release: Release) -> Arrays:
    parts, labels = [], []
    for path in (source / name for name in files):
        content = numpy_pickle.load(path)
        pixels = numpy_pickle.array(content.get("data"), path)
        if pixels.ndim != 2 or pixels.shape[1] != PIXELS:
            raise DataError(f"{path}: pixels of shape {list(pixels.shape)}, not [N, {PIXELS}]")

        parts.append(pixels)
        labels += _list(content, release.key, int, path)

    names = _list(
        numpy_pickle.load(source / release.meta), release.meta_key, str, source / release.meta
    )
    return _arrays(np.concatenate(parts), labels, tuple(names), source / files[0])


def _list(content: dict[str, Any], key: str, kind: type, path: Path) -> list[Any]:
    values = content.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise DataError(f"{path}: no list '{key}' of type {kind.__name__}")
    return values


def _arrays(
    planes: NDArray[np.uint8], labels: list[int], names: tuple[str, ...], origin: Path
) -> Arrays:
    pixels = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Arrays(pixels, labels, names, origin)
