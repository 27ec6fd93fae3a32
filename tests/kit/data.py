"""Small shards for the tests: images that can be told apart, written with Python's own tarfile."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from scaletrain.core import Batch


def picture(number: int, height: int = 24, width: int = 30) -> np.ndarray:
    """Smooth, colourful and different for every number."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / (3 + c) + y / (5 - c) + number * (c + 1)) for c in range(3)]
    return np.stack(planes, -1).astype(np.uint8)


def encode(pixels: np.ndarray, suffix: str = ".png") -> bytes:
    return bytes(cv2.imencode(suffix, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1])


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shards(
    folder: Path, counts: tuple[int, ...], masks: bool = False, suffix: str = "png"
) -> Path:
    """Shards of `counts` samples; sample i holds picture(i) and label i % 7."""
    folder.mkdir(parents=True)
    number = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"s-{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(count):
                key = f"{number:05d}"
                add(tar, f"{key}.cls", str(number % 7).encode())
                add(tar, f"{key}.{suffix}", encode(picture(number), f".{suffix}"))
                if masks:
                    mask = np.zeros((24, 30), np.uint8)
                    mask[6:18, 5 : 12 + number % 10] = 255
                    add(tar, f"{key}.mask.png", encode(mask))
                number += 1
    return folder


def children(parent: int = 0) -> list[int]:
    """Processes that `parent`, or this process, has forked and that still run, in order.

    Other programs that it has started, such as the daemons of a SLURM cluster, have a command line
    of their own.
    """
    found, parent = [], parent or os.getpid()
    command = Path(f"/proc/{parent}/cmdline").read_bytes()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, above = (path / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(above) == parent and state != "Z" and (path / "cmdline").read_bytes() == command:
                found.append(int(path.name))
    return sorted(found)


def joined(parts: list[Batch]) -> Batch:
    """The global batch of its ranks' parts."""
    masks = [p.masks for p in parts if p.masks is not None]
    groups = [p.groups for p in parts if p.groups is not None]
    return Batch(
        views=tuple(torch.cat(v, 1) for v in zip(*(p.views for p in parts), strict=True)),
        index=torch.cat([p.index for p in parts]),
        keys=torch.cat([p.keys for p in parts]),
        pixel_range=parts[0].pixel_range,
        labels=torch.cat([p.labels for p in parts]),
        masks=torch.cat(masks, 1) if masks else None,
        maps=tuple(torch.cat(m, 1) for m in zip(*(p.maps for p in parts), strict=True)),
        groups=torch.cat(groups) if groups else None,
    )
