"""The cost of planning an epoch, reading a manifest and resuming with 300 million samples.

    python -m benchmarks.plan             # a synthetic data set of 300,000 shards
    python -m benchmarks.plan 30000

Each figure is measured in a new process: its CPU seconds, and its peak resident memory above that
of the imports.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from scipy import stats  # type: ignore[import-untyped]

from benchmarks.rows import HEAD, Row
from scaletrain.config.schema import DataConfig, View
from scaletrain.data.format import index
from scaletrain.data.loading.loader import open_stream
from scaletrain.data.sampling.mixture import Mixture, MixtureSource
from scaletrain.data.sampling.plan import Batches, Plan

PER_SHARD, BATCH, LANES, WINDOW = 1000, 4096, 64, 16
LIMIT = (1.0, 100.0)  # seconds, MB
STATE = 64 * 1024  # bytes
POSITIONS = 100  # steps to resume from


def plan(shards: int) -> Batches:
    return Plan(np.full(shards, PER_SHARD), seed=0, batch=BATCH, lanes=LANES, window=WINDOW)


def mixture(shards: int) -> Batches:
    sources = [
        MixtureSource("large", np.full(shards, PER_SHARD), 0.9),
        MixtureSource("small", np.full(1281, PER_SHARD), 0.1),
    ]
    return Mixture(
        sources, seed=0, batch=BATCH, lanes=LANES, window=WINDOW, epoch_samples=1_281_167
    )


def whole_batch(make: Callable[[int], Batches], shards: int) -> None:
    """Plan an epoch and a batch of it."""
    planned = make(shards)
    planned.batch(7, planned.steps_per_epoch - 1)


def lookups(make: Callable[[int], Batches], shards: int) -> None:
    """Plan an epoch and look 100 positions up, one by one."""
    planned = make(shards)
    for step in np.random.default_rng(0).integers(0, planned.steps_per_epoch, 100).tolist():
        planned.batch(7, step, 5, 6)


def manifest(folder: str) -> None:
    """Read the list of shards and compare it with the folder, as every process does once; tables
    wait for their use.
    """
    index.load(Path(folder))


def measured(work: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """CPU seconds and MB of the work in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, work, arguments))
    process.start()
    sender.close()

    result: tuple[float, float] = receiver.recv()
    process.join()
    return result


def _child(
    sender: multiprocessing.connection.Connection,
    work: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    torch.set_num_threads(1)
    plan(10).batch(0, 0)  # what loads at first use is not the plan's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, begin = _status("VmRSS"), time.process_time()
    work(*arguments)
    sender.send((time.process_time() - begin, _status("VmHWM") - before))


def _status(field: str) -> float:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )

    return int(line.split()[1]) / 1024


def collection(folder: Path, shards: int) -> None:
    """Its manifest, and empty files in the place of shards."""
    entries = [
        {
            "name": f"train-{n:06d}.tar",
            "samples": PER_SHARD,
            "bytes": 110_000_000 + n,
            "sha256": f"{n:064x}",
        }
        for n in range(shards)
    ]

    for entry in entries:
        (folder / str(entry["name"])).touch()

    index.publish(folder, entries)


def pictures(folder: Path) -> None:
    """A folder of 64 shards of 64 small images."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    images = [cv2.imencode(".jpg", x)[1].tobytes() for x in noise]
    for shard in range(64):
        with tarfile.open(folder / f"s-{shard:02d}.tar", "w") as tar:
            for number, data in enumerate(images):
                info = tarfile.TarInfo(f"{number:03d}.jpg")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def resumes(folder: Path) -> tuple[float, float, float, float]:
    """Median CPU milliseconds to the first batch of a new stream; slope over the position and its
    95 % interval, in ms per 1,000 samples (Theil and Sen).
    """
    data = DataConfig(path=str(folder), lanes=16, window=2, workers=0, views=(View(size=32),))
    steps = np.random.default_rng(1).integers(0, 10 * 64, POSITIONS)  # of ten epochs
    taken = []

    for step in [0, 1, *steps.tolist()]:
        begin = time.process_time()
        stream = open_stream(data, seed=0, batch=64, rank=0, world=1, device=torch.device("cpu"))
        next(iter(stream.batches(step, 1000)))
        taken.append(1000 * (time.process_time() - begin))
        stream.close()

    slope, _, low, high = stats.theilslopes(taken[2:], steps * 64 / 1000, 0.95)  # two to warm up
    return float(np.median(taken[2:])), slope, low, high


def rows(shards: int = 300_000) -> Iterator[Row]:
    scale = f"{shards * PER_SHARD:,} samples"
    with tempfile.TemporaryDirectory() as folder:
        collection(Path(folder), shards)
        works: dict[str, tuple[Any, ...]] = {
            "plan an epoch and a batch": (whole_batch, plan, shards),
            "plan an epoch, look 100 positions up": (lookups, plan, shards),
            "mixture and virtual epoch, a batch": (whole_batch, mixture, shards),
            "mixture and virtual epoch, 100 positions": (lookups, mixture, shards),
            "read the manifest, compare it with the folder": (manifest, folder),
        }

        for name, work in works.items():
            seconds, size = measured(*work)
            target = f"{LIMIT[0]:g} s, {LIMIT[1]:g} MB"
            yield Row(
                f"{name}, {scale}",
                f"{seconds:.2f} s, {size:.0f} MB",
                "-",
                "-",
                "-",
                target,
                seconds <= LIMIT[0] and size <= LIMIT[1],
            )

    state = len(json.dumps({"clock": {"step": 10**9, "total": 10**9}}))
    yield Row(
        "the pipeline's state in a checkpoint",
        f"{state} bytes",
        "-",
        "-",
        "-",
        f"{STATE:,} bytes",
        state <= STATE,
    )

    with tempfile.TemporaryDirectory() as folder:
        pictures(Path(folder))
        index.build(Path(folder))
        middle, slope, low, high = resumes(Path(folder))

    yield Row(
        f"first batch after resume, {POSITIONS} positions in ten epochs",
        f"{middle:.2f} ms",
        "its own slope over the position",
        f"{slope:+.4f} ms per 1,000 samples",
        f"95 %: {low:+.4f} to {high:+.4f}",
        "0 within",
        low <= 0 <= high,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    print(HEAD, *rows(*map(int, sys.argv[1:])), sep="\n")
