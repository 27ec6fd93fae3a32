"""Makes shards of the images that `make gpu-check-prepare` packed, or of made-up ones."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from benchmarks.gpu.report import Settings, attempt, check, python, say

CLASSES = 10
# images of a class in each split of a real data set with --tiny
TINY_PER_CLASS = 50


class Images(NamedTuple):
    """A data set: the archive with its images, and what to make instead of it."""

    # of the archive, NAME.tar or NAME.tar.gz, and of its only folder
    name: str
    # pixels of made-up images
    size: int
    # made-up images by split
    counts: dict[str, int]
    # made-up images with --tiny
    tiny_counts: dict[str, int]
    per_shard: int


CIFAR10 = Images("cifar10", 32, {"train": 50_000, "test": 2_000}, {"train": 512, "test": 100}, 1000)
PHOTOGRAPHS = Images("imagenet_sample", 400, {"train": 400}, {"train": 64}, 10)


def folder_of(settings: Settings, images: Images) -> Path:
    """Where the shards are, a folder for each split."""
    return settings.work / f"{images.name}-shards"


def run(settings: Settings) -> None:
    for images in (CIFAR10, PHOTOGRAPHS):
        attempt(f"shards {images.name}", lambda: make(settings, images))  # noqa: B023


def make(settings: Settings, images: Images) -> None:
    """Write the shards of a data set, unless an earlier call has finished."""
    done = settings.work / f"{images.name}.done"
    if done.exists():
        return

    begin = time.perf_counter()
    archives = sorted(settings.data.glob(f"{images.name}.tar*"))
    source = settings.work / images.name
    if archives:
        subprocess.run(["tar", "xf", str(archives[0]), "-C", str(settings.work)], check=True)
        if settings.tiny:
            thin(source)
    else:
        made_up(source, images, images.tiny_counts if settings.tiny else images.counts)

    codes = [
        import_split(source / split if (source / split).is_dir() else source, settings, images)
        for split in images.counts
    ]
    if not any(codes):
        done.touch()
    check(
        not any(codes),
        f"shards of {archives[0].name if archives else f'made-up {images.name}'} made in "
        f"{time.perf_counter() - begin:.0f} s",
    )


def thin(folder: Path) -> None:
    """Keep a few images of each class."""
    for parent, _, names in os.walk(folder):
        for name in sorted(names)[TINY_PER_CLASS:]:
            (Path(parent) / name).unlink()


def import_split(source: Path, settings: Settings, images: Images) -> int:
    """Exit code of shards/folder.py for the images of one split."""
    split = source.name if source.name in images.counts else "train"
    dest = folder_of(settings, images) / split
    words = ["shards/folder.py", str(source), str(dest), "--per-shard", str(images.per_shard)]
    return python(words, settings.seconds)[0]


def made_up(folder: Path, images: Images, counts: dict[str, int]) -> None:
    """Noisy JPEGs in SPLIT/CLASS folders; the classes differ in where a bright band lies."""
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        for number in range(count):
            kind, size = number % CLASSES, images.size
            pixels = draw.integers(0, 130, (size, size, 3), dtype=np.uint8)
            top = kind * size // (CLASSES + 2)
            pixels[top : top + size // 6] += 120

            path = folder / split / f"class{kind}" / f"{number:05d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)

    say(f"made-up images in place of {images.name}")
