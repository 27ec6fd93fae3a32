"""Images per second from JPEG shards to normalised views on the device, without training."""

from __future__ import annotations

import os
import time

from benchmarks.gpu import shards
from benchmarks.gpu.report import ROOT, Settings, attempt, say
from scaletrain.config import load
from scaletrain.data.loading.loader import open_stream

# recipe, data set, batch
CASES = (
    ("relicv2_r50_in1k", shards.PHOTOGRAPHS, 128),
    ("supervised_r50_in1k", shards.PHOTOGRAPHS, 128),
    ("byol_r18_cifar10", shards.CIFAR10, 256),
)


def run(settings: Settings) -> None:
    shards.run(settings)
    for recipe, images, batch in CASES[2:] if settings.tiny else CASES:
        for augment in ("worker", "device"):
            rows = 64 if settings.tiny else batch
            attempt(f"feed {recipe}", lambda: feed(settings, recipe, images, rows, augment))  # noqa: B023


def feed(settings: Settings, recipe: str, images: shards.Images, batch: int, augment: str) -> None:
    """Load batches with all but one of the cores, and print how fast they came."""
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    path = shards.folder_of(settings, images) / "train"
    overrides = [f"data.path={path}", f"data.workers={workers}", f"data.augment={augment}"]
    data = load.load(ROOT / "configs" / f"{recipe}.yaml", overrides).data
    stream = open_stream(data, seed=0, batch=batch, rank=0, world=1, device=settings.device)

    measured, warm_up = (1, 1) if settings.tiny else (30, 8)
    times = []
    for _ in stream.batches(0, warm_up + measured):
        settings.synchronize()
        times.append(time.perf_counter())
    stream.close()

    say(
        f"{recipe} data.augment={augment}: {workers} workers, "
        f"{measured * batch / (times[-1] - times[warm_up - 1]):.0f} images/s"
    )
