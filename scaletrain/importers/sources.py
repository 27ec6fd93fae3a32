"""Sources of images that several importers share: files on disk and arrays in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletrain.data.errors import DataError
from scaletrain.data.format.tar import MEMBER_BYTES
from scaletrain.data.transforms import image
from scaletrain.importers.write import Entry
from scaletrain.runtime import local_files

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# in addition to hidden files and folders
CLUTTER = ("__macosx", "thumbs.db", "desktop.ini")


class Files:
    """Image files `root/path` with their labels [N], -1 for none. `ignored`: what was left aside,
    counted.
    """

    def __init__(
        self,
        root: Path,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: tuple[str, ...],
        ignored: Counter[str],
    ) -> None:
        self.root, self.paths, self.labels, self.classes, self.ignored = (
            root,
            paths,
            labels,
            classes,
            ignored,
        )
        self.labelled = bool(classes)

    def __len__(self) -> int:
        return len(self.paths)

    def where(self, number: int) -> str:
        return plain(str(self.root / self.paths[number]))

    def load(self, number: int) -> Entry:
        name = str(Path(self.paths[number]).with_suffix(""))
        return Entry(name, read(self.root / self.paths[number]), one(self.labels[number]))

    def digest(self) -> str:
        return digest(
            self.classes, self.labels, "\0".join(self.paths).encode(errors="surrogateescape")
        )


class Folder(Files):
    """Images in class folders (classes sorted by name), or a flat folder of unlabelled images.

    `masks` mirrors the tree, with any mask as NAME.png. Raises DataError for what is missing or
    empty.
    """

    def __init__(self, root: Path, masks: Path | None = None) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if masks is not None and not masks.is_dir():
            raise DataError(f"{masks}: no such folder of masks")

        self.masks = masks
        ignored: Counter[str] = Counter()
        folders, loose = inside(root, ignored)
        if folders and loose:
            first = plain(loose[0])
            raise DataError(
                f"{root} has class folders and loose images ({first}) side by side; move one of "
                "the two away"
            )

        if not folders and not loose:
            raise DataError(f"{root} holds no images (jpg, jpeg, png, webp)")

        paths, labels = list(loose), [-1] * len(loose)
        for label, name in enumerate(folders):
            found = tree(root, name, ignored, (os.path.realpath(root),))
            if not found:
                place = plain(str(root / name))
                raise DataError(
                    f"class folder {place} holds no images (jpg, jpeg, png, webp); fill or remove "
                    "it"
                )

            paths += found
            labels += [label] * len(found)

        classes = tuple(map(plain, folders))
        if len(set(classes)) < len(classes):
            twice = next(name for name in classes if classes.count(name) > 1)
            raise DataError(
                f"{root} has two class folders whose names become '{twice}' as UTF-8; rename one"
            )

        super().__init__(root, paths, labels, classes, ignored)

    def load(self, number: int) -> Entry:
        entry = super().load(number)
        if self.masks is None:
            return entry

        path = (self.masks / self.paths[number]).with_suffix(".png")
        try:
            return replace(entry, mask=read(path), mask_where=plain(str(path)))
        except DataError as error:
            raise DataError(f"{plain(str(path))} {error}") from None


class Arrays:
    """Images [N, H, W] or [N, H, W, 3] uint8 RGB with labels [N], written as PNG. `origin` names
    them in errors.
    """

    labelled = True

    def __init__(
        self, pixels: NDArray[np.uint8], labels: list[int], classes: tuple[str, ...], origin: Path
    ) -> None:
        self.pixels, self.labels, self.classes, self.origin = pixels, labels, classes, origin
        self.ignored: Counter[str] = Counter()
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
    return hashlib.sha256(
        hashlib.sha256(head).digest() + hashlib.sha256(content).digest()
    ).hexdigest()


def clutter(name: str) -> str:
    """How a file or folder that no importer takes is counted: hidden ones, and what macOS and
    Windows leave; "" for others.
    """
    if name.startswith("._"):
        return "._*"

    hidden = name.startswith(".") and name not in (".", "..")
    return name if hidden or name.lower() in CLUTTER else ""


def is_image(path: str, ignored: Counter[str]) -> bool:
    """Whether the file at a path below a source is taken. What is not is counted by what it is."""
    odd = next(filter(None, map(clutter, path.split("/"))), "")
    suffix = Path(path).suffix.lower()
    if not odd and suffix in SUFFIXES:
        return True

    ignored[plain(odd or suffix or Path(path).name)] += 1
    return False


def plain(name: str) -> str:
    """A name of a file as Unicode: bytes that are not UTF-8 become `\\xe9`."""
    return os.fsencode(name).decode(errors="backslashreplace")


def inside(folder: Path, ignored: Counter[str]) -> tuple[list[str], list[str]]:
    """Names of the folders and images right in a folder, sorted. What is none of both, or clutter,
    is counted.
    """
    folders, images = [], []

    # knows folders from files without a look at each, which is slow on a network
    with os.scandir(folder) as entries:
        for entry in entries:
            if not local_files.is_folder(entry):
                if is_image(entry.name, ignored):
                    images.append(entry.name)
            elif odd := clutter(entry.name):
                ignored[plain(odd)] += 1
            else:
                folders.append(entry.name)

    return sorted(folders), sorted(images)


def tree(root: Path, name: str, ignored: Counter[str], around: tuple[str, ...] = ()) -> list[str]:
    """Paths below `root` of all images in its folder `name`, at any depth, in a fixed order. Raises
    DataError for a loop.
    """
    real = os.path.realpath(root / name)
    if real in around:
        raise DataError(f"{plain(str(root / name))} is a link to a folder around it; remove it")

    folders, images = inside(root / name, ignored)
    paths = [f"{name}/{image}" for image in images]
    return paths + [
        path
        for inner in folders
        for path in tree(root, f"{name}/{inner}", ignored, (*around, real))
    ]


def read(path: Path) -> bytes:
    """The bytes of a file of bounded size. Raises DataError, without the path."""
    try:
        return local_files.read(path, MEMBER_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise DataError(f"cannot be read: {error}") from None
