"""What the importers have in common: sources of images to write into shards, every image checked by decoding it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scaletrain.data import image
from scaletrain.data.errors import DataError, ImageError
from scaletrain.data.tar import MEMBER_BYTES
from scaletrain.data.write import Entry

MAX_PIXELS = 50_000_000  # of an image; the default of config.Data.max_pixels


class Folder:
    """Images in class folders (classes sorted by name), or a flat folder of unlabelled images.

    `masks` mirrors the tree, with any mask as NAME.png. Raises DataError for what is missing, empty or unreadable.
    """

    def __init__(self, root: Path, masks: Path | None = None, max_pixels: int = MAX_PIXELS) -> None:
        if not root.is_dir():
            raise DataError(f"{root}: no such folder of images")
        if masks is not None and not masks.is_dir():
            raise DataError(f"{masks}: no such folder of masks")
        self.root, self.masks, self.max_pixels = root, masks, max_pixels
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.ignored: dict[str, int] = {}  # files that are not images, by suffix
        paths: list[str] = []
        labels: list[int] = []
        for label, folder in enumerate(folders):
            found = [str(p.relative_to(root)) for p in self._images(folder.rglob("*"))]
            if not found:
                raise DataError(f"class folder {folder} holds no images (jpg, jpeg, png, webp); fill or remove it")
            paths += found
            labels += [label] * len(found)
        loose = [p.name for p in self._images(root.iterdir())]
        if folders and loose:
            raise DataError(f"{root} has class folders and loose images ({loose[0]}) side by side; move one of the two away")
        if not paths and not loose:
            raise DataError(f"{root} holds no images (jpg, jpeg, png, webp)")
        self.classes = tuple(p.name for p in folders)
        self.paths = paths or loose
        self.labels = labels or [-1] * len(loose)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, number: int) -> Entry:
        path = self.root / self.paths[number]
        data = checked(path, self.max_pixels)
        mask = None
        if self.masks is not None:
            mask_path = (self.masks / self.paths[number]).with_suffix(".png")
            mask = checked(mask_path, self.max_pixels)
            if image.kind(mask) != "png" or image.size(mask) != image.decode(data, self.max_pixels).shape[:2]:
                raise DataError(f"{mask_path}: the mask of {path} must be a PNG of the image's size")
        return Entry(str(Path(self.paths[number]).with_suffix("")), data, self.labels[number], mask)

    def _images(self, paths: Iterable[Path]) -> list[Path]:
        found = []
        for path in sorted(paths):
            suffix = path.suffix.lower()
            if path.is_file() and suffix in (".jpg", ".jpeg", ".png", ".webp"):
                found.append(path)
            elif path.is_file():
                self.ignored[suffix or path.name] = self.ignored.get(suffix or path.name, 0) + 1
        return found


class Arrays:
    """Images [N, H, W] or [N, H, W, 3] uint8 RGB with labels [N], written as PNG."""

    def __init__(self, pixels: NDArray[np.uint8], labels: list[int], classes: tuple[str, ...]) -> None:
        self.pixels, self.labels, self.classes = pixels, labels, classes
        if len(pixels) != len(labels):
            raise DataError(f"{len(pixels)} images and {len(labels)} labels do not match")
        bad = [y for y in labels if not 0 <= y < len(classes)]
        if bad:
            raise DataError(f"label {bad[0]} is outside the {len(classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, number: int) -> Entry:
        label = self.labels[number]
        return Entry(self.classes[label], image.png(self.pixels[number]), label)


def checked(path: Path, max_pixels: int) -> bytes:
    """The bytes of an image file that decodes without fault. Raises DataError naming it."""
    try:
        if path.stat().st_size > MEMBER_BYTES:
            raise DataError(f"{path}: larger than {MEMBER_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    try:
        image.strict(data, max_pixels)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from None
    return data
