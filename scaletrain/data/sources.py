"""Sources of images that several importers share: files on disk and arrays in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import image
from scaletrain.data.errors import DataError
from scaletrain.data.tar import MEMBER_BYTES
from scaletrain.data.write import Entry

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Files:
    """Image files `root/path` with their labels [N], -1 for none."""

    def __init__(self, root: Path, paths: Sequence[str], labels: Sequence[int], classes: tuple[str, ...]) -> None:
        self.root, self.paths, self.labels, self.classes = root, paths, labels, classes
        self.labelled = bool(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, number: int) -> str:
        return str(self.root / self.paths[number])

    def load(self, number: int) -> Entry:
        name = str(Path(self.paths[number]).with_suffix(""))
        return Entry(name, read(self.root / self.paths[number]), one(self.labels[number]))

    def digest(self) -> str:
        return digest(self.classes, self.labels, "\0".join(self.paths).encode(errors="surrogateescape"))


class Folder(Files):
    """Images in class folders (classes sorted by name), or a flat folder of unlabelled images.

    `masks` mirrors the tree, with any mask as NAME.png. Raises DataError for what is missing or empty.
    """

    def __init__(self, root: Path, masks: Path | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if masks is not None and not masks.is_dir():
            raise DataError(f"{masks}: no such folder of masks")
        self.masks = masks
        self.ignored: dict[str, int] = {}  # files that are not images, by suffix
        folders, loose = inside(root, self.ignored)
        if folders and loose:
            raise DataError(f"{root} has class folders and loose images ({loose[0]}) side by side; move one of the two away")
        if not folders and not loose:
            raise DataError(f"{root} holds no images (jpg, jpeg, png, webp)")
        paths, labels = list(loose), [-1] * len(loose)
        for label, name in enumerate(folders):
            found = tree(root, name, self.ignored)
            if not found:
                raise DataError(f"class folder {root / name} holds no images (jpg, jpeg, png, webp); fill or remove it")
            paths += found
            labels += [label] * len(found)
        super().__init__(root, paths, labels, tuple(folders))

    def load(self, number: int) -> Entry:
        entry = super().load(number)
        if self.masks is None:
            return entry
        path = (self.masks / self.paths[number]).with_suffix(".png")
        try:
            return replace(entry, mask=read(path), mask_where=str(path))
        except DataError as error:
            raise DataError(f"{path} {error}") from None


class Arrays:
    """Images [N, H, W] or [N, H, W, 3] uint8 RGB with labels [N], written as PNG. `origin` names them in errors."""

    labelled = True

    def __init__(self, pixels: NDArray[np.uint8], labels: list[int], classes: tuple[str, ...], origin: Path) -> None:
        self.pixels, self.labels, self.classes, self.origin = pixels, labels, classes, origin
        if len(pixels) != len(labels):
            raise DataError(f"{origin}: {len(pixels)} images and {len(labels)} labels do not match")
        bad = [y for y in labels if not 0 <= y < len(classes)]
        if bad:
            raise DataError(f"{origin}: label {bad[0]} is outside the {len(classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, number: int) -> str:
        return f"{self.origin}, image {number}"

    def load(self, number: int) -> Entry:
        label = self.labels[number]
        return Entry(self.classes[label], image.png(self.pixels[number]), (label,))

    def digest(self) -> str:
        return digest(self.classes, self.labels, self.pixels.data)


def one(label: int) -> tuple[int, ...]:
    return () if label < 0 else (label,)


def digest(classes: Iterable[str], labels: Iterable[int], content: bytes | memoryview) -> str:
    head = json.dumps([list(classes), list(labels)]).encode()
    return hashlib.sha256(hashlib.sha256(head).digest() + hashlib.sha256(content).digest()).hexdigest()


def inside(folder: Path, ignored: dict[str, int]) -> tuple[list[str], list[str]]:
    """Names of the folders (hidden ones aside) and images right in a folder, sorted; other files are counted by suffix."""
    folders, images = [], []
    with os.scandir(folder) as entries:  # knows folders from files without a look at each, which is slow on a network
        for entry in entries:
            suffix = Path(entry.name).suffix.lower()
            if entry.is_dir():
                if not entry.name.startswith("."):
                    folders.append(entry.name)
            elif suffix in SUFFIXES:
                images.append(entry.name)
            else:
                ignored[suffix or entry.name] = ignored.get(suffix or entry.name, 0) + 1
    return sorted(folders), sorted(images)


def tree(root: Path, name: str, ignored: dict[str, int]) -> list[str]:
    """Paths below `root` of all images in its folder `name`, at any depth, in a fixed order."""
    folders, images = inside(root / name, ignored)
    return [f"{name}/{i}" for i in images] + [path for inner in folders for path in tree(root, f"{name}/{inner}", ignored)]


def read(path: Path) -> bytes:
    """The bytes of a file of bounded size. Raises DataError, without the path."""
    try:
        if path.stat().st_size > MEMBER_BYTES:
            raise DataError(f"is larger than {MEMBER_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
